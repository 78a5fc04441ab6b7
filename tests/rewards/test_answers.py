"""What counts as the answer of a text."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.rewards.answers import final_number, is_correct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("60 + 80 = 140\n9 + 5 = 14\n140 + 14 = 154\nAnswer: 154", 154),
        ("The answer is 5 + 3 = 8", 8),
        ("Answer: 1.5e3", 1500),
        ("Answer: 2E-2", Fraction(1, 50)),
        ("the answer is: -$1,000", -1000),
        ("**Answer: 42**", 42),
        ("Answer:\n\n17", 17),
        ("Answer: 12 (checked against 15)", 12),
        ("Answer: 3. No, wait. Answer: 4.", 4),
        ("Natalia sold 48/2 = 24 clips.\n#### 72", 72),
        ("#### 1,234", 1234),
        ("\\boxed{\\frac{3}{4}} is it, 5 is not", Fraction(3, 4)),
        ("\\boxed{12{,}000}", 12000),
        ("\\boxed{x^{2} = 9}", 9),
        ("first \\boxed{1}, then \\boxed{2}", 2),
        ("so 5-3", 3),
        ("12 - 5", 5),
        ("x=-3", -3),
        ("(\u22127)", -7),
        ("it costs $3.50.", Fraction(7, 2)),
        ("20%", 20),
        (".5", Fraction(1, 2)),
        ("3.14.", Fraction(314, 100)),
        ("3/4", Fraction(3, 4)),
        ("1, 2, 3", 3),
        ("v2 is 3.", 3),
        ("36km", 36),
        ("the answers were 1 and 2", 2),
    ],
)
def test_number_of_a_text(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("text", ["", "no number", "a1b2", "1/0", "Answer: x", "9" * 5000, "\\boxed{}"])
def test_no_number(text):
    assert final_number(text) is None


def test_code_is_not_run():
    assert final_number("__import__('os').abort()") is None


def test_text_without_end_is_read_in_linear_time():
    assert final_number("1," * 200_000 + " $" * 200_000 + "{" * 200_000) == 1


@given(st.integers(-(10**12), 10**12))
def test_thousands_commas_change_nothing(number):
    assert final_number(f"Answer: {number:,}") == number == final_number(f"it is {number}.")


@pytest.mark.parametrize("answer", ["154", 154, 154.0, Fraction(154), "154.00", "#### 154", "$154"])
def test_answers_in_any_form(answer):
    assert is_correct("Answer: 154", answer)
    assert not is_correct("Answer: 153", answer)
    assert not is_correct("no idea", answer)


def test_an_expected_answer_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="'unknown' holds no number"):
        is_correct("Answer: 1", "unknown")
