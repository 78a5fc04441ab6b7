"""Scored samples of an engine whose answers are written down (a real one: tests/evaluation/test_sampling.py)."""

from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset
from support.words import word_tokenizer

from llmrl.data.splits import whole
from llmrl.errors import RefusedError
from llmrl.rewards.keys import RewardKeys
from llmrl.rewards.scored_samples import PROMPTS_AT_ONCE, Asked, ScoringTally, asked, sample_scored
from llmrl.rewards.scoring import Scorer
from llmrl.rollout.protocol import Completion, SamplingParams

ROWS = [{"prompt": "red", "answer": "1", "rewards": "a column of that name gives way"}] * (3 * PROMPTS_AT_ONCE)


class Written:
    """Says `cat <|end|>`, and `dog` without an end, to every prompt; remembers the seeds."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.ids = [word_tokenizer().encode(text, add_special_tokens=False) for text in ("cat <|end|>", "dog")]

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        self.seeds.append(sampling.seed)
        said, cut = self.ids
        samples = [Completion(said, [-0.123456789, 1e-9], "stop", 0), Completion(cut, [-1.0], "length", 0)]
        return [samples for _ in prompt_ids]


def questions(rows: list[dict[str, Any]], template: bool = True) -> Asked:
    tokenizer = word_tokenizer()
    if not template:
        tokenizer.chat_template = None
    return asked(whole(Dataset.from_list(rows), "the rows"), tokenizer)


def test_samples_come_as_they_are_drawn_and_each_call_has_random_numbers_of_its_own() -> None:
    engine, tally = Written(), ScoringTally()
    scorer = Scorer(RewardKeys(rewards=["correct_number"]), print)
    rows = sample_scored(engine, word_tokenizer(), questions(ROWS), SamplingParams(8, n=2), scorer, tally)
    first = next(rows)
    assert len(engine.seeds) == 1, "whoever stops taking rows pays for no further sample"
    said = [[{"role": "assistant", "content": text}] for text in ("cat", "dog")]
    assert first == {
        "prompt": [{"role": "user", "content": "red"}], "answer": "1", "completions": said, "rewards": [0.0, 0.0],
        "completion_ids": engine.ids, "logprobs": [[-0.123457, 0.0], [-1.0]], "ended": [True, False],
    }  # fmt: skip
    assert len(list(rows)) == len(ROWS) - 1
    assert len(set(engine.seeds)) == 3
    assert tally == ScoringTally(prompts=len(ROWS), samples=2 * len(ROWS), scored=2 * len(ROWS), cut_off=len(ROWS))


def test_prompts_are_asked_as_they_will_be_trained_on() -> None:
    spoken, plain = questions(ROWS[:1]), questions(ROWS[:1], template=False)
    assert word_tokenizer().decode(spoken.prompt_ids[0]) == "<|start|> user red <|end|> <|start|> assistant"
    assert (plain.prompts, word_tokenizer().decode(plain.prompt_ids[0])) == (["red"], "red")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": None}, "the rows, row 2, column `prompt`: null"),
        ({"prompt": " "}, "the rows, row 2, column `prompt`: empty"),
        ({"prompt": "red", "chat_template_kwargs": "["}, "row 2, column `chat_template_kwargs`"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named(row: dict[str, Any], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        questions([{"prompt": "red", "chat_template_kwargs": None}, row])
    with pytest.raises(RefusedError, match="no column `prompt`"):
        questions([{"question": "red"}])
