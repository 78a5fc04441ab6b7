"""The number that an answer ends in, and whether it is the right one.

Invariants: exact arithmetic (`Fraction`, never floats); text from a model is only ever matched, never evaluated; a
text of any length costs time linear in its length.
"""

import re
from collections import deque
from fractions import Fraction

MOST_DIGITS = 100  # a longer "number" is a model repeating itself, and Python refuses to parse thousands of digits

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+"
# A sign belongs to the number only where no value stands right before it: "= -3" is negative, "5-3" ends in 3.
_SIGN = r"(?P<sign>(?<![\w)\]}.])[-+])?"
_POWER = r"(?:[eE][-+]?\d{1,3}(?!\w))?"
_NUMBER = re.compile(rf"(?<![\w.]){_SIGN}\$?(?P<value>(?:{_UNSIGNED}){_POWER})(?:\s*/\s*(?P<below>\d+)(?![\d/]))?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_BOXED = re.compile(r"\\boxed\s*\{")
_MARK = re.compile(r"####|\banswer\b\s*(?:is|:|=)+", re.IGNORECASE)


def final_number(text: str) -> Fraction | None:
    """The number that `text` gives as its answer, or None.

    In this order: the last `\\boxed{...}`; what follows the last `####` or `answer:` / `answer is` on its line (after
    the last `=` there); the last number in the text. Thousands commas, `$`, a sign, decimals and simple fractions are
    understood; units are ignored.
    """
    text = _plain(text)
    if boxes := list(_BOXED.finditer(text)):
        return _last(_braced(text[boxes[-1].end() :]))
    if marks := list(_MARK.finditer(text)):
        line = text[marks[-1].end() :].lstrip().split("\n", 1)[0]
        if (found := _first(line.rsplit("=", 1)[-1])) is not None:
            return found
    return _last(text)


def is_correct(text: str, answer: str | int | float | Fraction) -> bool:
    """Whether `text` ends in the number that `answer` (a number, or a text that ends in it) gives.

    Raises ValueError where `answer` itself holds no number.
    """
    expected = final_number(answer) if isinstance(answer, str) else Fraction(str(answer))
    if expected is None:
        raise ValueError(f"the expected answer {answer!r} holds no number")
    return final_number(text) == expected


def _plain(text: str) -> str:
    """Unicode minus as a hyphen, LaTeX fractions as a/b, LaTeX spacing and bold marks gone."""
    text = text.replace("\u2212", "-").replace("\\!", "").replace("{,}", ",").replace("\\$", "$").replace("**", "")
    return _LATEX_FRACTION.sub(r"\1/\2", text)


def _braced(text: str) -> str:
    """Up to the brace that closes the one before `text`."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return text


def _first(text: str) -> Fraction | None:
    match = _NUMBER.search(text)
    return _value(match) if match else None


def _last(text: str) -> Fraction | None:
    matches = deque(_NUMBER.finditer(text), maxlen=1)
    return _value(matches[0]) if matches else None


def _value(match: re.Match[str]) -> Fraction | None:
    value, below = match["value"].replace(",", ""), match["below"]
    if len(value) > MOST_DIGITS or len(below or "") > MOST_DIGITS:
        return None
    number = Fraction(value)
    if below:
        if int(below) == 0:
            return None
        number /= int(below)
    return -number if match["sign"] == "-" else number
