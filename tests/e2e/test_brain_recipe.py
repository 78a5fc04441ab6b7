"""BRAIn as users run it: the tiny preset teaches the starter, a killed run ends as one that is not, two ranks."""

from pathlib import Path

import pytest
from support.forked import begin, begin_two_ranks, ended
from support.learning import gain
from support.online_run import write_online_config
from support.recipe_run import final_weights, launch, metrics, run_method

from llmrl.runs import checkpoints

pytestmark = pytest.mark.slow


def test_the_tiny_preset_teaches_the_starter_to_carry(tmp_path: Path) -> None:
    """From two thirds of the sums to most of them; over seeds and in all of its steps: recipes/brain/README.md."""
    own = ("--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--eval_rows", "100")
    done = launch("brain", "cpu", "--config", "recipes/brain/tiny.yaml", *own)
    assert done.returncode == 0, done.stderr[-2000:]
    assert gain(tmp_path / "run", "correct_number") > 0.15


def test_killed_within_an_update_and_resumed_it_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    config = write_online_config(tmp_path, save_steps=1, max_steps=3, prompts_per_update=2, truncated_samples="keep")
    assert run_method("brain", config) == 0
    beside = ("--output_dir", str(tmp_path / "killed"))
    assert ended(begin("brain", config, *beside, dies=("update", 7))) == -9
    assert getattr(checkpoints.latest(tmp_path / "killed"), "name", None) == "step_1"
    assert run_method("brain", config, *beside, "--resume_from_checkpoint", "latest") == 0
    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "run")


def test_two_ranks_follow_the_curve_of_one_also_in_two_passes(tmp_path: Path) -> None:
    config = write_online_config(
        tmp_path, max_steps=2, prompts_per_update=2, truncated_samples="keep", tokens_per_microbatch=24, eval_rows=0
    )
    assert run_method("brain", config) == 0
    processes = begin_two_ranks("brain", config, "--output_dir", str(tmp_path / "two"))
    assert [ended(process) for process in processes] == [0, 0]
    for one, two in zip(metrics(tmp_path / "run"), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["brain/ess"] == pytest.approx(one["brain/ess"], rel=1e-3)
