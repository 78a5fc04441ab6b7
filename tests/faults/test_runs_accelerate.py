"""The promises under `accelerate launch`, with one process and with two: signals come through a launcher there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "runs" / "toy_recipe.py"
ONE = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n"
TWO = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nmain_process_port: 0\n"

pytestmark = pytest.mark.slow


def command(tmp_path: Path, launch: str, *words: str) -> list[str]:
    file = tmp_path / "launch.yaml"
    file.write_text(launch)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*accelerate, str(RECIPE), "--output_dir", str(tmp_path / "out"), "--max_steps", "60", *words]


def ended(process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Waits for the whole process group: the launcher may go before what it launched."""
    process.wait(seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the run outlives its launcher")


@pytest.mark.parametrize("launch", [ONE, TWO], ids=["one process", "two processes"])
def test_sigterm_to_the_group_leaves_a_checkpoint_and_a_summary_and_it_goes_on(tmp_path: Path, launch: str):
    out = tmp_path / "out"
    words = command(tmp_path, launch, "--step_seconds", "0.2")
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 90
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        ended(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert (out / "checkpoints" / f"step_{summary['steps']}" / "manifest.json").exists()
    done = subprocess.run(
        command(tmp_path, launch, "--resume_from_checkpoint", "latest"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "final" / "total.json").read_text()) == 0.5 * 60 * 61 / 2
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def test_two_processes_print_once_and_a_refusal_is_one_message(tmp_path: Path):
    done = subprocess.run(command(tmp_path, TWO), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 60/60") == 1
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["settings"]["WORLD_SIZE"] == "2"
    again = subprocess.run(command(tmp_path, TWO), capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1
    dry = subprocess.run(command(tmp_path, TWO, "--dry-run"), capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("# rows per step and process  8") == 1
