"""What a credit map says in numbers about its pairs, and how its numbers and tokens are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrl.evaluation.credit.answer import Credit, Step
from llmrl.evaluation.intervals import wilson_interval
from llmrl.learner.sequences import Floats

MARKS = {"\n": "↵", "\t": "→"}
FULL_COLOUR = 98
"""Percentile of the rewards' sizes that has the full colour: one odd token must not make all others pale."""


@dataclass(frozen=True)
class Pair:
    """A row of the data (from 1), its prompt as text, and its two answers."""

    row: int
    prompt: str
    chosen: Credit
    rejected: Credit

    @property
    def answers(self) -> tuple[tuple[str, Credit], ...]:
        return ("chosen", self.chosen), ("rejected", self.rejected)


def summary(pairs: Sequence[Pair], drift: Floats) -> dict[str, float]:
    """Over the pairs: the rewards' means as in training (`rewards/...`), those a token, and `reference_drift`.

    Accuracy with its 95% Wilson interval; equal rewards count as half. `drift` is `CreditModel.drift` of all answers.
    """
    chosen, rejected = (np.array([getattr(pair, side).total for pair in pairs]) for side in ("chosen", "rejected"))
    right = float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
    low, high = wilson_interval(right, len(pairs))
    return {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": right / len(pairs),
        "accuracy_interval_low": low,
        "accuracy_interval_high": high,
        "rewards/chosen_per_token": _per_token([pair.chosen for pair in pairs]),
        "rewards/rejected_per_token": _per_token([pair.rejected for pair in pairs]),
        "reference_drift": float(drift.mean()),
        "n": float(len(pairs)),
    }


@dataclass(frozen=True)
class Scale:
    """How rewards are shown. full: that of either sign which has the full colour. digits: behind the point."""

    full: float
    digits: int

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Scale":
        """The scale that suits all tokens of these pairs."""
        sizes = np.abs(np.concatenate([credit.rewards for pair in pairs for _, credit in pair.answers]))
        largest = float(sizes.max()) or 1.0
        full = max(float(np.percentile(sizes, FULL_COLOUR)), largest / 10)
        return cls(full, min(max(1 - math.floor(math.log10(largest)), 2), 9))

    def strength(self, reward: float) -> float:
        """From 0, no colour, to 1."""
        return min(abs(reward) / self.full, 1.0)

    def text(self, reward: float) -> str:
        """`signed` with the digits of this scale."""
        return signed(reward, self.digits)

    def lowest(self, steps: Sequence[Step]) -> int | None:
        """The step (from 0) with the lowest sum of rewards, the first of several; None where no sum is shown as
        negative, so that nothing is blamed for what is nothing at this scale."""
        at = min(range(len(steps)), key=lambda k: steps[k].reward)
        return at if self.text(steps[at].reward).startswith("-") else None


def visible(text: str) -> str:
    """A token's text on one line: blanks at its end and what cannot be printed made visible."""
    shown = "".join(MARKS.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)
    stripped = shown.rstrip(" ")
    return stripped + "␣" * (len(shown) - len(stripped))


def signed(value: float, digits: int) -> str:
    """A reward as text: +0.012, and 0 without a sign where nothing is left of it."""
    if math.isnan(value):
        return "-"
    shown = f"{value:+.{digits}f}"
    return "0" if float(shown) == 0 else shown


def _per_token(credits: Sequence[Credit]) -> float:
    return float(np.concatenate([credit.rewards for credit in credits]).mean())
