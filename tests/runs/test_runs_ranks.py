"""How the processes of one run leave: the first one's report is there before another is gone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LEAVES = """
import atexit, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed
from llmrl.runs import ranks

report, code, ranks.PATIENCE = Path(sys.argv[1]), int(sys.argv[2]), timedelta(seconds=float(sys.argv[3]))
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
if ranks.is_main():
    time.sleep(float(sys.argv[4]))
    report.touch()
atexit.register(print, "what was registered is done")
print("said", end=" ")
ranks.leave(code, together=code == 75)
"""


def begin(*words: str) -> list["subprocess.Popen[str]"]:
    """Two processes of one group, the first first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LEAVES, *words]
    return [
        subprocess.Popen(command, env={**group, "RANK": rank}, stdout=subprocess.PIPE, text=True) for rank in ("0", "1")
    ]


@pytest.mark.slow
def test_the_others_leave_when_the_first_has_reported(tmp_path: Path) -> None:
    first, second = begin(str(tmp_path / "report"), "75", "60", "2")
    said, _ = second.communicate(timeout=60)
    assert (tmp_path / "report").exists()
    assert (said, second.returncode) == ("said what was registered is done\n", 75)
    assert first.communicate(timeout=60)[0] == said
    assert first.returncode == 75


@pytest.mark.slow
def test_one_that_fails_alone_does_not_wait_for_ever(tmp_path: Path) -> None:
    first, second = begin(str(tmp_path / "report"), "1", "0.5", "600")
    second.communicate(timeout=60)
    assert second.returncode == 1
    assert first.poll() is None
    first.kill()
    first.communicate()
