"""Online recipes as users run them: whole runs, kills at any moment and phase, signals, two processes, engines."""

import json
import random
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from support.forked import begin, ended
from support.online_run import REWARD, evals, run_online, write_online_config
from support.recipe_run import final_weights, kill_after_a_checkpoint, launch, metrics, wait_for
from support.words import WORDS

import llmrl.runs.report
from llmrl.runs import checkpoints

pytestmark = pytest.mark.slow

TIMES = {"rollout_seconds", "sampled_tokens_per_second"}
RESUME = ("--resume_from_checkpoint", "latest")
SETTINGS: dict[str, dict[str, Any]] = {
    "loop": {"rollouts_per_update": 8},
    "ppo": {"samples_per_prompt": 1, "prompts_per_step": 8, "value_learning_rate": 1e-2, "rollouts_per_update": 4},
}


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than these runs."""
    monkeypatch.setattr(llmrl.runs.report, "write_report", lambda directory: directory)


@pytest.fixture(scope="module", params=SETTINGS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(method, a folder with a configuration and its run that nothing happened to)."""
    return request.param, uninterrupted(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def finished_loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted("loop", tmp_path_factory.mktemp("loop"))


def uninterrupted(method: str, folder: Path) -> Path:
    config = write_online_config(folder, max_steps=6, save_steps=2, eval_steps=3, **SETTINGS[method])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llmrl.runs.report, "write_report", lambda directory: directory)
        assert run_online(method, config) == 0
    return folder


def results(run: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(run)]
    rollouts = {file.name: file.read_text() for file in (run / "rollouts").iterdir()}
    return {"metrics": lines, "evals": evals(run), "rollouts": rollouts, "weights": final_weights(run)}


def assert_same(run: Path, reference: Path) -> None:
    mine, true = results(run), results(reference)
    for name, value in true.items():
        assert mine[name] == value, name


def beside(folder: Path, name: str) -> tuple[Path, tuple[str, str]]:
    """Another run of the same configuration, from its beginning."""
    shutil.rmtree(folder / name, ignore_errors=True)
    return folder / name, ("--output_dir", str(folder / name))


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_whole_run_and_its_repetition_from_its_own_config(tmp_path: Path) -> None:
    config = write_online_config(tmp_path, use_peft=True, max_steps=3, eval_steps=2)
    done = launch("loop", "cpu", "--config", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert [entry["step"] for entry in evals(run)] == [0, 2, 3]
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    left = {"config.yaml", "environment.json", "metrics.jsonl", "evals.json", "summary.json", "report.html"}
    assert left <= {file.name for file in run.iterdir()}
    assert sorted(file.name for file in (run / "rollouts").iterdir()) == [f"step_{n}.jsonl" for n in (1, 2, 3)]
    again, arguments = beside(tmp_path, "again")
    assert run_online("loop", run / "config.yaml", *arguments) == 0
    assert_same(again, run)


# -- interrupted and resumed -------------------------------------------------------------------------------------------


def test_killed_at_a_random_moment_and_resumed_it_ends_as_if_nothing_had_been(finished: tuple[str, Path]) -> None:
    method, folder = finished
    run, _ = beside(folder, "killed")
    config = folder / "killed.yaml"
    config.write_text((folder / "config.yaml").read_text().replace(str(folder / "run"), str(run)))
    kill_after_a_checkpoint(method, config, run, delay=random.uniform(0, 0.5))
    assert run_online(method, config, *RESUME) == 0
    assert_same(run, folder / "run")


MOMENTS: list[tuple[str, int, str | None]] = [
    ("rollout", 12, None), ("rollout", 30, "step_2"), ("reward", 17, "step_2"), ("reward", 31, "step_4"),
    ("update", 3, None), ("update", 24, "step_4"), ("sync", 4, "step_2"), ("sync", 7, "step_6"),
    ("save", 2, "step_2"), ("save", 3, "step_4"), ("export", 1, "step_6"),
]  # fmt: skip
"""Phase, which of its calls is the last, and the checkpoint that is there then."""


@pytest.mark.parametrize(("phase", "number", "newest"), MOMENTS)
def test_killed_in_any_phase_and_resumed_it_ends_as_if_nothing_had_been(
    finished_loop: Path, phase: str, number: int, newest: str | None
) -> None:
    run, arguments = beside(finished_loop, f"killed in {phase}")
    config = finished_loop / "config.yaml"
    assert ended(begin("loop", config, *arguments, dies=(phase, number))) == -signal.SIGKILL
    found = checkpoints.latest(run)
    assert (found and found.name) == newest
    assert run_online("loop", config, *arguments, *RESUME) == 0
    assert_same(run, finished_loop / "run")


SLEEPY = (
    REWARD
    + """
import os, time
calls = 0

def sleepy(completions, **columns):
    global calls
    calls += 1
    if calls == 10 and not os.path.exists("AWAKE"):
        open("AWAKE", "w").close()
        time.sleep(300)
    return paid(completions)
"""
)


def test_a_signal_in_a_long_rollout_phase_leaves_the_steps_before_and_the_run_goes_on(tmp_path: Path) -> None:
    """A reward function sleeps in the third step, in a thread that nobody can end."""
    awake = tmp_path / "awake"
    (tmp_path / "reward.py").write_text(SLEEPY.replace("AWAKE", str(awake)))
    rewards = [f"{tmp_path / 'reward.py'}:sleepy"]
    config = write_online_config(tmp_path, rewards=rewards, reward_timeout_seconds=600.0, eval_rows=0)
    process = begin("loop", config, log=tmp_path / "log")
    wait_for(awake.exists)
    process.terminate()
    assert ended(process, 30) == 75
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", 2)
    assert "rollouts of step 3" in summary["reason"]
    assert (run / "checkpoints" / "step_2" / "manifest.json").exists()
    assert run_online("loop", config, *RESUME) == 0
    reference, arguments = beside(tmp_path, "reference")
    assert run_online("loop", config, *arguments) == 0
    assert_same(run, reference)


# -- two processes -----------------------------------------------------------------------------------------------------

PICKY = (
    REWARD
    + """
def picky(completions, answer, **columns):
    return [score if own == "1" else 0.5 for score, own in zip(paid(completions), answer, strict=True)]

def broken_on_rank_1(completions, **columns):
    import os
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 4:
        raise ValueError("rank 1 has no luck")
    return paid(completions)

calls = 0
"""
)


def picky_config(tmp_path: Path, **settings: Any) -> Path:
    """Three in four prompts teach nothing: their rollouts are equally good, whatever they say."""
    draw = random.Random(2)
    rows = [{"prompt": " ".join(draw.choices(WORDS, k=3)), "answer": str(i % 4)} for i in range(64)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(PICKY)
    given = {"rewards": [f"{tmp_path / 'reward.py'}:picky"], "max_steps": 6, "rollouts_per_update": 32, **settings}
    return write_online_config(tmp_path, **given)


def test_two_processes_follow_the_curve_of_one_even_where_one_of_them_has_nothing_to_compute(tmp_path: Path) -> None:
    config = picky_config(tmp_path)
    assert run_online("loop", config) == 0
    spread, arguments = beside(tmp_path, "spread")
    done = launch("loop", "cpu_ddp", "--config", str(config), *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert results(spread)["rollouts"] == results(tmp_path / "run")["rollouts"]
    teaching = []
    for one, two in zip(metrics(tmp_path / "run"), metrics(spread), strict=True):
        assert two["reward"] == one["reward"]
        assert two["num_tokens"] == one["num_tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-7)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        teaching.append(round(4 * (1 - two["frac_reward_zero_std"])))
    assert {0, 1} < set(teaching)  # fewer prompts than processes


def test_where_one_process_fails_all_end_with_its_reason_and_a_checkpoint(tmp_path: Path) -> None:
    rewards = [f"{tmp_path / 'reward.py'}:broken_on_rank_1"]
    config = picky_config(tmp_path, rewards=rewards, reward_max_failures=1, eval_rows=0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        begin("loop", config, log=tmp_path / f"log{rank}", environment={
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        })
        for rank in (0, 1)
    ]  # fmt: skip
    assert [ended(process, 60) for process in ranks] == [1, 1]
    assert "rank 1 has no luck" in json.loads((tmp_path / "run" / "summary.json").read_text())["reason"]
    assert checkpoints.latest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_2"


def test_zero3_refuses_the_engine_that_needs_the_whole_model(tmp_path: Path) -> None:
    done = launch("loop", "cpu_zero3", "--config", str(write_online_config(tmp_path)))
    assert done.returncode != 0
    assert "refused: engine.kind huggingface samples with the whole model" in done.stderr
    assert "use vllm or vllm_server, or launch with ZeRO-2 or DDP" in done.stderr
    assert not (tmp_path / "run").exists()
