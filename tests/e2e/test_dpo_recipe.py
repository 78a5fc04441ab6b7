"""The DPO recipe as a user runs it: whole runs, several processes, kills at any moment, signals."""

import json
import math
import random
from pathlib import Path

import pytest
from support.forked import finish, interrupted, kill_after_a_checkpoint
from support.recipe_run import final_weights, launch, metrics, write_config

pytestmark = pytest.mark.slow


def test_a_whole_run_and_its_repetition_from_its_own_config(tmp_path: Path) -> None:
    config = write_config(tmp_path, use_peft=True, eval_steps=4, max_length=64)
    done = launch("dpo", "cpu", "--config", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]
    evals = json.loads((run / "evals.json").read_text())
    assert [entry["step"] for entry in evals] == [0, 4, 8]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["eval_before"]["preference"]["rewards/accuracies"] == 0.5
    assert summary["eval_before"]["preference"]["reference_drift"] == pytest.approx(0, abs=1e-7)
    assert summary["eval_after"]["preference"]["reference_drift"] < 0  # -beta KL(reference || policy)

    finish("dpo", run / "config.yaml", "--output_dir", str(tmp_path / "again"))
    assert final_weights(tmp_path / "again") == final_weights(run)


@pytest.mark.parametrize("use_peft", [False, True], ids=["full", "lora"])
def test_killed_at_a_random_moment_and_resumed_it_ends_with_the_same_weights(tmp_path: Path, use_peft: bool) -> None:
    config = write_config(tmp_path, use_peft=use_peft, save_steps=2, max_steps=16)
    finish("dpo", config, "--output_dir", str(tmp_path / "reference"))
    kill_after_a_checkpoint("dpo", config, tmp_path / "run", delay=random.uniform(0, 0.5))
    finish("dpo", config, "--resume_from_checkpoint", "latest")
    assert final_weights(tmp_path / "run") == final_weights(tmp_path / "reference")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "reference")


def test_a_signal_leaves_a_whole_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=100_000)
    summary = interrupted("dpo", config, tmp_path / "run")
    assert summary["status"] == "interrupted"
    steps = summary["steps"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{steps}" / "manifest.json").exists()


@pytest.mark.parametrize("launcher", ["cpu_ddp", "cpu_zero3"])
def test_two_processes_follow_the_curve_of_one(tmp_path: Path, launcher: str) -> None:
    config = write_config(tmp_path, max_steps=4, save_steps=2)
    finish("dpo", config)
    if launcher == "cpu_ddp":  # by the command that people type; ZeRO-3's is tried with the online recipes
        spread = launch("dpo", launcher, "--config", str(config), "--output_dir", str(tmp_path / "spread"))
        assert spread.returncode == 0, spread.stderr[-2000:]
    else:
        finish("dpo", config, "--output_dir", str(tmp_path / "spread"), launcher=launcher)
    for one, two in zip(metrics(tmp_path / "run"), metrics(tmp_path / "spread"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["num_tokens"] == one["num_tokens"]
