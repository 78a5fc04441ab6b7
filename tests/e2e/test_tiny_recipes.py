"""What a newcomer types first: the tiny preset itself, from the starter, learns on held-out problems."""

from pathlib import Path

import pytest
from support.online_run import evals
from support.recipe_run import ROOT, launch, metrics


@pytest.mark.slow
def test_loop_teaches_the_starter_to_carry(tmp_path: Path) -> None:
    """The 95% intervals of 400 held-out sums before and after a part of the preset's steps are far apart."""
    preset = str(ROOT / "recipes" / "loop" / "tiny.yaml")
    done = launch("loop", "cpu", "--config", preset, "--output_dir", str(tmp_path / "run"), "--max_steps", "12")
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (entry["metrics"] for entry in evals(tmp_path / "run"))
    assert after["reward_interval_low"] > before["reward_interval_high"] + 0.05
    assert all(line["frac_reward_zero_std"] < 1 for line in metrics(tmp_path / "run"))
