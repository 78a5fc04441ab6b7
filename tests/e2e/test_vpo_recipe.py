"""VPO's presets, shortened, from the starter: held-out preferences rise with pessimism, right sums with optimism."""

import json
from pathlib import Path

import pytest
from support.learning import gain
from support.recipe_run import ROOT, launch, metrics, run_method

pytestmark = pytest.mark.slow


def test_the_tiny_preset_prefers_right_answers_and_keeps_them_likely(tmp_path: Path) -> None:
    short = ("--max_steps", "20", "--task_evaluation", "null", "--output_dir", str(tmp_path / "run"))
    done = launch("vpo", "cpu", "--config", "recipes/vpo/tiny.yaml", *short)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (entry["metrics"] for entry in json.loads((tmp_path / "run" / "evals.json").read_text()))
    assert before["rewards/accuracies"] == 0.5
    assert after["accuracy_interval_low"] > 0.55  # of 300 pairs
    assert after["rewards/chosen"] > 0.1  # a nat and more; DPO's falls


def test_rounds_of_pairs_teach_the_starter_to_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short = ("--max_steps", "7", "--eval_rows", "100", "--output_dir", str(tmp_path / "run"))
    assert run_method("vpo_online", Path("recipes/vpo/online.yaml"), *short) == 0
    assert gain(tmp_path / "run", "correct_number") > 0.1  # from two thirds; of what chance may do it is twice the most
    assert all(line["alpha"] > 0 for line in metrics(tmp_path / "run"))
