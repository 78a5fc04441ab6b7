"""Items and scorers of reasoning-gym, in processes of their own that can be killed.

Invariants: a score is a finite number from a process that answered in time; a process that hangs or dies costs this
one answer and is replaced; it has no environment variables but those that Python needs, is short of memory before this
machine is, and ends with its parent. This protects from accidents (an answer over which a scorer hangs or swells), not
from hostile code: nothing that runs a model's text may be called there.
"""

import contextlib
import functools
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from llmrl.errors import RefusedError

PROCESSES = 2
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
START_SECONDS = 120  # imports on a loaded machine
MAKE_SECONDS = 300


class Scorer:
    """Up to `PROCESSES` children, started when they are needed; safe to call from many threads."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(PROCESSES)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []

    def score(self, item: dict[str, Any], deadline: float) -> float | None:
        """The score of an item's answer, or None where the scorer did not answer within `deadline` seconds.

        0 where the scorer raised an exception. Raises RefusedError where the item is not what it was.
        """
        reply = self._reply({"verb": "score", **item}, deadline)
        if reply is None:
            return None
        score = reply.get("score")
        return float(score) if isinstance(score, int | float) and math.isfinite(score) else 0.0

    def items(self, which: dict[str, Any]) -> list[list[str]]:
        """[question, answer] of the items that `which` names; raises RefusedError where they cannot be made."""
        reply = self._reply({"verb": "items", **which}, MAKE_SECONDS)
        if reply is None:
            raise RefusedError(f"reasoning_gym:{which['task']} made no items within {MAKE_SECONDS} seconds")
        return list(reply["items"])

    def close(self) -> None:
        """End the idle children."""
        with self._lock:
            children, self._idle = self._idle, []
        for child in children:
            child.kill()

    def _reply(self, request: dict[str, Any], deadline: float) -> dict[str, Any] | None:
        with self._free:
            child = self._take()
            reply = child.ask(request, deadline)
            if reply is None:
                child.kill()
                return None
            with self._lock:
                self._idle.append(child)
        if "fault" in reply:
            raise RefusedError(reply["fault"])
        return reply

    def _take(self) -> "_Child":
        with self._lock:
            return self._idle.pop() if self._idle else _Child()


@functools.cache
def scorer() -> Scorer:
    """The one of this process."""
    return Scorer()


class _Child:
    """One process; a line of JSON in, one out."""

    def __init__(self) -> None:
        environment = {key: os.environ[key] for key in KEPT if key in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmrl.envs.reasoning_scorer"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**environment, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )  # fmt: skip
        self._ready = False

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any] | None:
        """Its reply; None where it died or took too long."""
        if not self._ready:
            self._ready = self._line(START_SECONDS) is not None
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**request, "deadline": deadline}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        line = self._line(deadline)
        try:
            reply = json.loads(line) if line else None
        except ValueError:
            return None
        return reply if isinstance(reply, dict) else None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it never read
                    pipe.close()

    def _line(self, seconds: float) -> bytes | None:
        """The next line of its output, within `seconds`."""
        assert self._process.stdout is not None
        until, data, handle = time.monotonic() + seconds, b"", self._process.stdout.fileno()
        while not data.endswith(b"\n"):
            readable, _, _ = select.select([handle], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(handle, 65536) if readable else b""
            if not chunk:
                return None
            data += chunk
        return data
