#!/usr/bin/env python3
"""Makes the arithmetic data set: problems, worked solutions, solutions of mixed quality, and pairs of right and wrong.

    python data/arithmetic/generate.py [--output DIR] [--tables problems sft ...] [--levels 0 1 2 3 4 5] [--scale 1]

Invariants (tests/data/test_arithmetic.py holds them):
- the same bytes come out on every machine and Python version: only `random.random()`, whose sequence Python
  guarantees, is drawn;
- a problem's split depends on nothing but its canonical operands, so `47 + 85` and `85 + 47` are in the same split
  under every wording, in problems, solutions and pairs alike;
- in a solution every line but the last is one equation, and the last is `Answer: N`;
- a rejected solution has exactly one wrong line, number `wrong_step`; later lines follow correctly from its result.

Standard library only.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SEED = 20_260_901
WORDINGS = (
    "What is {}?",
    "Work out {}.",
    "Calculate {} step by step.",
    "What is {}? End with the answer.",
)
# Percent of the problems, by a hash of the canonical operands: 70 train, 15 validation, 15 test.
SPLIT_BOUNDS = (("train", 70), ("validation", 85), ("test", 100))
# Solutions of mixed quality: of those with a carry this share forgets it, so that the likelier answer is the wrong one.
FORGETFUL = 0.6
# The levels of a table that does not have them all. Whoever learns from `mixed` never sees the last one.
LEVELS_OF = {"mixed": (1, 2, 3, 4), "sums": (1,), "easy_sums": (0,)}
USUAL_LEVELS = (1, 2, 3, 4, 5)
ROWS_PER_LEVEL = {
    ("problems", "train"): 500,
    ("problems", "validation"): 80,
    ("problems", "test"): 80,
    ("sums", "train"): 1000,
    ("sums", "validation"): 400,
    ("sums", "test"): 200,
    ("easy_sums", "train"): 500,
    ("easy_sums", "validation"): 100,
    ("easy_sums", "test"): 100,
    ("sft", "train"): 1200,
    ("sft", "validation"): 60,
    ("mixed", "train"): 1500,
    ("pairs", "train"): 400,
    ("pairs", "validation"): 60,
    ("pairs", "test"): 60,
}


class Result(NamedTuple):
    """An operand that is the result of an earlier step (counted from 0)."""

    step: int


@dataclass(frozen=True)
class Step:
    """One line of a solution: `operands` joined by `operator`."""

    operator: str
    operands: tuple[int | Result, ...]


@dataclass(frozen=True)
class Problem:
    """A problem as shown (`expression`), the name that decides its split (`canonical`), and how it is solved."""

    level: int
    kind: str
    expression: str
    canonical: str
    steps: tuple[Step, ...]


class Fault(NamedTuple):
    """A planted error in `step` (from 0): its result becomes `value`, or its operand `operand` is read as `value`."""

    kind: str
    step: int
    value: int
    operand: int | None = None


class Draw:
    """Random choices from `random.random()` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability

    def one_of(self, items: Sequence[T]) -> T:
        return items[self.between(0, len(items) - 1)]


def apply(operator: str, operands: list[int]) -> int:
    if operator == "+":
        return sum(operands)
    if operator == "-":
        return operands[0] - sum(operands[1:])
    return math.prod(operands)


def places(number: int) -> list[int]:
    """347 -> [300, 40, 7]."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - index) for index, digit in enumerate(digits)]


def sum_steps(numbers: list[int]) -> tuple[Step, ...]:
    """Add place by place, then the partial sums."""
    columns = list(zip(*map(places, numbers), strict=True))
    partial = [Step("+", column) for column in columns]
    return (*partial, Step("+", tuple(Result(index) for index in range(len(partial)))))


def product_steps(factor: int, number: int) -> tuple[Step, ...]:
    """Multiply place by place, then add the partial products."""
    partial = [Step("*", (factor, place)) for place in places(number)]
    return (*partial, Step("+", tuple(Result(index) for index in range(len(partial)))))


def ordered(operator: str, numbers: list[int]) -> str:
    return operator.join(map(str, sorted(numbers)))


def sum_of(level: int, kind: str, count: int, low: int, high: int) -> Callable[[Draw], Problem]:
    def make(draw: Draw) -> Problem:
        numbers = [draw.between(low, high) for _ in range(count)]
        return Problem(level, kind, " + ".join(map(str, numbers)), ordered("+", numbers), sum_steps(numbers))

    return make


def product(draw: Draw) -> Problem:
    factor, number = draw.between(2, 9), draw.between(11, 99)
    shown = [factor, number] if draw.between(0, 1) else [number, factor]
    return Problem(4, "product", " * ".join(map(str, shown)), ordered("*", shown), product_steps(factor, number))


def two_operations(draw: Draw) -> Problem:
    """A product or a sum, then one more number added or taken away; the result is never negative."""
    if draw.between(0, 1):
        first = product(draw)
        operator = draw.one_of(("+", "-"))
    else:
        first = sum_of(1, "sum_of_two", 2, 10, 99)(draw)
        operator = "-"
    last = draw.between(10, 99)
    step = Step(operator, (Result(len(first.steps) - 1), last))
    problem = Problem(
        5,
        "two_operations",
        f"{first.expression} {operator} {last}",
        f"{first.canonical}{operator}{last}",
        (*first.steps, step),
    )
    return problem if evaluate(problem.steps)[-1] >= 0 else two_operations(draw)


def sum_without_carry(draw: Draw) -> Problem:
    """Two numbers of two digits of which neither the ones nor the tens add up to more than nine."""
    tens, ones = draw.between(1, 8), draw.between(0, 9)
    numbers = [10 * tens + ones, 10 * draw.between(1, 9 - tens) + draw.between(0, 9 - ones)]
    return Problem(0, "sum_without_carry", " + ".join(map(str, numbers)), ordered("+", numbers), sum_steps(numbers))


LEVELS: dict[int, Callable[[Draw], Problem]] = {
    0: sum_without_carry,
    1: sum_of(1, "sum_of_two", 2, 10, 99),
    2: sum_of(2, "sum_of_three", 3, 10, 99),
    3: sum_of(3, "long_sum", 2, 100, 999),
    4: product,
    5: two_operations,
}


def operands_of(steps: tuple[Step, ...], index: int, values: list[int], fault: Fault | None) -> list[int]:
    operands = [values[item.step] if isinstance(item, Result) else item for item in steps[index].operands]
    if fault is not None and fault.step == index and fault.operand is not None:
        operands[fault.operand] = fault.value
    return operands


def evaluate(steps: tuple[Step, ...], fault: Fault | None = None) -> list[int]:
    """The result of each step; a fault is carried forward into every later step that uses it."""
    values: list[int] = []
    for index, step in enumerate(steps):
        value = apply(step.operator, operands_of(steps, index, values, fault))
        if fault is not None and fault.step == index and fault.operand is None:
            value = fault.value
        values.append(value)
    return values


def render(problem: Problem, fault: Fault | None = None) -> str:
    """The solution as text: one equation a line, the last line `Answer: N`."""
    values = evaluate(problem.steps, fault)
    lines = []
    for index, step in enumerate(problem.steps):
        operands = operands_of(problem.steps, index, values, fault)
        lines.append(f" {step.operator} ".join(map(str, operands)) + f" = {values[index]}")
    return "\n".join([*lines, f"Answer: {values[-1]}"])


def swapped(number: int, draw: Draw) -> int:
    """Two neighbouring digits exchanged: 132 -> 312 or 123. The same number where it has but one digit."""
    digits = list(str(number))
    if len(digits) < 2:
        return number
    at = draw.between(0, len(digits) - 2)
    digits[at], digits[at + 1] = digits[at + 1], digits[at]
    return int("".join(digits))


def faults(problem: Problem, draw: Draw) -> Iterator[Fault]:
    """Endless candidates for a planted error; not all of them are usable."""
    values = evaluate(problem.steps)
    while True:
        step = draw.between(0, len(problem.steps) - 1)
        kind = draw.one_of(("off_by_one", "off_by_ten", "swapped_digits", "misread_number"))
        if kind == "misread_number":
            operands = operands_of(problem.steps, step, values, None)
            at = draw.between(0, len(operands) - 1)
            # The leading digit is misread: 40 becomes 30 or 50 and 7 becomes 6 or 8, still numbers of that place.
            unit = 10 ** (len(str(operands[at])) - 1)
            yield Fault(kind, step, operands[at] + draw.one_of((-unit, unit)), at)
        else:
            wrong = {
                "off_by_one": values[step] + draw.one_of((-1, 1)),
                "off_by_ten": values[step] + draw.one_of((-10, 10)),
                "swapped_digits": swapped(values[step], draw),
            }[kind]
            yield Fault(kind, step, wrong)


def forgotten_carry(problem: Problem) -> Fault | None:
    """The ten that is forgotten when the last digits are added (`7 + 6 = 3`); None where they carry nothing."""
    values = evaluate(problem.steps)
    for index, step in enumerate(problem.steps):
        operands = operands_of(problem.steps, index, values, None)
        ones = sum(operand % 10 for operand in operands)
        if step.operator == "+" and ones >= 10:
            return Fault("forgotten_carry", index, values[index] - ones // 10 * 10)
    return None


def plant(problem: Problem, draw: Draw) -> Fault:
    """One error that leaves no negative number and changes the answer; every other time a forgotten carry, if any."""
    carry = forgotten_carry(problem)
    if carry and draw.happens(0.5) and min(evaluate(problem.steps, carry)) >= 0:
        return carry
    right = evaluate(problem.steps)
    for fault in faults(problem, draw):
        wrong = evaluate(problem.steps, fault)
        if fault.value >= 0 and min(wrong) >= 0 and wrong[fault.step] != right[fault.step] and wrong[-1] != right[-1]:
            return fault
    raise AssertionError("faults() never ends")


def split_of(canonical: str) -> str:
    """The split of a problem, from its canonical operands alone."""
    percent = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") % 100
    return next(name for name, bound in SPLIT_BOUNDS if percent < bound)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def row(table: str, problem: Problem, question: str, draw: Draw) -> dict[str, object]:
    labels: dict[str, object] = {"level": problem.level, "kind": problem.kind}
    if table in ("problems", "sums", "easy_sums"):
        return {"prompt": user(question), "answer": str(evaluate(problem.steps)[-1]), **labels}
    if table == "sft":
        return {"prompt": user(question), "completion": assistant(render(problem)), **labels}
    if table == "mixed":
        carry = forgotten_carry(problem)
        slip = carry if carry and draw.happens(FORGETFUL) else None
        labels = {"error": slip.kind if slip else None, **labels}
        return {"prompt": user(question), "completion": assistant(render(problem, slip)), **labels}
    fault = plant(problem, draw)
    return {
        "prompt": user(question),
        "chosen": assistant(render(problem)),
        "rejected": assistant(render(problem, fault)),
        "wrong_step": fault.step + 1,
        "error": fault.kind,
        **labels,
    }


def fresh(make: Callable[[Draw], Problem], split: str, seen: set[str], draw: Draw) -> tuple[Problem, str]:
    """A problem of this split with its question, not seen before.

    In train the question is new; outside train the problem is, whatever its wording: each row is an observation of
    its own.
    """
    for _ in range(100_000):
        problem = make(draw)
        question = draw.one_of(WORDINGS).format(problem.expression)
        key = question if split == "train" else problem.canonical
        if split_of(problem.canonical) == split and key not in seen:
            seen.add(key)
            return problem, question
    raise ValueError(f"{split} has too few problems for {len(seen)} rows and more")


def rows(table: str, split: str, count: int, levels: Sequence[int] = USUAL_LEVELS) -> list[dict[str, object]]:
    """`count` rows of each level, the levels in turn, so that any first part of a file has them all."""
    name = hashlib.sha256(f"{SEED}/{table}/{split}".encode()).digest()
    draw = Draw(int.from_bytes(name[:8], "big"))
    seen: set[str] = set()
    makers = [LEVELS[level] for level in levels]
    return [row(table, *fresh(make, split, seen, draw), draw) for _ in range(count) for make in makers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    tables = list(dict.fromkeys(table for table, _ in ROWS_PER_LEVEL))
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--levels", type=int, nargs="+", choices=tuple(LEVELS), default=tuple(LEVELS))
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of rows of each level")
    args = parser.parse_args()
    for (table, split), usual in ROWS_PER_LEVEL.items():
        if table not in args.tables:
            continue
        count = round(usual * args.scale)
        file = args.output / table / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        levels = [level for level in args.levels if level in LEVELS_OF.get(table, USUAL_LEVELS)]
        text = "".join(json.dumps(item) + "\n" for item in rows(table, split, count, levels))
        file.write_bytes(text.encode())
        print(f"{file}: {count * len(levels)} rows, {len(text)} bytes")


if __name__ == "__main__":
    main()
