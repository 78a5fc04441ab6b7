"""Arithmetic by grammar: against Python's own on expressions made here, by hand, and on hostile text."""

import contextlib
import random
import re
import time
from fractions import Fraction

import pytest

from llmrl.envs.arithmetic import ExpressionError, evaluate, shown


def expression(draw: random.Random, depth: int) -> str:
    if depth == 0 or draw.random() < 0.3:
        return str(draw.randint(0, 20))
    operator = draw.choice([" + ", "-", "*", " / ", "**"])
    if operator == "**":
        return f"({expression(draw, depth - 1)})**{draw.randint(-2, 3)}"
    left, right = expression(draw, depth - 1), expression(draw, depth - 1)
    whole = f"{left}{operator}{right}"
    return f"({whole})" if draw.random() < 0.5 else f"-{whole}" if draw.random() < 0.3 else whole


def test_equals_pythons_own() -> None:
    draw = random.Random(0)
    compared = 0
    for _ in range(2000):
        text = expression(draw, 4)
        exact = re.sub(r"(?<!\*\*)(?<!\*\*-)\b(\d+)", r"Fraction(\1)", text)
        try:
            expected = eval(exact, {"Fraction": Fraction})  # our own text, made above
        except ZeroDivisionError:
            with pytest.raises(ExpressionError, match="zero"):
                evaluate(text)
            continue
        assert evaluate(text) == expected, text
        compared += 1
    assert compared > 1500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", "-4"), ("2^-1", "0.5"), ("2^3^2", "512"), ("1,234 + 1", "1235"), ("2 x", None), (" 7 ", "7"),
        ("1/3", "0.3333333333"), ("-1/3", "-0.3333333333"), ("2/3", "0.6666666667"), ("0.1+0.2", "0.3"), (".5*2", "1"),
        ("3.", "3"), ("1/10^12", "0"), ("-1/10^12", "0"), ("6 \u00d7 7 \u2212 2", "40"), ("(1+2)(3)", None), ("", None),
        ("1+", None), (")", None), ("(", None), ("1 2", None), ("1/0", None), ("0^-1", None), ("2^0.5", None),
        ("1e9", None), ("2**", None), ("- - 2", "2"), ("1..2", None), ("0^10^9", "0"), ("(-1)^(10^9+1)", "-1"),
        ("10^99", "1" + "0" * 99), ("10^100", "a number of more than 100 digits"), ("5%2", None), ("7//2", None),
    ],
)  # fmt: skip
def test_by_hand(text: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(ExpressionError):
            evaluate(text)
    else:
        assert shown(evaluate(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9", "2^99999999999", "(" * 300, "-" * 399, "-" * 398 + "1", "9" * 5000, "1" * 400, "9^300^2", "\0",
        "(".join(["1+"] * 60), "__import__('os')", "2^" * 150 + "1", "1/3^900",
        "*".join(["9" * 90] * 4), "٣+1", "\ud800", "1" + "*9^400" * 20,
    ],
)  # fmt: skip
def test_hostile_text_ends_soon_and_only_in_an_expression_error(text: str) -> None:
    started = time.process_time()
    with contextlib.suppress(ExpressionError):
        shown(evaluate(text))
    assert time.process_time() - started < 5  # a hang, not a speed
