r"""Whether an answer is mathematically equal to the right one.

Invariants: what can be decided by exact comparison is decided here; only the rest goes to a child process, where
math-verify may hang or crash; a judgement that could not be made is no score, never 0.
"""

import re
from fractions import Fraction

from llmrl.rewards.children import ChildPool, Judgement
from llmrl.rewards.texts import MOST_ANSWER_CHARACTERS, final_answer

MOST_DIGITS = 100

# Different ways to write the same, none of them with a meaning of its own.
_SPELLING = re.compile(r"\\(?:(?P<fraction>[dt]frac)|left|right)(?![A-Za-z])|\\[!,]")
_BLANKS = re.compile(r"\s+")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{(\d+)\}")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?P<decimals>\.\d+)?(?P<below>/\d+)?|[-+]?\.\d+")


async def verified(pool: ChildPool, gold: str, text: str) -> Judgement:
    """1.0 where `text` ends in the answer that `gold` (an answer, or a worked solution that ends in one) gives, 0.0
    where it ends in another or in none; no score where `gold` cannot be read or the comparison did not succeed."""
    right = final_answer(gold) or gold.strip().strip("$").strip()
    if not right:
        return Judgement(None, "the right answer is empty")
    answer = final_answer(text)
    if answer is None or len(answer) > MOST_ANSWER_CHARACTERS:
        return Judgement(0.0)
    decided = equal_at_sight(right, answer)
    return Judgement(float(decided)) if decided is not None else await pool.ask("equal", gold=right, answer=answer)


def equal_at_sight(gold: str, answer: str) -> bool | None:
    """Whether two answers are the same, or None where that takes more than reading them.

    Numbers are compared exactly. Unequal ones are decided only where neither has decimals: that 0.333333 may stand for
    1/3 is for math-verify to say.
    """
    gold, answer = _plain(gold), _plain(answer)
    if gold == answer:
        return True
    (right, exact), (found, as_exact) = _number(gold), _number(answer)
    if right is None or found is None:
        return None
    return right == found or (None if not (exact and as_exact) else False)


def _plain(text: str) -> str:
    text = _SPELLING.sub(lambda found: "\\frac" if found["fraction"] else "", text)
    text = _BLANKS.sub("", text).replace("\u2212", "-").replace("{,}", ",").strip("$")
    return _FRACTION.sub(r"\1\2/\3", text) if _FRACTION.fullmatch(text) else text


def _number(text: str) -> tuple[Fraction | None, bool]:
    """(the number that all of `text` is, or None; whether it is written without decimals)."""
    match = _NUMBER.fullmatch(text)
    if not match or len(text) > MOST_DIGITS:
        return None, False
    try:
        return Fraction(text.replace(",", "")), "." not in text
    except (ValueError, ZeroDivisionError):
        return None, False
