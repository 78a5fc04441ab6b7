"""Online recipes as users run them: whole runs, kills at any moment and phase, signals, two processes, engines."""

import functools
import json
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.fake_vllm import FakeServer
from support.forked import begin, begin_two_ranks, ended, finish
from support.models import make_tiny_model
from support.online_run import REWARD, evals, sleepy_config, write_online_config
from support.recipe_run import final_weights, launch, metrics, run_method, wait_for
from support.words import WORDS, word_tokenizer

import llmrl.runs.report
from llmrl.runs import checkpoints
from llmrl.trainers.online.experience import Experience

pytestmark = pytest.mark.slow

TIMES = ("seconds", "sampled_tokens_per_second")
RESUME = ("--resume_from_checkpoint", "latest")
SETTINGS: dict[str, dict[str, Any]] = {
    "loop": {"rollouts_per_update": 8},
    "ppo": {"samples_per_prompt": 1, "prompts_per_step": 8, "value_learning_rate": 1e-2, "rollouts_per_update": 4},
    "rlsp": {
        "samples_per_prompt": 1, "prompts_per_step": 8, "rewards": None, "verifier": "exact_match", "alpha_end": 0.2,
        "length_constant": 4.0,
    },
    "pf_ppo": {"filtration": "power"},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of each method a folder with a configuration and its run that nothing happened to; made once."""
    return functools.cache(lambda method: uninterrupted(method, tmp_path_factory.mktemp(method)))


def uninterrupted(method: str, folder: Path) -> Path:
    config = write_online_config(folder, max_steps=6, save_steps=2, eval_steps=3, **SETTINGS[method])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llmrl.runs.report, "write_report", lambda directory: directory)
        assert run_method(method, config) == 0
    return folder


def results(run: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    lines = [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in metrics(run)]
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
    assert run_method("loop", run / "config.yaml", *arguments) == 0
    assert_same(again, run)


# -- interrupted and resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS)
def test_killed_at_a_random_moment_and_resumed_it_ends_as_if_nothing_had_been(
    finished: Callable[[str], Path], method: str
) -> None:
    folder = finished(method)
    run, arguments = beside(folder, "killed")
    process = begin(method, folder / "config.yaml", *arguments)
    wait_for(lambda: any((run / "checkpoints").glob("step_*")))
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    assert ended(process) in (-signal.SIGKILL, 0)  # on a fast machine it may have come to its end
    assert run_method(method, folder / "config.yaml", *arguments, *RESUME) == 0
    assert_same(run, folder / "run")


MOMENTS: list[tuple[str, str, int, str | None]] = [
    ("loop", "rollout", 12, None), ("loop", "reward", 17, "step_2"), ("loop", "update", 24, "step_4"),
    ("loop", "sync", 4, "step_2"), ("loop", "save", 2, "step_2"), ("loop", "export", 1, "step_6"),
    ("ppo", "update", 20, "step_2"), ("ppo", "save", 3, "step_4"),  # the critic and its optimizer's state
    ("rlsp", "update", 22, "step_4"),  # alpha goes on where it was
    ("rlsp", "export", 1, "step_6"),  # and is that of the last step where only the last evaluation is made again
    ("pf_ppo", "reward", 20, "step_2"),  # the same draws
]  # fmt: skip
"""Method, phase, which of its calls is the last, and the checkpoint that is there then."""


@pytest.mark.parametrize(("method", "phase", "number", "newest"), MOMENTS)
def test_killed_in_any_phase_and_resumed_it_ends_as_if_nothing_had_been(
    finished: Callable[[str], Path], method: str, phase: str, number: int, newest: str | None
) -> None:
    folder = finished(method)
    run, arguments = beside(folder, f"killed in {phase}")
    config = folder / "config.yaml"
    assert ended(begin(method, config, *arguments, dies=(phase, number))) == -signal.SIGKILL
    found = checkpoints.latest(run)
    assert (found and found.name) == newest
    assert run_method(method, config, *arguments, *RESUME) == 0
    assert_same(run, folder / "run")


@pytest.mark.parametrize(("phase", "call", "eval_rows"), [("rollouts of step 3", 10, 0), ("held-out rows", 16, 6)])
def test_a_signal_in_a_long_phase_leaves_the_steps_before_and_the_run_goes_on(
    tmp_path: Path, phase: str, call: int, eval_rows: int
) -> None:
    """A reward function sleeps behind the second step, in a thread that nobody can end."""
    awake = tmp_path / "awake"
    config = sleepy_config(tmp_path, call, eval_rows=eval_rows, eval_steps=2)
    process = begin("loop", config, log=tmp_path / "log")
    wait_for(awake.exists)
    process.terminate()
    assert ended(process, 30) == 75
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", 2)
    assert phase in summary["reason"]
    assert (run / "checkpoints" / "step_2" / "manifest.json").exists()
    assert run_method("loop", config, *RESUME) == 0
    reference, arguments = beside(tmp_path, "reference")
    assert run_method("loop", config, *arguments) == 0
    assert_same(run, reference)  # the evaluation that was given up is made again


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
    assert run_method("loop", config) == 0
    spread, arguments = beside(tmp_path, "spread")
    finish("loop", config, *arguments, launcher="cpu_ddp")
    assert results(spread)["rollouts"] == results(tmp_path / "run")["rollouts"]
    teaching = []
    for one, two in zip(metrics(tmp_path / "run"), metrics(spread), strict=True):
        assert two["reward"] == one["reward"]
        assert two["num_tokens"] == one["num_tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-7)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        teaching.append(round(4 * (1 - two["frac_reward_zero_std"])))
    assert {0, 1} < set(teaching)  # fewer prompts than processes


def two_ranks(config: Path, **environment: str) -> list[int]:
    """Exit codes of two processes of one run; their words are in log0 and log1."""
    return [ended(process) for process in begin_two_ranks("loop", config, environment=environment)]


def test_where_one_process_fails_all_end_with_its_reason_and_a_checkpoint(tmp_path: Path) -> None:
    rewards = [f"{tmp_path / 'reward.py'}:broken_on_rank_1"]
    config = picky_config(tmp_path, rewards=rewards, reward_max_failures=1, eval_rows=0)
    assert two_ranks(config) == [1, 1]
    assert "rank 1 has no luck" in json.loads((tmp_path / "run" / "summary.json").read_text())["reason"]
    assert checkpoints.latest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_2"


def test_where_the_first_process_finds_no_server_none_waits_for_it(tmp_path: Path) -> None:
    """Only the first asks servers; the others would meet it again at the weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    config = write_online_config(tmp_path, engine={"kind": "vllm_server", "urls": [url], "patience_seconds": 0.2})
    assert two_ranks(config) == [1, 1]
    assert url in json.loads((tmp_path / "run" / "summary.json").read_text())["reason"]


def test_zero3_refuses_the_engine_that_needs_the_whole_model(tmp_path: Path) -> None:
    zero3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert two_ranks(write_online_config(tmp_path), **zero3) == [2, 2]
    said = (tmp_path / "log0").read_text()
    assert "refused: engine.kind huggingface samples with the whole model" in said
    assert "use vllm or vllm_server, or launch with ZeRO-2 or DDP" in said
    assert not (tmp_path / "run").exists()


def test_ppo_under_zero2_follows_the_curve_of_one_process_through_the_critics_warm_up(tmp_path: Path) -> None:
    config = write_online_config(
        tmp_path, critic_warmup=2, value_learning_rate=1e-2, value_coef=1.0, max_grad_norm=0.1, max_steps=4,
        epochs_per_step=1, weight_decay=0.1, eval_rows=0,
    )  # fmt: skip
    assert run_method("ppo", config) == 0
    spread, arguments = beside(tmp_path, "spread")
    zero2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    assert [ended(rank) for rank in begin_two_ranks("ppo", config, *arguments, environment=zero2)] == [0, 0]
    for one, two in zip(metrics(tmp_path / "run"), metrics(spread), strict=True):
        policys = ("policy_loss",) if one["step"] > 2 else ()
        for name in ("reward", "values/mean", "value_loss", "grad_norm", *policys):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), (one["step"], name)
    assert [line["grad_norm"] > 0.1 for line in metrics(spread)] == [False, False, True, True]
    assert metrics(spread)[2]["values/mean"] > 0.01


def test_zero3_hands_a_server_whole_weights_with_the_adapter_in_them(tmp_path: Path) -> None:
    """The first process alone knows the server, and what it makes for itself must not wait for the other."""
    server = FakeServer()
    server.vocabulary = len(WORDS)
    engine = {"kind": "vllm_server", "urls": [server.url]}
    config = write_online_config(tmp_path, engine=engine, use_peft=True, max_steps=2, eval_rows=0)
    done = launch("loop", "cpu_zero3", "--config", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert server.paths().count("/collective_rpc") == 2
    assert server.weights == sorted(load_file(tmp_path / "model" / "model.safetensors"))
    server.end()


# -- engines -----------------------------------------------------------------------------------------------------------

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: see CONTRIBUTING.md")


def wide_config(tmp_path: Path, **settings: Any) -> Path:
    """With attention heads of a width that vLLM computes on a CPU."""
    tokenizer = word_tokenizer()
    make_tiny_model(vocab_size=len(tokenizer), scale=1.0, head_dim=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return write_online_config(tmp_path, **settings)


def assert_learned(run: Path, steps: int) -> None:
    """The reward rises, and what samples is at every step what learns."""
    lines = metrics(run)
    assert len(lines) == steps
    rewards = [line["reward"] for line in lines]
    third = steps // 3
    assert sum(rewards[-third:]) / third > sum(rewards[:third]) / third + 0.15, rewards
    before, *_, after = (entry["metrics"]["paid"] for entry in evals(run))
    assert after > before + 0.2
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["sampling/importance_sampling_ratio/max"] == pytest.approx(1.0, abs=1e-3)
    for number in range(1, steps + 1):
        rollouts = [json.loads(line) for line in (run / "rollouts" / f"step_{number}.jsonl").open()]
        assert {version for rollout in rollouts for version in rollout["policy_versions"]} == {number - 1}


@needs_vllm
def test_with_vllm_and_an_adapter_the_reward_rises_and_the_sampler_is_never_stale(tmp_path: Path) -> None:
    """An adapter leaves the output layer alone, and so needs a higher rate. All weights learn in test_tiny_recipes."""
    own = {"samples_per_prompt": 8, "temperature": 0.1, "learning_rate": 3e-2, "max_steps": 12}
    config = wide_config(tmp_path, engine={"kind": "vllm"}, use_peft=True, **own)
    assert run_method("loop", config) == 0
    assert_learned(tmp_path / "run", 12)


@needs_vllm
def test_under_zero3_vllm_samples_from_what_is_learned_one_step_ahead(tmp_path: Path) -> None:
    config = wide_config(tmp_path, engine={"kind": "vllm"}, max_staleness=1, max_steps=2, eval_rows=0)
    finish("loop", config, launcher="cpu_zero3")
    first, second = (line["sampling/sampling_logp_difference/max"] for line in metrics(tmp_path / "run"))
    assert first < 1e-4 < 1e-3 < second


@needs_vllm
def test_rollouts_one_step_ahead_survive_a_failure_and_a_kill_and_are_never_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = wide_config(tmp_path, engine={"kind": "vllm"}, max_staleness=1, max_steps=5, save_steps=1, eval_steps=2)
    assert run_method("loop", config) == 0
    for number, line in enumerate(metrics(tmp_path / "run"), 1):
        rollouts = (tmp_path / "run" / "rollouts" / f"step_{number}.jsonl").read_text().splitlines()
        versions = {version for rollout in rollouts for version in json.loads(rollout)["policy_versions"]}
        assert versions == {max(number - 2, 0)}
        assert (line["sampling/sampling_logp_difference/max"] > 1e-3) == (number > 1)

    broken, arguments = beside(tmp_path, "broken")
    with monkeypatch.context() as patch:
        patch.setattr(Experience, "train", _raises_in_call(Experience.train, 4))
        assert run_method("loop", config, *arguments) == 1
    assert checkpoints.latest(broken) == broken / "checkpoints" / "step_3"
    sampled = (broken / "rollouts" / "step_4.jsonl").read_text()
    (broken / "rollouts" / "step_4.jsonl").unlink()
    assert run_method("loop", config, *arguments, *RESUME) == 0
    assert (broken / "rollouts" / "step_4.jsonl").read_text() == sampled
    assert_same(broken, tmp_path / "run")

    killed, arguments = beside(tmp_path, "killed")
    assert ended(begin("loop", config, *arguments, dies=("update", 5)), 300) == -signal.SIGKILL
    assert checkpoints.latest(killed) == killed / "checkpoints" / "step_2"  # two updates a step
    assert run_method("loop", config, *arguments, *RESUME) == 0
    assert_same(killed, tmp_path / "run")


def _raises_in_call(function: Any, number: int) -> Any:
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise RuntimeError("no luck")
        return function(*arguments, **named)

    return counted
