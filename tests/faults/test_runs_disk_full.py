"""A disk that is really full, and a file size that is really limited: the checkpoint before stays whole."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmrl.config import DataKeys, ModelKeys, OptimizationKeys, RunKeys
from llmrl.errors import RefusedError, RunFailedError
from llmrl.runs import Run, checkpoints
from llmrl.runs.disk import is_disk_failure, size

MEGABYTE = 1_000_000
DISK_MEGABYTES = 4


class Toy(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
    """Toy."""


def toy(directory: Path) -> Toy:
    return Toy(model_name_or_path="m", dataset_name="d", learning_rate=1e-4, output_dir=str(directory))


def plain(count: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"w" * count)

    return write


def with_torch(count: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import torch

        torch.save(torch.zeros(count, dtype=torch.uint8), folder / "weights.pt")

    return write


def with_safetensors(count: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(count, dtype=torch.uint8)}, folder / "weights.safetensors")

    return write


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


@pytest.mark.parametrize("writer", [plain, with_torch, with_safetensors])
def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(
    small_disk: Path, writer: Callable[[int], Callable[[Path], None]]
):
    before = checkpoints.publish(small_disk, 2, writer(3 * MEGABYTE), {}, 1)
    with pytest.raises(RunFailedError) as caught:
        checkpoints.publish(small_disk, 4, writer(3 * MEGABYTE), {}, 1)
    message = str(caught.value)
    assert "checkpoint step_4 could not be written" in message
    assert f"mounted at {small_disk}" in message
    assert "a checkpoint needs about 3.0 MB" in message
    assert f"{before} is whole" in message
    assert "--resume_from_checkpoint latest" in message
    assert names(small_disk) == ["step_2"]
    assert checkpoints.latest(small_disk) == before
    assert checkpoints.read_manifest(before)["step"] == 2


def test_once_there_is_room_the_same_step_can_be_written(small_disk: Path):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"b" * 3 * MEGABYTE)
    with pytest.raises(RunFailedError, match=r"needs more than the .* There was no earlier checkpoint"):
        checkpoints.publish(small_disk, 1, plain(2 * MEGABYTE), {}, 1)
    ballast.unlink()
    assert checkpoints.latest(small_disk) is None
    assert checkpoints.publish(small_disk, 1, plain(2 * MEGABYTE), {}, 1) == checkpoints.latest(small_disk)


def test_a_run_on_a_disk_that_fills_up_fails_with_1_and_goes_on_once_there_is_room(small_disk: Path, tmp_path: Path):
    recipe = Path(__file__).parents[1] / "runs" / "toy_recipe.py"
    out = small_disk / "out"
    command = [sys.executable, str(recipe), "--output_dir", str(out), "--max_steps", "6", "--save_steps", "2"]
    room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast = small_disk / "ballast"
    ballast.write_bytes(
        b"b" * (room - 70_000)
    )  # one checkpoint of 20 kB fits beside the run's files, a second does not
    failed = subprocess.run([*command, "--save_total_limit", "5"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "No space left on device" in failed.stderr
    newest = checkpoints.latest(out)
    assert newest is not None
    assert f"{newest} is whole" in failed.stderr
    assert not list((out / "checkpoints").glob(".tmp_*"))
    ballast.unlink()
    again = subprocess.run(
        [*command, "--resume_from_checkpoint", "latest"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "summary.json").read_text())["status"] == "completed"
    assert json.loads((out / "final" / "total.json").read_text()) == 0.5 * 21


def fill(disk: Path) -> None:
    """Takes the last byte."""
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"b" * 4096)


def test_a_disk_too_full_for_a_line_of_metrics_fails_the_run_in_words(small_disk: Path):
    run = Run.open(toy(small_disk / "out"))
    run.log(1, {"loss": 1.0})
    fill(small_disk)

    def log_on() -> None:
        for step in range(2, 2000):
            run.log(step, {"loss": 1.0})

    with pytest.raises(RunFailedError, match="a line of metrics could not be written: No space left on device"), run:
        log_on()
    lines = (small_disk / "out" / "metrics.jsonl").read_text().split("\n")
    assert all(json.loads(line) for line in lines[:-1])


def test_a_read_only_disk_is_refused_before_anything_begins(small_disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RefusedError, match=r"output_dir .* cannot be used: Read-only file system"):
        Run.open(toy(small_disk / "out"))


def test_a_full_disk_is_refused_before_anything_begins(small_disk: Path):
    fill(small_disk)
    with pytest.raises(RefusedError, match=r"output_dir .* cannot be used: No space left on device"):
        Run.open(toy(small_disk / "out"))
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_limit_on_the_size_of_a_file_is_a_failure_of_the_disk_too(tmp_path: Path):
    before = checkpoints.publish(tmp_path, 2, plain(10_000), {}, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunFailedError, match="File too large"):
            checkpoints.publish(tmp_path, 4, plain(200_000), {}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_2"]
    assert checkpoints.latest(tmp_path) == before


@pytest.mark.parametrize("text", ["disk is shaped like a torus", "", "size mismatch for lm_head.weight"])
def test_other_errors_are_not_taken_for_the_disks(text: str):
    assert not is_disk_failure(RuntimeError(text))


def test_bytes_are_shown_for_a_person():
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 8_700_000_000, 10**13, 10**17)] == [
        "0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "8.7 GB", "10.0 TB", "100000.0 TB",
    ]  # fmt: skip
