"""Word problems with a calculator: the tool environment to try first, and to copy from.

Numbers are large enough that a small model needs the tool. The answer is right if the last number in the final message
equals it.
"""

from collections.abc import Iterator
from fractions import Fraction
from random import Random
from typing import Annotated, Any

from pydantic import Field

from llmrl.envs import arithmetic
from llmrl.envs.options import Options, checked, column
from llmrl.envs.protocol import EnvironmentKind, Message, Row, Split, StepResult
from llmrl.envs.splits import pick
from llmrl.envs.tools import ToolEnvironment
from llmrl.errors import RefusedError
from llmrl.numbers import last

NAME = "calculator"
STORIES = (
    ("A baker fills {a} trays with {b} rolls each and sells {c} of the rolls. How many rolls are left?", "{a}*{b}-{c}"),
    ("A school has {a} classes of {b} pupils and {c} teachers. How many people is that together?", "{a}*{b}+{c}"),
    ("A train has {a} seats and {b} people stand. At the next stop {c} more get on. How many travel then, if every "
     "seat is taken?", "{a}+{b}+{c}"),
    ("A shop orders {a} boxes of {b} pens and {c} boxes of {b} pencils. How many pens and pencils is that?",
     "({a}+{c})*{b}"),
    ("Each of {a} gardens has {b} rows of {c} tulips. How many tulips are there?", "{a}*{b}*{c}"),
    ("A library owns {a} shelves with {b} books each. Readers have borrowed {c} books. How many are in the house?",
     "{a}*{b}-{c}"),
)  # fmt: skip
ASK = "Use the calculator. End with the answer."


class CalculatorOptions(Options):
    largest: Annotated[int, Field(ge=4, le=1_000_000)] = 99
    """The numbers of a problem are from 2 to this."""
    max_calls: Annotated[int, Field(ge=0)] = 8
    """Calls of the calculator in one episode."""
    call_reward: float = 0.0
    """Given once, as the reward `called`, for the first call that the calculator could answer."""


class Calculator(ToolEnvironment):
    """Row: `prompt` (text) and `answer` (a number, or text that ends in one). Rewards: `correct`, 1 or 0; `called`."""

    def __init__(self, row: Row, seed: int, options: CalculatorOptions) -> None:
        super().__init__(row, seed)
        self._calls_left = options.max_calls
        self._call_reward = options.call_reward
        self._prompt = column(row, "prompt", str, NAME)
        answer = last(str(column(row, "answer", object, NAME)), apart=True)
        if answer is None:
            raise RefusedError(f"{NAME}: column `answer` holds {row['answer']!r:.80}, in which there is no number")
        self._right: Fraction = answer
        self._answered = 0

    def opening(self) -> list[Message]:
        return [{"role": "user", "content": self._prompt}]

    def judge(self, answer: str) -> dict[str, float]:
        return {"correct": float(last(answer, apart=True) == self._right)}

    async def step(self, message: Message) -> StepResult:
        before = self._answered
        result = await super().step(message)
        first = self._call_reward and before == 0 and self._answered > 0
        return result._replace(rewards={**result.rewards, "called": self._call_reward}) if first else result

    async def calculator(self, expression: str) -> str:
        """Compute the value of an arithmetic expression.

        Args:
            expression: Numbers joined by + - * / ^ and parentheses, such as (12 + 5) * 3
        """
        value = arithmetic.shown(arithmetic.evaluate(expression))
        self._answered += 1
        return value


def load(options: dict[str, Any]) -> EnvironmentKind:
    """Brings its own rows: stories and numbers, by seed."""
    own = checked(CalculatorOptions, options, NAME)
    return EnvironmentKind(
        lambda row, seed: Calculator(row, seed, own), lambda *which: _rows(own, *which), multi_turn=own.max_calls > 0
    )


def _rows(options: CalculatorOptions, split: Split, count: int, seed: int) -> list[Row]:
    random = Random(seed)

    def candidates() -> Iterator[tuple[str, Row]]:
        for _ in range(1000 + 20 * count):
            story = random.randrange(len(STORIES))
            a, b, c = (random.randint(2, options.largest) for _ in range(3))
            question, solution = (text.format(a=a, b=b, c=c) for text in STORIES[story])
            answer = arithmetic.evaluate(solution)
            if answer > 0:
                yield f"{NAME}/{story}/{a}/{b}/{c}", {"prompt": f"{question} {ASK}", "answer": arithmetic.shown(answer)}

    return pick(candidates(), split, count, f"{NAME} with environment_options.largest {options.largest}")
