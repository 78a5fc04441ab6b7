"""SIGTERM, SIGINT, kill -9 and a reader that goes away, on a real process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parents[1] / "runs" / "toy_recipe.py"
STEPS = 12


def words(out: Path, *more: str) -> list[str]:
    return [sys.executable, str(RECIPE), "--output_dir", str(out), "--max_steps", str(STEPS), *more]


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def logged(out: Path) -> int:
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())  # type: ignore[no-any-return]


def resume(out: Path) -> None:
    """Goes on without waiting, and must end as a run that nothing happened to."""
    done = subprocess.run(words(out, "--resume_from_checkpoint", "latest"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "final" / "total.json").read_text()) == sum(0.5 * step for step in range(1, STEPS + 1))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert [item["step"] for item in json.loads((out / "evals.json").read_text())] == [0, STEPS]
    assert summary(out)["status"] == "completed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_training_ends_with_75_a_checkpoint_and_can_go_on(tmp_path: Path, number: signal.Signals):
    out = tmp_path / "out"
    with started(words(out, "--step_seconds", "0.1")) as process:
        until(lambda: logged(out) >= 2)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"{number.name}: process {process.pid} stops with a checkpoint" in said
    assert "Traceback" not in said
    ended = summary(out)
    assert ended["status"] == "interrupted"
    assert (out / "checkpoints" / f"step_{ended['steps']}" / "manifest.json").exists()
    assert (out / "report.html").exists()
    resume(out)


def test_a_signal_before_the_first_step_is_answered_at_once(tmp_path: Path):
    out = tmp_path / "out"
    with started(words(out, "--load_seconds", "60")) as process:
        until(lambda: (out / "environment.json").exists())
        time.sleep(0.3)  # the handlers come right after
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 75
    assert summary(out)["status"] == "interrupted"
    assert "before the first step" in summary(out)["reason"]
    resume(out)


@pytest.mark.slow
def test_the_same_wish_sent_twice_is_one_wish(tmp_path: Path):
    """A launcher passes on what the process has already got from its group."""
    out = tmp_path / "out"
    with started(words(out, "--step_seconds", "0.3")) as process:
        until(lambda: logged(out) >= 1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    resume(out)


@pytest.mark.slow
def test_a_later_signal_ends_at_once_with_its_own_code(tmp_path: Path):
    out = tmp_path / "out"
    with started(words(out, "--step_seconds", "0.3", "--end", "stuck", "--max_steps", "1000")) as process:
        until(lambda: logged(out) >= 1)
        process.send_signal(signal.SIGINT)
        time.sleep(3.3)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "ending at once" in said
    assert not (out / "summary.json").exists()


@pytest.mark.slow
def test_killed_at_random_moments_it_always_goes_on_to_the_same_end(tmp_path: Path):
    moments = random.Random(4)
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        with started(words(out, "--step_seconds", "0.01", "--save_steps", "1", "--save_total_limit", "1")) as process:
            until(lambda out=out: logged(out) >= 1)
            time.sleep(moments.uniform(0, 0.25))
            process.kill()
        resume(out)


@pytest.mark.slow
def test_killed_and_killed_again_while_going_on(tmp_path: Path):
    out = tmp_path / "out"
    for least in (2, 5, 8):
        more = ["--resume_from_checkpoint", "latest", "--step_seconds", "0.03", "--save_steps", "1"]
        with started(words(out, *more)) as process:
            until(lambda least=least: logged(out) >= least)
            process.kill()
    resume(out)


def test_forked_workers_die_of_the_signal_that_their_pool_sends(tmp_path: Path):
    """Tokenisation forks workers while the handlers are in place, and ends them by SIGTERM."""
    code = f"""
import multiprocessing, sys, time
sys.path.insert(0, {str(RECIPE.parent)!r})
from toy_recipe import ToyConfig
from llmrl.runs import Run
from llmrl.runs.signals import stop_on_signals
run = Run.open(ToyConfig(output_dir={str(tmp_path / "out")!r}))
with stop_on_signals(run):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.2)
    worker.terminate()
    worker.join(30)
print(worker.exitcode, run.interrupted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("-15 False", "")


def test_a_reader_that_goes_away_stops_nothing(tmp_path: Path):
    out = tmp_path / "out"
    command = words(out, "--step_seconds", "0.02")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0
    assert complaints == ""
    assert summary(out)["status"] == "completed"


def test_standard_output_that_was_never_open(tmp_path: Path):
    out = tmp_path / "out"
    command = " ".join(words(out)) + " >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    assert summary(out)["status"] == "completed"


def test_a_terminal_that_cannot_show_the_characters(tmp_path: Path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(words(out, "--run_name", "é"), env=environment, capture_output=True, check=False)
    assert done.returncode == 0
