"""Scored samples from a model and from rollouts, read back as what was sampled."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pairs import assistant, keys, user
from support.recipe_run import ROOT, make_model
from support.rollouts import rollout, turn
from support.words import WORDS, word_tokenizer
from transformers import AutoModelForCausalLM

from llmrl.data.scored import prepare_scored
from llmrl.errors import RefusedError
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import completion
from llmrl.rewards.scored_samples import scored_row, scored_rows_of_run, write_rows
from llmrl.rollout.trajectory import Rollout, RolloutGroup

REWARD = "def words(completions, level, **columns):\n    return [None if l == 3 else float(l) for l in level]\n"


def sample(tmp_path: Path, *arguments: str) -> Path:
    """The file that recipes/compare/sample.py writes."""
    spec = importlib.util.spec_from_file_location("sample", ROOT / "recipes/compare/sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": " ".join(WORDS[i : i + 3]), "level": i} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "samples" / "scored.jsonl"
    given = {
        "model": make_model(tmp_path / "model"), "prompts": tmp_path / "prompts.jsonl", "output": output,
        "rewards": f"{tmp_path / 'reward.py'}:words", "samples_per_prompt": 3, "max_new_tokens": 6,
    }  # fmt: skip
    module.main([*(str(part) for key, value in given.items() for part in (f"--{key}", value)), *arguments])
    return output


def test_what_is_sampled_is_read_back_token_for_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = sample(tmp_path)
    assert "4 of 4 prompts, 12 samples" in capsys.readouterr().out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["rewards"] for row in rows] == [[0.0] * 3, [1.0] * 3, [2.0] * 3, [None] * 3]
    assert [row["level"] for row in rows] == [0, 1, 2, 3]
    with pytest.raises(RefusedError, match="row 4, column `rewards`: 0 of 3"):
        prepare_scored(keys(dataset_name=str(output)), word_tokenizer(), print)
    data = prepare_scored(keys(dataset_name=str(output)), word_tokenizer(), print, faulty_rows="drop")
    assert [row["completion_ids"] for row in data.train] == [row["completion_ids"] for row in rows[:3]]
    # The log-probabilities in the file are the learner's own, so prompts and samples are those that the model saw.
    learner = Learner(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), LearnerOptions(), say=lambda text: None)
    groups = [tuple(completion(row["prompt_ids"], ids) for ids in row["completion_ids"]) for row in data.train]
    for row, found in zip(data.train, learner.logprobs(groups), strict=True):
        for given, scored in zip(row["logprobs"], found, strict=True):
            assert np.allclose(given, scored, atol=1e-4)


def test_an_unreadable_prompt_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    rows = tmp_path / "other.jsonl"
    rows.write_text('{"prompt": "red", "level": 1}\n{"prompt": null, "level": 1}\n')
    with pytest.raises(RefusedError, match="row 2, column `prompt`: null"):
        sample(tmp_path, "--prompts", str(rows))
    assert list((tmp_path / "samples").iterdir()) == []


# -- rollouts ----------------------------------------------------------------------------------------------------------


def played(number: int, said: str, reward: float | None, turns: int = 1, **fields: Any) -> Rollout:
    spoken = [turn(2, 4, logprobs=[-0.5, -0.123456789])] * turns
    words = {"messages": [user("red blue"), assistant(said)], "opening": 1}
    return rollout([[7, 8, 9, 3]], spoken, reward, sample=number, **words, **fields)


def test_rollouts_of_a_prompt_are_a_row() -> None:
    cut = played(1, "two", None, end_state="truncated-length")
    broken = played(2, "", None, turns=0, end_state="error-abort")
    row = {"prompt": "red blue", "answer": "1", "rewards": "a column of that name gives way"}
    group = RolloutGroup(1, row, [played(0, "one", 0.5, penalty=-0.25), cut, broken])
    tokenizer = word_tokenizer()
    spoken = scored_row(group, tokenizer)
    assert spoken is not None
    assert (spoken["prompt"], spoken["completions"][0]) == ([user("red blue")], [assistant("one")])
    assert scored_row(RolloutGroup(1, row, [broken]), tokenizer) is None
    tokenizer.chat_template = None
    assert scored_row(group, tokenizer) == {
        "prompt": "red blue", "answer": "1", "completions": ["one", "two"], "rewards": [0.25, None],
        "completion_ids": [[9, 3], [9, 3]], "logprobs": [[-0.5, -0.123457]] * 2, "ended": [True, False],
    }  # fmt: skip


def test_several_turns_are_no_completion(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the rollouts of row 1: 2 turns"):
        scored_row(RolloutGroup(1, {}, [played(0, "one", 1.0, turns=2)]), word_tokenizer())


def test_a_runs_file_of_rollouts_becomes_rows(tmp_path: Path) -> None:
    file = tmp_path / "step_1.jsonl"
    rollouts = [
        played(0, "one", 1.0),
        played(1, "two", 0.0, end_state="truncated-length"),
        played(0, "six", 0, row=2),
    ]
    write_rows(file, (r.record(word_tokenizer().decode) for r in rollouts))
    source = [{"prompt": "red blue", "answer": "1"}, {"prompt": "green", "answer": "6"}]
    assert scored_rows_of_run(file, source) == [
        {
            "prompt": "red blue", "answer": "1", "completions": [[assistant("one")], [assistant("two")]],
            "rewards": [1.0, 0.0], "ended": [True, False],
        },
        {"prompt": "green", "answer": "6", "completions": [[assistant("six")]], "rewards": [0.0], "ended": [True]},
    ]  # fmt: skip
    with pytest.raises(RefusedError, match=r"step_1.jsonl, line 3: it answers row 2, but there are 1"):
        scored_rows_of_run(file, source[:1])
