"""What a newcomer types first: the presets from the starter raise its score on held-out rows, over three seeds.

The presets are as they stand but for their length; what they reach in all of their steps: docs/learning.md. Training is
all that differs between seeds (the starter, the held-out rows and the greedy answers to them are the same), so that a
policy that does not learn, or learns from a reward that knows nothing, gains 0 or less.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.learning import SEEDS, assert_rises, assert_rises_on, gain, run_preset
from support.recipe_run import ROOT, metrics, run_method

from llmrl import models
from llmrl.rollout.vllm_launch import ServerProcess
from llmrl.runs import checkpoints

pytestmark = pytest.mark.slow

STEPS = {"loop": 3, "ppo": 2, "rlsp": 5, "pf_ppo": 2}
ROWS = ("--eval_rows", "100")
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: see CONTRIBUTING.md")


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets name their data from the project's root. Drawing a report takes longer than some of these runs."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("method", STEPS)
def test_the_tiny_preset_teaches_the_starter_to_carry(tmp_path: Path, method: str) -> None:
    """From two thirds of the sums to nearly all of them; the first seed by the command of the recipe's README."""
    score = "verifier" if method == "rlsp" else "correct_number"
    length = ("--max_steps", str(STEPS[method]), *ROWS)
    runs = [run_preset(method, "tiny", tmp_path / str(seed), seed, *length, launched=seed == 0) for seed in SEEDS]
    assert_rises([gain(run, score) for run in runs], by=0.12)


@needs_vllm
def test_with_vllm_in_the_process_as_well(tmp_path: Path) -> None:
    words = ("--engine.kind", "vllm", "--max_steps", "3", *ROWS)
    runs = [run_preset("loop", "tiny", tmp_path / str(seed), seed, *words) for seed in SEEDS]
    assert_rises([gain(run, "correct_number") for run in runs], by=0.1)
    for run in runs:
        assert_sampled_by_the_learner(run)


KILLER = """
import os, signal
from llmrl.rewards.texts import text_of
calls = 0

def killer(completions, **columns):
    global calls
    calls += 1
    if calls == 10:
        os.killpg(GROUP, signal.SIGKILL)
    return [float(len(text_of(completion))) for completion in completions]
"""


@needs_vllm
def test_with_a_vllm_server_as_well_and_where_it_dies_the_run_ends_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One seed: what is learned from the same rollouts is the same, and so many held-out rows do not rise by chance."""
    with ServerProcess(models.resolve("starter"), kv_cache_gib=0.1) as server:
        server.wait_until_healthy(300)
        words = ("--engine.kind", "vllm_server", "--engine.urls", f"[{server.url}]", "--engine.patience_seconds", "5")
        run = run_preset("loop", "tiny", tmp_path / "run", 0, *words, "--max_steps", "3", *ROWS)
        assert_rises_on(run, "correct_number", rows=100)
        assert_sampled_by_the_learner(run)

        (tmp_path / "killer.py").write_text(KILLER.replace("GROUP", str(server._process.pid)))
        few = ("--prompts_per_step", "4", "--samples_per_prompt", "2", "--eval_rows", "0", "--max_steps", "9")
        words = (
            "--rewards",
            f"[{tmp_path / 'killer.py'}:killer]",
            "--output_dir",
            str(tmp_path / "killed"),
            *few,
            *words,
        )
        capsys.readouterr()
        assert run_method("loop", ROOT / "recipes/loop/tiny.yaml", *words) == 1
    said = capsys.readouterr().err
    assert server.url in said
    newest = tmp_path / "killed" / "checkpoints" / f"step_{len(metrics(tmp_path / 'killed'))}"
    assert newest.name in ("step_2", "step_3")  # it was killed while step 3 sampled or right behind it
    assert checkpoints.latest(tmp_path / "killed") == newest
    assert f"{newest} is whole" in said


def assert_sampled_by_the_learner(run: Path) -> None:
    """What samples is at every step what learns."""
    for number, line in enumerate(metrics(run), 1):
        assert line["sampling/sampling_logp_difference/max"] < 1e-3
        rollouts = [json.loads(row) for row in (run / "rollouts" / f"step_{number}.jsonl").open()]
        assert {version for rollout in rollouts for version in rollout["policy_versions"]} == {number - 1}


def test_loop_learns_over_several_turns(tmp_path: Path) -> None:
    """Games of up to five guesses with the environment's own reward: winning, and what a guess rules out."""
    length = ("--max_steps", "6", "--eval_steps", "2")  # 28 games a time: the mean of three evaluations is steadier
    runs = [run_preset("loop", "game", tmp_path / str(seed), seed, *length) for seed in SEEDS]
    assert all(line["rollout/turns"] > 2 for run in runs for line in metrics(run))
    assert_rises([gain(run, "reward") for run in runs], by=0.2)
