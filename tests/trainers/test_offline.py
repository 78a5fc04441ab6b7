"""What loops on fixed groups share: which rows a step sees, the reference, held-out groups, steps, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.forked import signalled
from support.recipe_run import run_method, write_config

from llmrl.config.parse import parse
from llmrl.data.preferences import prepare_preferences
from llmrl.errors import RefusedError
from llmrl.learner.sequences import Floats, Group
from llmrl.objectives.dpo import DPO
from llmrl.runs import Run
from llmrl.trainers import dpo
from llmrl.trainers.offline.config import describe_groups
from llmrl.trainers.offline.run import OfflineRun, num_steps, pair, prepared


def config_of(tmp: Path, **settings: Any) -> dpo.DPOConfig:
    return parse(dpo.DPOConfig, ["--config", str(write_config(tmp, **settings))]).config


def opened(config: dpo.DPOConfig) -> OfflineRun:
    run = Run.open(config)
    tokenizer, data = prepared(config, prepare_preferences, run.note)
    return OfflineRun(config, run, tokenizer, data, config.pairs_per_step)


def count(groups: list[Group], logprobs: list[list[Floats]]) -> dict[str, float]:
    carried = [s.reference_logprobs is not None for group in groups for s in group]
    return {"n": float(len(logprobs)), "with_reference": float(all(carried))}


@pytest.mark.parametrize("settings", [{}, {"use_peft": True}], ids=["precomputed", "adapter_off"])
def test_log_ratios_start_at_exactly_zero_in_every_epoch(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The rows of a first epoch come again in other company: no step may see another reference than the policy."""
    config = config_of(tmp_path, learning_rate=1e-30, max_steps=16, **settings)
    offline = opened(config)
    offline.prepare(pair, {"counted": count})
    first = offline.learner.update(offline.groups(0), DPO().objective())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == 0.0
    again = offline.learner.update(offline.groups(15), DPO().objective())
    assert again["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    carries = all(s.reference_logprobs is not None for group in offline.groups(15) for s in group)
    assert carries == (not settings)  # with an adapter it is made on the way
    assert offline.evaluate() == {"counted": {"n": 6.0, "with_reference": 1.0}}


def test_a_method_without_a_reference_scores_none(tmp_path: Path) -> None:
    offline = opened(config_of(tmp_path))
    offline.learner.logprobs = None  # type: ignore[method-assign,assignment]
    offline.prepare(pair, {"counted": count}, reference=False)
    del offline.learner.logprobs
    assert offline.groups(0)[0][0].reference_logprobs is None
    assert offline.evaluate()["counted"] == {"n": 6.0, "with_reference": 0.0}


def test_only_the_rows_that_are_used_are_scored_each_once(tmp_path: Path) -> None:
    offline = opened(config_of(tmp_path, max_steps=3))
    offline.prepare(pair, {})
    known = offline.scored_rows(range(3))
    assert sorted(known) == sorted({row for step in range(3) for row in offline.rows(step)})
    assert len(known) == 12
    for group, row in zip(offline.groups(1), offline.rows(1), strict=True):
        for sequence, logprobs in zip(group, known[row], strict=True):
            np.testing.assert_array_equal(sequence.reference_logprobs, logprobs)


@pytest.mark.parametrize(("steps", "epochs", "expected"), [(7, 1.0, 7), (-1, 1.0, 14), (-1, 2.5, 34), (-1, 0.1, 2)])
def test_steps_are_given_or_as_many_as_the_epochs_need(
    tmp_path: Path, steps: int, epochs: float, expected: int
) -> None:
    config = config_of(tmp_path, max_steps=steps, num_train_epochs=epochs)
    assert num_steps(config, config.pairs_per_step, 54) == expected


def test_the_arithmetic_names_groups_and_refuses_idle_processes(tmp_path: Path) -> None:
    config = config_of(tmp_path, max_steps=3)
    told = describe_groups(config, 2, 8, "prompts", "8 x 4 samples")
    assert told["prompts per step"] == "8 in all, about 4 a process"
    assert told["optimizer steps"] == "3, 24 prompts"
    assert told["sequences per step"] == "8 x 4 samples"
    with pytest.raises(RefusedError, match="prompts_per_step 2 over 4 processes leaves some without a prompt"):
        describe_groups(config, 4, 2, "prompts")


def test_check_says_what_there_is_to_train_on(tmp_path: Path) -> None:
    said = dpo.check(config_of(tmp_path, max_steps=-1))
    assert "54 pairs to train on, 6 held out; 14 optimizer steps" in said


def test_a_resumed_run_takes_the_reference_from_the_initial_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the evaluation half way and resumed: were the reference taken from the checkpoint, margins would
    fall back to 0."""

    def run(name: str, *arguments: str) -> int:
        config = write_config(tmp_path, eval_steps=3, max_steps=6, output_dir=str(tmp_path / name))
        return run_method("dpo", config, *arguments)

    assert run("whole") == 0
    with monkeypatch.context() as patched:  # held-out pairs are scored by the reference, before training, after step 3
        patched.setattr(OfflineRun, "score", signalled(OfflineRun.score, 3))
        assert run("run") == 75
    assert [entry["step"] for entry in json.loads((tmp_path / "run" / "evals.json").read_text())] == [0]
    assert "scored by the policy" in json.loads((tmp_path / "run" / "summary.json").read_text())["reason"]
    assert run("run", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoints" / "step_3")) == 0
    for name in ("metrics.jsonl", "evals.json"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
