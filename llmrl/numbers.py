"""Numbers as people and models write them in a text.

Invariants: exact (`Fraction`, never floats); text is only ever matched, never evaluated; a text of any length costs
time linear in its length.

Understood are thousands commas, decimals, a power of ten, a fraction of whole numbers, a sign, and `$` before it all.
"""

import re
from collections import deque
from fractions import Fraction

MOST_DIGITS = 100  # a longer "number" is a model repeating itself, and Python refuses to parse thousands of digits

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+"
# A sign belongs to the number only where no value stands right before it: "= -3" is negative, "5-3" ends in 3.
_SIGN = r"(?P<sign>(?<![\w)\]}.])[-+])?"
_POWER = r"(?P<power>[eE][-+]?\d{1,3}(?!\w))?"
_BELOW = r"(?:\s*/\s*(?P<below>\d+)(?![\d/]))?"
_NUMBER = re.compile(rf"(?<![\w.]){_SIGN}\$?(?P<value>(?:{_UNSIGNED}){_POWER}){_BELOW}")
_FOLLOWED = re.compile(r"\w")


def first(text: str) -> Fraction | None:
    """The first number in `text`, or None; None, too, where it is longer than any number is."""
    match = _NUMBER.search(_plain(text))
    return _value(match) if match else None


def last(text: str, apart: bool = False) -> Fraction | None:
    """The last number in `text`, or None. `apart`: of those that no letter follows, as one does in 2nd and 36km."""
    text = _plain(text)
    found = (match for match in _NUMBER.finditer(text) if not (apart and _FOLLOWED.match(text, match.end())))
    matches = deque(found, maxlen=1)
    return _value(matches[0]) if matches else None


def whole(text: str) -> Fraction | None:
    """The number that all of `text` is, or None. There is no power of ten: in mathematics e is a number."""
    match = _NUMBER.fullmatch(_plain(text))
    return _value(match) if match and not match["power"] else None


def _plain(text: str) -> str:
    return text.replace("\u2212", "-")


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
