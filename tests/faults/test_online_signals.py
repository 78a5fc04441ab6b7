"""A signal that comes while something takes long: in the first evaluation, or to one of two processes."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.forked import begin, begin_two_ranks, ended
from support.online_run import evals, sleepy_config
from support.recipe_run import metrics, run_method, wait_for

pytestmark = pytest.mark.slow


def summary(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def test_rollouts_may_take_longer_than_a_collective_and_a_signal_to_either_process_ends_both(tmp_path: Path) -> None:
    """Each process judges two of the four prompts of a step: the first's fifth is one of step 3."""
    config = sleepy_config(tmp_path, 5, eval_rows=0)
    limit = 10.0
    processes = begin_two_ranks("loop", config, collective_seconds=limit)
    wait_for((tmp_path / "awake").exists)
    time.sleep(1.3 * limit)
    assert [process.exitcode for process in processes] == [None, None]
    processes[1].terminate()
    assert [ended(process, 30) for process in processes] == [75, 75]
    assert (summary(tmp_path)["status"], summary(tmp_path)["steps"]) == ("interrupted", 2)
    assert "rollouts of step 3" in summary(tmp_path)["reason"]
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "manifest.json").exists()
    resumed = begin_two_ranks("loop", config, "--resume_from_checkpoint", "latest")
    assert [ended(process) for process in resumed] == [0, 0]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_signal_during_the_first_evaluation_is_heard_by_the_rollouts(tmp_path: Path) -> None:
    config = sleepy_config(tmp_path, 3)
    process = begin("loop", config)
    wait_for((tmp_path / "awake").exists)
    process.terminate()
    assert ended(process, 30) == 75
    assert (summary(tmp_path)["status"], summary(tmp_path)["steps"]) == ("interrupted", 0)
    assert "held-out rows" in summary(tmp_path)["reason"]
    assert run_method("loop", config, "--resume_from_checkpoint", "latest") == 0
    assert [entry["step"] for entry in evals(tmp_path / "run")] == [0, 4]
