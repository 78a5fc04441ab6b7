"""Rows of several calls in one forward pass of a reward model."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_tiny_model
from support.words import word_tokenizer
from transformers import AutoModelForSequenceClassification

from llmrl.rewards.batches import Batches
from llmrl.rewards.keys import RewardKeys
from llmrl.rewards.scoring import Scorer


class Counted:
    """Scores a row of ids by their sum; remembers the sizes of its batches. A row with a 13 breaks it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def tokenize(self, prompts: Any, completions: Any) -> list[list[int] | None]:
        if "no template" in prompts:
            raise ValueError("no template for this")
        return [None if not said else [len(prompt), *map(int, said)] for prompt, said in zip(prompts, completions)]  # noqa: B905

    def score(self, sequences: list[list[int]]) -> list[float]:
        self.sizes.append(len(sequences))
        if any(13 in ids for ids in sequences):
            raise RuntimeError("13 is out of range")
        return [float(sum(ids)) for ids in sequences]


def batches(counted: Counted, rows: int, wait_seconds: float) -> Batches:
    return Batches(counted.tokenize, counted.score, rows, wait_seconds)


async def all_of(made: Batches, calls: list[tuple[list[str], list[Any]]]) -> list[Any]:
    return await asyncio.gather(*(made.scores(*call) for call in calls), return_exceptions=True)


def test_calls_of_one_row_are_scored_together_and_each_gets_its_own_scores() -> None:
    counted = Counted()
    calls = [(["ab"], [[i]]) for i in range(8)]
    assert asyncio.run(all_of(batches(counted, 8, 30.0), calls)) == [[2.0 + i] for i in range(8)]
    assert counted.sizes == [8]


def test_a_batch_that_does_not_fill_waits_no_longer_than_it_may() -> None:
    counted = Counted()
    found = asyncio.run(all_of(batches(counted, 100, 0.2), [(["a"] * 3, [[1], [], [2]]), (["a"], [[5]])]))
    assert found == [[2.0, None, 3.0], [6.0]]  # a row without ids has no score and takes no room
    assert counted.sizes == [3]


def test_without_waiting_calls_stay_apart() -> None:
    counted = Counted()
    asyncio.run(all_of(batches(counted, 8, 0), [(["a"] * 3, [[1]] * 3) for _ in range(3)]))
    assert counted.sizes == [3, 3, 3]


def test_an_error_reaches_the_call_whose_it_is() -> None:
    counted = Counted()
    calls = [(["a"], [[1]]), (["a"], [[13]]), (["no template"], [[1]]), (["a"], [[2]])]
    first, bad, untold, last = asyncio.run(all_of(batches(counted, 4, 5.0), calls))
    assert (first, last) == ([2.0], [3.0])
    assert "13 is out of range" in str(bad)
    assert "no template" in str(untold)


def test_a_call_that_was_given_up_disturbs_nobody() -> None:
    counted = Counted()
    made = batches(counted, 2, 5.0)

    async def run() -> Any:
        given_up = asyncio.ensure_future(made.scores(["a"], [[1]]))
        await asyncio.sleep(0.05)
        given_up.cancel()
        return await all_of(made, [(["a"], [[2]])])

    assert asyncio.run(run()) == [[3.0]]


def test_the_event_loop_goes_on_while_a_model_computes_and_no_thread_is_left() -> None:
    counted = Counted()
    going, told = threading.Event(), threading.Event()

    def score(sequences: list[list[int]]) -> list[float]:
        going.set()
        assert told.wait(30)
        return [0.0] * len(sequences)

    async def run(made: Batches) -> Any:
        scores = asyncio.ensure_future(made.scores(["a"], [[1]]))
        while not going.is_set():
            await asyncio.sleep(0.01)
        told.set()  # by the loop, which is not held up
        return await scores

    made = Batches(counted.tokenize, score, 4, 0.0)
    assert asyncio.run(run(made)) == [0.0]
    (thread,) = made._thread._threads
    del made
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    make_tiny_model(eos_token_id=2).save_pretrained(folder / "base")
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1).save_pretrained(folder / "final")
    word_tokenizer().save_pretrained(folder / "final")
    return str(folder / "final")


@pytest.fixture
def scorer(classifier: str) -> Iterator[Callable[..., Scorer]]:
    made: list[Scorer] = []

    def make(**options: Any) -> Scorer:
        entry = {"function": classifier, "name": "liked", "options": options}
        made.append(Scorer(RewardKeys.model_validate({"rewards": [entry]}), lambda said: None))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_reward_model_gives_the_same_scores_to_rows_of_many_groups_as_one_by_one(
    scorer: Callable[..., Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["red", "the cat sees a dog", "one two", "blue", "two two two", "cat", "dog"]
    sizes: list[int] = []
    from llmrl.rewards import classifier as module

    score = module.score

    def noted(model: Any, rows: Any, *rest: Any) -> torch.Tensor:
        sizes.append(len(rows))
        return score(model, rows, *rest)

    monkeypatch.setattr(module, "score", noted)

    async def of(made: Scorer) -> list[float | None]:
        groups = (made.score(["red cat"], [text], [[1]], {}) for text in said)
        return [value for scores in await asyncio.gather(*groups) for value in scores.totals_S]

    alone = asyncio.run(of(scorer()))
    assert sizes == [1] * len(said)
    sizes.clear()
    together = asyncio.run(of(scorer(batch_size=4, wait_seconds=0.5)))
    assert sizes[0] >= 4
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == len(said)


def test_a_reward_model_reads_the_dialogue_where_other_functions_get_text(
    scorer: Callable[..., Scorer], tmp_path: Path
) -> None:
    made = scorer()
    dialogue = ([{"role": "user", "content": "red cat"}], [{"role": "assistant", "content": "dog"}])

    def total(**settings: Any) -> float | None:
        return asyncio.run(made.score(["red cat"], ["dog"], [[1]], {}, **settings)).totals_S[0]

    as_dialogue = asyncio.run(made.score([dialogue[0]], [dialogue[1]], [[1]], {})).totals_S[0]
    assert total(dialogues=[dialogue]) == as_dialogue != total()
