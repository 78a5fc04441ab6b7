"""Guess a hidden whole number from 1 to N within K guesses; after each, the player hears "higher" or "lower".

Invariants: every message costs one guess, also one without a whole number from 1 to N in it, to which the answer is the
range once more; the episode is over with the right number or with the last guess.

Rows differ in N and in the hidden number together. Were N fixed and the numbers themselves divided into train and test,
training would teach never to say a number of the test split; with `vary_range: false` that is what happens.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import Field

from llmrl.envs.options import Options, checked, column
from llmrl.envs.protocol import EnvironmentKind, Message, Row, Split, StepResult
from llmrl.envs.reading import guess_part, said
from llmrl.envs.single_use import SingleUse
from llmrl.envs.splits import pick, sampled
from llmrl.errors import RefusedError
from llmrl.numbers import last

NAME = "number_guessing"
Wording = Literal["full", "terse"]


class NumberGuessingOptions(Options):
    numbers: Annotated[int, Field(ge=2, le=10_000)] = 10
    """The largest N: the hidden number is from 1 to N."""
    vary_range: bool = True
    """N is drawn for each row from the upper half, numbers/2 + 1 to numbers; otherwise it is always `numbers`."""
    guesses: Annotated[int, Field(ge=1)] = 4
    """K: how many messages the player has."""
    guess_cost: Annotated[float, Field(ge=0)] = 0.0
    """Taken off for each guess, as the reward `guess_cost`."""
    progress: Annotated[float, Field(ge=0)] = 0.0
    """Reward `progress` for what a guess rules out, in bits: this much, once all numbers but the right one are."""
    wording: Wording = "full"
    """`full` sentences, or `terse` signs for models that can hardly read: `1 - 10`, `> 5`, `< 5`."""


class NumberGuessing:
    """One game. Rewards: `success` (1 or 0, when it is over), and `guess_cost` and `progress` where they are asked for.

    Row: `numbers` (N) and `number` (the hidden one).
    """

    def __init__(self, row: Row, seed: int, options: NumberGuessingOptions) -> None:
        self._numbers, self._number = column(row, "numbers", int, NAME), column(row, "number", int, NAME)
        if not 1 <= self._number <= self._numbers:
            raise RefusedError(f"{NAME}: column `number` is {self._number}, which is not from 1 to {self._numbers}")
        self._options = options
        self._left = options.guesses
        self._low, self._high = 1, self._numbers  # what is not ruled out
        self._use = SingleUse(NAME)

    async def init(self) -> list[Message]:
        self._use.begin()
        return _user(_opening(self._numbers, self._left, self._options.wording))

    async def step(self, message: Message) -> StepResult:
        self._use.turn()
        self._left -= 1
        guess = read_guess(said(message), self._numbers)
        rewards = self._shaping(guess)
        if guess == self._number or self._left == 0:
            self._use.end()
            return StepResult([], done=True, rewards={"success": float(guess == self._number), **rewards})
        return StepResult(
            _user(_feedback(guess, self._number, self._numbers, self._left, self._options.wording)), rewards=rewards
        )

    async def close(self) -> None:
        self._use.end()

    def _shaping(self, guess: int | None) -> dict[str, float]:
        """`progress` is a difference of potentials (Ng et al. 1999), so the best play stays the best."""
        rewards = {"guess_cost": -self._options.guess_cost} if self._options.guess_cost else {}
        before = self._high - self._low + 1
        if guess is not None and guess <= self._number:
            self._low = max(self._low, guess + (guess != self._number))
        if guess is not None and guess >= self._number:
            self._high = min(self._high, guess - (guess != self._number))
        if self._options.progress:
            bits = math.log2(before / (self._high - self._low + 1))
            rewards["progress"] = self._options.progress * bits / math.log2(self._numbers)
        return rewards


def read_guess(text: str, numbers: int) -> int | None:
    """The last number of `text` if it is a whole number from 1 to `numbers`, else None."""
    value = last(guess_part(text), apart=True)
    fits = value is not None and value.denominator == 1 and 1 <= value <= numbers
    return int(value) if value is not None and fits else None


def load(options: dict[str, Any]) -> EnvironmentKind:
    """Brings its own rows: N and hidden number, by seed."""
    own = checked(NumberGuessingOptions, options, NAME)
    return EnvironmentKind(
        lambda row, seed: NumberGuessing(row, seed, own), lambda *which: _rows(own, *which), multi_turn=own.guesses > 1
    )


def _rows(options: NumberGuessingOptions, split: Split, count: int, seed: int) -> list[Row]:
    fewest = options.numbers // 2 + 1 if options.vary_range else options.numbers
    ends = list(accumulate(range(fewest, options.numbers + 1)))  # the pairs (N, number) in a line, N by N

    def candidates() -> Iterator[tuple[str, Row]]:
        for index in sampled(ends[-1], count, seed):
            at = bisect_right(ends, index)
            numbers, number = fewest + at, ends[at] - index
            yield f"{NAME}/{numbers}/{number}", {"numbers": numbers, "number": number}

    return pick(candidates(), split, count, f"{NAME} with environment_options.numbers {options.numbers}")


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _opening(numbers: int, left: int, wording: Wording) -> str:
    if wording == "terse":
        return f"1 - {numbers}"
    return (
        f"I am thinking of a whole number from 1 to {numbers}. You have {_count(left)}; after each I say whether my "
        "number is higher or lower. End your message with your guess."
    )


def _feedback(guess: int | None, number: int, numbers: int, left: int, wording: Wording) -> str:
    if wording == "terse":
        return f"1 - {numbers}" if guess is None else f"{'>' if number > guess else '<'} {guess}"
    if guess is None:
        return (
            f"I found no whole number from 1 to {numbers} at the end. End your message with your guess. "
            f"{_count(left)} left."
        )
    return f"My number is {'higher' if number > guess else 'lower'} than {guess}. {_count(left)} left."


def _count(left: int) -> str:
    return "1 guess" if left == 1 else f"{left} guesses"
