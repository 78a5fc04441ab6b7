"""Numbers in a text: which is the first, the last, the whole."""

from fractions import Fraction

import pytest

from llmrl import numbers


@pytest.mark.parametrize(
    ("text", "first", "last", "apart"),
    [
        ("3 is too low, so 7", 3, 7, 7),
        ("7 on my 2nd try", 7, 2, 7),
        ("36km", 36, 36, None),
        ("from 1,000 to -$2,500.50.", 1000, Fraction(-5001, 2), Fraction(-5001, 2)),
        ("1.5e3, or 3 / 4", 1500, Fraction(3, 4), Fraction(3, 4)),
        ("5-3 and (\u22127)", 5, -7, -7),
        ("1/0", None, None, None),
        ("9" * 5000, None, None, None),
        ("a1 v2.0", None, None, None),
        ("", None, None, None),
    ],
)
def test_first_and_last(text: str, first: object, last: object, apart: object) -> None:
    assert (numbers.first(text), numbers.last(text), numbers.last(text, apart=True)) == (first, last, apart)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-3/4", Fraction(-3, 4)), ("1,234", 1234), (".5", Fraction(1, 2)), ("+7", 7), ("12 apples", None),
        ("1e3", None), ("1/0", None), ("12,34", None), ("", None),
    ],
)  # fmt: skip
def test_whole(text: str, number: object) -> None:
    assert numbers.whole(text) == number
