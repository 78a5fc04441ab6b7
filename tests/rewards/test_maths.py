"""Equality of answers: at sight, by child processes, and on real solutions."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrl.rewards.maths import equal_at_sight, verified
from llmrl.rewards.texts import final_answer
from llmrl.rewards.verifiers import Verifiers


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifiers]:
    made = Verifiers(processes=2, seconds=20.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("gold", "answer", "decided"),
    [
        ("12", "12", True),
        ("1,234", "1234", True),
        ("12", "12.00", True),
        ("0.5", r"\dfrac{1}{2}", True),
        ("1/2", r"\frac{2}{4}", True),
        (r"-\frac{3}{4}", "\u22123/4", True),
        (r"\left(1, \frac{\pi}{2}\right)", r"(1,\!\tfrac{\pi}{2})", True),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        ("12", "13", False),
        ("1/3", "2/3", False),
        ("1/3", "0.333333", None),
        ("0.5", "0.6", None),
        ("x", "y", None),
        ("12", "12 apples", None),
        (r"\leftarrow", r"\rightarrow", None),
        ("1/0", "1", None),
        ("9" * 200, "8" * 200, None),
    ],
)
def test_at_sight(gold: str, answer: str, decided: bool | None) -> None:
    assert equal_at_sight(gold, answer) is decided
    assert equal_at_sight(answer, gold) is decided


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        (r"\frac{1}{3}", r"\boxed{\frac{2}{6}}", 1.0),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
        (r"\frac{\sqrt{2}}{2}", r"The answer is $\frac{1}{\sqrt{2}}$.", 1.0),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1.0),
        ("5", r"\boxed{x = 5}", 1.0),
        ("18", "She makes $18 a day.\n#### $18.", 1.0),
        ("Steps: 5 + 13 = 18\n#### 18", "Answer: 18", 1.0),
        (r"Hence \boxed{\pi}", r"\boxed{2\pi}", 0.0),
        ("7", r"\boxed{8}", 0.0),
        ("7", "It is 7", 0.0),
        ("7", "", 0.0),
        ("7", r"\boxed{\frac{}", 0.0),
        ("7", r"\boxed{__import__('os').abort()}", 0.0),
        ("7", r"\boxed{" + "7+0+" * 1000 + "0}", 0.0),
        ("", r"\boxed{7}", None),
    ],
)
def test_verified(pool: Verifiers, gold: str, text: str, score: float | None) -> None:
    assert asyncio.run(verified(pool, gold, text)).value == score


def test_no_child_is_needed_for_what_is_plain() -> None:
    pool = Verifiers()
    assert asyncio.run(verified(pool, "12", "Answer: 12")).value == 1.0
    assert asyncio.run(verified(pool, "12", "Answer: 13")).value == 0.0
    assert (pool.pids, pool.counts.started) == ([], 0)
    pool.close()


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


async def scores(pool: Verifiers, pairs: list[tuple[str, str]]) -> list[float | None]:
    return [a.value for a in await asyncio.gather(*(verified(pool, gold, text) for gold, text in pairs))]


def test_real_solutions_verify_against_their_answers(pool: Verifiers, shared_data: Path) -> None:
    maths = rows(shared_data / "math" / "math500_a.jsonl")
    assert set(asyncio.run(scores(pool, [(row["answer"], row["solution"]) for row in maths]))) == {1.0}
    school = rows(shared_data / "gsm8k" / "test_a.jsonl")
    assert set(asyncio.run(scores(pool, [(row["answer"], row["answer"]) for row in school]))) == {1.0}


def test_math_verify_can_read_real_answers_and_agrees_with_what_is_decided_at_sight(
    pool: Verifiers, shared_data: Path
) -> None:
    golds = [row["answer"] for row in rows(shared_data / "math" / "math500_a.jsonl")]
    shuffled = golds[1:] + golds[:1]

    async def by_child(pairs: list[tuple[str, str]]) -> list[float | None]:
        found = await asyncio.gather(*(pool.ask("equal", gold=gold, answer=answer) for gold, answer in pairs))
        return [answer.value for answer in found]

    assert set(asyncio.run(by_child(list(zip(golds, golds, strict=True))))) == {1.0}
    pairs = list(zip(golds, shuffled, strict=True))
    for pair, score in zip(pairs, asyncio.run(by_child(pairs)), strict=True):
        assert score is not None, pair
        assert equal_at_sight(*pair) in (None, bool(score)), pair


@pytest.mark.slow
def test_model_solutions_are_judged_as_their_authors_judged_them(pool: Verifiers, shared_data: Path) -> None:
    pairs, labels = [], []
    for row in rows(shared_data / "gsm8k" / "model_solutions_a.jsonl"):
        for solution in (value for value in row.values() if isinstance(value, dict)):
            pairs.append(tuple(t.replace("\nA: ", "\n#### ") for t in (row["ground_truth"], solution["solution"])))
            labels.append(float(solution["is_correct"]))
    assert all(final_answer(gold) for gold, _ in pairs)
    assert asyncio.run(scores(pool, pairs)) == labels
    assert len(labels) == 2636
