"""The file of a run's rollouts becomes scored samples, and segments that can be compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.pairs import assistant, keys, user
from support.rollouts import rollout, turn
from support.words import word_tokenizer

from llmrl.data.comparisons import prepare_comparisons
from llmrl.data.segments import CONTEXT
from llmrl.errors import RefusedError
from llmrl.rewards.run_rollouts import scored_rows, segment_rows
from llmrl.rollout.trajectory import Rollout

SYSTEM = {"role": "system", "content": "likes two"}


def written(tmp_path: Path, *rollouts: Rollout, **beside: Any) -> Path:
    """Lines as `keep_rollouts` writes them."""
    file = tmp_path / "step_1.jsonl"
    lines = [{**one.record(word_tokenizer().decode), **beside} for one in rollouts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def said(text: str, reward: float | None, finish: str = "stop", turns: int = 1, **fields: Any) -> Rollout:
    words = {"messages": [SYSTEM, user("red blue"), assistant(text)], "opening": 2}
    return rollout([[7, 8, 9, 3]], [turn(2, 4, finish_reason=finish)] * turns, reward, **words, **fields)


def test_answers_become_scored_samples(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        said("one", 0.5, penalty=-0.25),
        said("six", 0.0, row=2),
        said("two", None, "length", end_state="truncated-length"),
        said("", None, turns=0, end_state="error-abort"),
        answer="1",
    )
    assert list(scored_rows(file)) == [
        {
            "row": 1, "answer": "1", "prompt": [SYSTEM, user("red blue")],
            "completions": [[assistant("one")], [assistant("two")]], "rewards": [0.25, None], "ended": [True, False],
        },
        {
            "row": 2, "answer": "1", "prompt": [SYSTEM, user("red blue")], "completions": [[assistant("six")]],
            "rewards": [0.0], "ended": [True],
        },
    ]  # fmt: skip


def test_without_a_chat_template_they_are_text(tmp_path: Path) -> None:
    plain = {"messages": [user("red blue"), assistant("one")], "opening": 1}
    again = {"messages": [user("red blue"), assistant("two")], "opening": 1}
    given = [rollout([[7, 8, 9, 3]], [turn(2, 4)], reward, **words) for reward, words in ((1.0, plain), (0.0, again))]
    file = written(tmp_path, *given)
    (row,) = scored_rows(file, as_text=True)
    assert (row["prompt"], row["completions"]) == ("red blue", ["one", "two"])
    (row,) = segment_rows(file, as_text=True)
    assert row["segments"][1] == {"prompt": "red blue", "completion": "two", "score": 0.0, "ends": True}


def test_what_is_no_single_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"step_1.jsonl, line 2: 2 turns.*--form segments"):
        list(scored_rows(written(tmp_path, said("one", 1.0), said("two", 1.0, turns=2))))
    file = written(tmp_path, said("one", 1.0))
    file.write_text(file.read_text() + '{"row": 1, "reward"')
    with pytest.raises(RefusedError, match=r"step_1.jsonl, line 2: no rollout as llmrl writes them now"):
        list(scored_rows(file))


# -- several turns -----------------------------------------------------------------------------------------------------

WON = [assistant("one"), user("likes two"), assistant("two")]
LOST = [assistant("cat"), user("likes two"), assistant("dog"), user("the cat sees")]


def episode(messages: list[dict[str, Any]], reward: float | None, finish: str = "stop", **fields: Any) -> Rollout:
    words = {"messages": [user("red dog"), *messages], "opening": 1}
    return rollout([[1, 2, 3, 4]], [turn(1, 2), turn(3, 4, finish_reason=finish)], reward, **words, **fields)


def test_episodes_are_compared_by_reward_and_only_their_turns_are_scored(tmp_path: Path) -> None:
    (row,) = segment_rows(written(tmp_path, episode(WON, 1.0), episode(LOST, 0.5, penalty=-0.75)))
    tokenizer = word_tokenizer()
    data = prepare_comparisons(keys(), tokenizer, lambda text: None, mode="dense", dataset=Dataset.from_list([row]))
    (found,) = data.train
    assert [segment["score"] for segment in row["segments"]] == [1.0, -0.25]
    own = [[token for token, of in zip(*piece, strict=True) if of != CONTEXT] for (piece,) in found["segments"]]
    assert [tokenizer.decode(ids) for ids in own] == ["one <|end|> two <|end|>", "cat <|end|> dog <|end|>"]


def test_a_turn_that_was_cut_off_gets_no_stop_token_and_what_has_no_reward_is_no_segment(tmp_path: Path) -> None:
    cut, broken = episode(WON, 0.0, finish="length"), episode(LOST, None)
    silent = episode([assistant(""), user("likes two"), assistant(" ")], 0.0)
    (row,) = segment_rows(written(tmp_path, episode(WON, 1.0), cut, broken, silent))
    assert [segment["ends"] for segment in row["segments"]] == [True, False]
    assert list(segment_rows(written(tmp_path, cut, broken))) == []
