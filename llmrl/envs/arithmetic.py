"""Arithmetic in text, by a grammar of its own: nothing is evaluated by Python.

Invariants: exact (`Fraction`); only digits, a decimal point, `+ - * / ^ **` and parentheses are understood; text of
any kind costs bounded time and memory, or ExpressionError.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/") signed)*
    signed  = ("+" | "-")* power
    power   = atom (("^" | "**") signed)?
    atom    = number | "(" sum ")"
"""

import re
from fractions import Fraction

LONGEST = 400  # characters
DEEPEST = 50  # parentheses and signs within one another
MOST_BITS = 4000  # of numerator and denominator

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9.,])|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<sign>\*\*|[-+*/^()]))"
)


class ExpressionError(ValueError):
    """What is wrong with an expression, in a sentence for whoever wrote it."""


def evaluate(expression: str) -> Fraction:
    """The value of `expression`; raises ExpressionError."""
    if len(expression) > LONGEST:
        raise ExpressionError(f"the expression is longer than {LONGEST} characters")
    plain = expression.replace("\u2212", "-").replace("\u00d7", "*").replace("\u00f7", "/")
    parser = _Parser(_tokens(plain))
    value = parser.sum(0)
    if parser.rest:
        raise ExpressionError(f"unexpected `{parser.rest[-1]}`")
    return value


def shown(value: Fraction) -> str:
    """A number as people write it: whole, or with up to ten digits after the point."""
    if value.denominator == 1:
        return str(value.numerator) if abs(value) < 10**100 else "a number of more than 100 digits"
    digits = f"{abs(round(value * 10**10)):011d}"
    if len(digits) > 110:
        return "a number of more than 100 digits"
    text = f"{digits[:-10]}.{digits[-10:]}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 and text != "0" else text


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ExpressionError(f"cannot read `{text[at:].strip()[:20]}`; use numbers, + - * / ^ and parentheses")
        tokens.append((match["number"] or match["sign"]).replace(",", ""))
        at = match.end()
    return tokens


class _Parser:
    """`rest` holds the tokens not yet read, the next one last."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = tokens[::-1]

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while operator := self._take("+", "-"):
            other = self.product(depth)
            value = _bounded(value + other if operator == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while operator := self._take("*", "/"):
            other = self.signed(depth)
            if operator == "/" and other == 0:
                raise ExpressionError("division by zero")
            value = _bounded(value * other if operator == "*" else value / other)
        return value

    def signed(self, depth: int) -> Fraction:
        negative = False
        while sign := self._take("+", "-"):
            negative ^= sign == "-"
        return -self.power(depth) if negative else self.power(depth)

    def power(self, depth: int) -> Fraction:
        base = self.atom(depth)
        return _power(base, self.signed(_deeper(depth))) if self._take("^", "**") else base

    def atom(self, depth: int) -> Fraction:
        if self._take("("):
            value = self.sum(_deeper(depth))
            if not self._take(")"):
                raise ExpressionError("a parenthesis is not closed")
            return value
        if not self.rest:
            raise ExpressionError("the expression ends where a number is expected")
        token = self.rest.pop()
        if not token[-1].isdigit() and not token[0].isdigit():
            raise ExpressionError(f"`{token}` where a number is expected")
        return _bounded(Fraction(token))

    def _take(self, *wanted: str) -> str | None:
        return self.rest.pop() if self.rest and self.rest[-1] in wanted else None


def _deeper(depth: int) -> int:
    if depth >= DEEPEST:
        raise ExpressionError(f"more than {DEEPEST} parentheses within one another")
    return depth + 1


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ExpressionError("only whole numbers may be exponents")
    if base == 0 and exponent < 0:
        raise ExpressionError("division by zero")
    if _bits(base) * abs(exponent.numerator) > MOST_BITS and base not in (0, 1, -1):
        raise ExpressionError("the result is too large")
    return base ** (exponent.numerator if base not in (1, -1) else exponent.numerator % 2)


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MOST_BITS:
        raise ExpressionError("the result is too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
