"""Direct Advantage from the starter, on the task of its README: greedy held-out accuracy rises."""

from pathlib import Path

import pytest
from support.online_run import evals
from support.recipe_run import ROOT, run_method

pytestmark = pytest.mark.slow


def test_a_round_of_the_tiny_preset_teaches_the_starter_to_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the preset's first round. Of 200 greedy answers two thirds are right before; 15 points are more than four
    standard errors, and a policy that does not move gives the same answers."""
    monkeypatch.chdir(ROOT)
    smaller = ("--rounds", "1", "--max_steps", "8", "--prompts_per_round", "40", "--eval_rows", "200")
    config = Path("recipes/direct_advantage/tiny.yaml")
    assert run_method("direct_advantage", config, "--output_dir", str(tmp_path / "run"), *smaller) == 0
    before, after = (
        entry["metrics"]["correct_number"] for entry in evals(tmp_path / "run") if entry["name"] == "heldout"
    )
    assert after - before > 0.15
