"""What a newcomer types first: the presets from the starter raise its score on held-out rows, over three seeds.

The presets are as they stand but for their length; what they reach in all of their steps: docs/learning.md. Training is
all that differs between seeds (the starter, the held-out rows and the greedy answers to them are the same), so that a
policy that does not learn, or learns from a reward that knows nothing, gains 0 or less.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.learning import SEEDS, assert_rises, gain, run_preset
from support.recipe_run import ROOT, metrics

import llmrl.runs.report
from llmrl import models
from llmrl.rollout.vllm_launch import ServerProcess

pytestmark = pytest.mark.slow

STEPS = {"loop": 4, "ppo": 2, "rlsp": 5, "pf_ppo": 2}
ROWS = ("--eval_rows", "100")
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: see CONTRIBUTING.md")


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets name their data from the project's root. Drawing a report takes longer than some of these runs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(llmrl.runs.report, "write_report", lambda directory: directory)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of one server for all seeds."""
    with ServerProcess(models.resolve("starter"), kv_cache_gib=0.1) as process:
        process.wait_until_healthy(300)
        yield process.url


@pytest.mark.parametrize("method", STEPS)
def test_the_tiny_preset_teaches_the_starter_to_carry(tmp_path: Path, method: str) -> None:
    """From two thirds of the sums to nearly all of them; the first seed by the command of the recipe's README."""
    score = "verifier" if method == "rlsp" else "correct_number"
    length = ("--max_steps", str(STEPS[method]), *ROWS)
    runs = [run_preset(method, "tiny", tmp_path / str(seed), seed, *length, launched=seed == 0) for seed in SEEDS]
    assert_rises([gain(run, score) for run in runs], by=0.15)


@needs_vllm
@pytest.mark.parametrize("kind", ["vllm", "vllm_server"])
def test_with_either_vllm_engine_as_well(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    urls = [request.getfixturevalue("server")] if kind == "vllm_server" else []
    engine = ("--engine.kind", kind, *(("--engine.urls", str(urls)) if urls else ()))
    length = ("--max_steps", "3", *ROWS)
    runs = [run_preset("loop", "tiny", tmp_path / str(seed), seed, *engine, *length) for seed in SEEDS]
    assert_rises([gain(run, "correct_number") for run in runs], by=0.1)
    for line in (line for run in runs for line in metrics(run)):
        assert line["sampling/sampling_logp_difference/max"] < 1e-3  # what samples is what learns


def test_loop_learns_over_several_turns(tmp_path: Path) -> None:
    """Games of up to five guesses with the environment's own reward: winning, and what a guess rules out."""
    length = ("--max_steps", "6", "--eval_steps", "2")  # 28 games a time: the mean of three evaluations is steadier
    runs = [run_preset("loop", "game", tmp_path / str(seed), seed, *length) for seed in SEEDS]
    assert all(line["rollout/turns"] > 2 for run in runs for line in metrics(run))
    assert_rises([gain(run, "reward") for run in runs], by=0.2)
