"""The CPL recipe from the starter: whole solutions by the command that people type, and single steps of solutions."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from support.forked import finish
from support.recipe_run import ROOT, launch, metrics

pytestmark = pytest.mark.slow

SHORT = ("--max_steps", "20", "--task_evaluation", "null")


def accuracies(run: Path) -> list[float]:
    """Of the held-out comparisons, before and after."""
    return [e["metrics"]["rewards/accuracies"] for e in json.loads((run / "evals.json").read_text())]


def test_the_tiny_preset_learns_to_tell_right_solutions_from_wrong_ones(tmp_path: Path) -> None:
    done = launch(
        "cpl", "cpu", "--config", "recipes/cpl/tiny.yaml", "--output_dir", str(tmp_path / "run"), *SHORT
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = accuracies(tmp_path / "run")
    assert after > before + 0.05


def test_single_steps_that_start_in_different_states_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["steps.py", "--output", str(tmp_path / "data")])
    runpy.run_path("recipes/cpl/steps.py", run_name="__main__")
    config = tmp_path / "steps.yaml"
    config.write_text((ROOT / "recipes/cpl/steps.yaml").read_text())
    own = ("--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"))
    said = finish("cpl", config, *own, *SHORT)
    assert "segments cut out of longer turns" in said
    before, after = accuracies(tmp_path / "run")
    assert after > before + 0.05
    assert metrics(tmp_path / "run")[-1]["rewards/margins"] > 0
