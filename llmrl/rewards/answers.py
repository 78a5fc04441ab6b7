"""The number that an answer ends in, and whether it is the right one.

Invariants: those of `llmrl.numbers`, which reads the numbers.
"""

import re
from fractions import Fraction

from llmrl import numbers

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
        return numbers.last(_braced(text[boxes[-1].end() :]))
    if marks := list(_MARK.finditer(text)):
        line = text[marks[-1].end() :].lstrip().split("\n", 1)[0]
        if (found := numbers.first(line.rsplit("=", 1)[-1])) is not None:
            return found
    return numbers.last(text)


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
