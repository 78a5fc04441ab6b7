"""Pairs from a model's own samples, with an engine whose samples are written down."""

from collections.abc import Sequence
from typing import Any

from llmrl.rewards.own_pairs import PROBLEMS_AT_ONCE, SamplingTally, own_pairs
from llmrl.rollout.protocol import Completion, SamplingParams

SAMPLING = SamplingParams(max_tokens=8, n=4)


class Written:
    """Gives each prompt the texts that are listed under its first token, and remembers the seeds."""

    def __init__(self, texts: dict[int, list[tuple[str, str]]]) -> None:
        self.texts, self.seeds = texts, list[int]()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        self.seeds.append(sampling.seed)
        return [
            [Completion([ord(c) for c in text], [0.0] * len(text), reason, 0) for text, reason in self.texts[ids[0]]]
            for ids in prompt_ids
        ]


class Letters:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def problem(number: int, answer: str) -> dict[str, Any]:
    return {"prompt_ids": [number], "answer": answer, "messages": [{"role": "user", "content": f"problem {number}"}]}


def pairs_of(engine: Written, problems: list[dict[str, Any]], each: int, tally: SamplingTally) -> list[tuple[str, str]]:
    rows = own_pairs(engine, Letters(), problems, SAMPLING, each, tally)
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_a_right_answer_is_used_again_and_a_wrong_one_is_not() -> None:
    engine = Written({1: [("so 4", "stop"), ("so 5", "stop"), ("so 5", "stop"), ("so 6", "stop")]})
    tally = SamplingTally()
    assert pairs_of(engine, [problem(1, "4")], 3, tally) == [("so 4", "so 5"), ("so 4", "so 6")]
    assert tally == SamplingTally(problems=1, samples=4, right=1, mixed=1, pairs=2)


def test_right_answers_take_turns_and_no_problem_gives_more_than_asked() -> None:
    engine = Written({1: [("4", "stop"), ("it is 4", "stop"), ("5", "stop"), ("6", "stop")]})
    assert pairs_of(engine, [problem(1, "4")], 3, SamplingTally()) == [("4", "5"), ("it is 4", "6")]
    assert pairs_of(engine, [problem(1, "4")], 1, SamplingTally()) == [("4", "5")]


def test_only_samples_that_ended_by_themselves_and_problems_with_both_kinds() -> None:
    engine = Written(
        {
            1: [("4", "stop"), ("5", "length")],
            2: [("4", "length"), ("5", "stop")],
            3: [("4", "stop"), ("4", "stop")],
            4: [("4", "stop"), (" ", "stop")],
        }
    )
    tally = SamplingTally()
    assert pairs_of(engine, [problem(i, "4") for i in (1, 2, 3, 4)], 2, tally) == []
    assert (tally.samples, tally.right, tally.mixed) == (8, 5, 0)


def test_pairs_come_as_they_are_made() -> None:
    """Whoever stops taking pairs pays for no further sample."""
    texts = {i: [("4", "stop"), ("5", "stop")] for i in range(3 * PROBLEMS_AT_ONCE)}
    engine = Written(texts)
    rows = own_pairs(engine, Letters(), [problem(i, "4") for i in texts], SAMPLING, 1, SamplingTally())
    assert next(rows)["prompt"] == [{"role": "user", "content": "problem 0"}]
    assert len(engine.seeds) == 1
    list(rows)
    assert len(set(engine.seeds)) == 3, "each call draws with random numbers of its own"
