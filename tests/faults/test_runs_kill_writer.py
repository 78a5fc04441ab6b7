"""kill -9 in the middle of writing checkpoints, many times over: `latest` is whole, right, no older than promised."""

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrl.runs import checkpoints

KILLS = 40
FILES, SIZE = 12, 4_000


def write_for_ever(root: Path, first: int, said: int) -> None:
    """Checkpoints with content that follows from their step; every one that is published is said aloud."""

    def write(folder: Path) -> None:
        for number in range(FILES):
            (folder / f"part{number}.bin").write_bytes(bytes([step % 251]) * (SIZE + step))

    step = first
    while True:
        checkpoints.publish(root, step, write, {"made_of": step % 251}, keep=1)
        os.write(said, step.to_bytes(8, "big"))
        # And written once more, as a resumed run does: replacing is the hardest moment.
        if step != first:
            checkpoints.publish(root, step, write, {"made_of": step % 251}, keep=1)
        step += 1


@pytest.fixture
def fast_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk in memory where there is one: kills then fall between renames and not, nearly all, into an fsync."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def killed_writer(root: Path, first: int, seconds: float) -> int:
    """Starts a writer, kills it so long after its first checkpoint; the last step that it said it had published."""
    hear, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(hear)
            write_for_ever(root, first, said)
        finally:
            os._exit(1)
    os.close(said)
    with os.fdopen(hear, "rb") as pipe:
        words = pipe.read(8)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        words += pipe.read()
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    return int.from_bytes(words[-8:], "big")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_latest_is_always_whole_and_not_older_than_promised(fast_disk: Path):
    moments = random.Random(11)
    first = 1
    for _ in range(KILLS):
        promised = killed_writer(fast_disk, first, moments.uniform(0, 0.05))
        newest = checkpoints.latest(fast_disk)
        assert newest is not None
        manifest = checkpoints.read_manifest(newest)
        step = manifest["step"]
        assert promised <= step <= promised + 1
        assert len(manifest["files"]) == FILES
        for name in manifest["files"]:
            assert (newest / name).read_bytes() == bytes([step % 251]) * (SIZE + step)
        first = step + 1
