r"""Whether an answer is mathematically equal to the right one.

Invariants: what can be decided by exact comparison is decided here; only the rest goes to a child process, where
math-verify may hang or crash; a judgement that could not be made is no score, never 0.
"""

import re

from llmrl import numbers
from llmrl.children.pool import Answer
from llmrl.rewards.texts import MOST_ANSWER_CHARACTERS, final_answer
from llmrl.rewards.verifiers import Verifiers

# Different ways to write the same, none of them with a meaning of its own.
_SPELLING = re.compile(r"\\(?:(?P<fraction>[dt]frac)|left|right)(?![A-Za-z])|\\[!,]")
_BLANKS = re.compile(r"\s+")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{(\d+)\}")


async def verified(pool: Verifiers, gold: str, text: str) -> Answer:
    """1.0 where `text` ends in the answer that `gold` (an answer, or a worked solution that ends in one) gives, 0.0
    where it ends in another or in none; no score where `gold` cannot be read or the comparison did not succeed."""
    right = final_answer(gold) or gold.strip().strip("$").strip()
    if not right:
        return Answer(None, "the right answer is empty")
    answer = final_answer(text)
    if answer is None or len(answer) > MOST_ANSWER_CHARACTERS:
        return Answer(0.0)
    decided = equal_at_sight(right, answer)
    return Answer(float(decided)) if decided is not None else await pool.ask("equal", gold=right, answer=answer)


def equal_at_sight(gold: str, answer: str) -> bool | None:
    """Whether two answers are the same, or None where that takes more than reading them.

    Numbers are compared exactly. Unequal ones are decided only where neither has decimals: that 0.333333 may stand for
    1/3 is for math-verify to say.
    """
    gold, answer = _plain(gold), _plain(answer)
    if gold == answer:
        return True
    right, found = numbers.whole(gold), numbers.whole(answer)
    if right is None or found is None:
        return None
    return right == found or (None if "." in gold + answer else False)


def _plain(text: str) -> str:
    text = _SPELLING.sub(lambda found: "\\frac" if found["fraction"] else "", text)
    text = _BLANKS.sub("", text).replace("\u2212", "-").replace("{,}", ",").strip("$")
    return _FRACTION.sub(r"\1\2/\3", text) if _FRACTION.fullmatch(text) else text
