"""Rollouts of several turns become segments that can be compared."""

from typing import Any

from datasets import Dataset
from support.pairs import assistant, keys, user
from support.words import word_tokenizer

from llmrl.data.comparisons import prepare_comparisons
from llmrl.data.segments import CONTEXT
from llmrl.rewards.scored_segments import segments_row
from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn


def rollout(said: list[dict[str, Any]], reward: float | None, finish: str = "stop", **changed: Any) -> Rollout:
    turns = [Turn(0, 1, 2, [-1.0], "stop", 0), Turn(0, 3, 4, [-1.0], finish, 0)]
    given: dict[str, Any] = {
        "row": 1, "sample": 0, "seed": 0, "pieces": [[1, 2, 3, 4]], "turns": turns,
        "messages": [user("red dog"), *said], "opening": 1, "end_state": "completed", "reward": reward,
    }  # fmt: skip
    return Rollout(**{**given, **changed})


WON = [assistant("one"), user("likes two"), assistant("two")]
LOST = [assistant("cat"), user("likes two"), assistant("dog"), user("the cat sees")]


def test_rollouts_are_compared_by_reward_and_only_their_turns_are_scored() -> None:
    group = RolloutGroup(1, {"prompt": "red dog", "level": 3}, [rollout(WON, 1.0), rollout(LOST, 0.5, penalty=-0.75)])
    row = segments_row(group)
    assert row is not None
    assert row["level"] == 3
    tokenizer = word_tokenizer()
    data = prepare_comparisons(keys(), tokenizer, lambda text: None, mode="dense", dataset=Dataset.from_list([row]))
    (found,) = data.train
    assert found["values"] == [1.0, -0.25]
    own = [
        [token for token, turn in zip(*piece, strict=True) if turn != CONTEXT]
        for (piece,) in found["segments"]
    ]  # fmt: skip
    assert [tokenizer.decode(ids) for ids in own] == ["one <|end|> two <|end|>", "cat <|end|> dog <|end|>"]


def test_a_turn_that_was_cut_off_gets_no_stop_token_and_what_has_no_reward_is_no_segment() -> None:
    cut, broken = rollout(WON, 0.0, finish="length"), rollout(LOST, None)
    row = segments_row(RolloutGroup(1, {}, [rollout(WON, 1.0), cut, broken]))
    assert row is not None
    assert [segment["ends"] for segment in row["segments"]] == [True, False]
    assert segments_row(RolloutGroup(1, {}, [cut, broken])) is None
