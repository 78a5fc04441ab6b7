"""A small pool of child processes for judgements that can hang: neither a hang nor a crash costs more than itself.

Invariants: every request is answered, with a score or with the reason for none, within its limit of seconds once a
child has it; a child that overruns or ends is killed, waited for and replaced; at most `processes` children live at a
time, none before the first request, none after `close`; an event loop is never blocked.

One thread a child does the waiting, so the pool can be used from any event loop, and from none.
"""

import asyncio
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llmrl.rewards.child import HEADER

START_SECONDS = 120.0
"""For Python and its libraries to load on a busy machine; not part of any request's limit."""
MOST_FAILED_STARTS = 3
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL")
"""What a child gets of our environment: enough to start, no secrets."""


class ChildStartError(Exception):
    """Children cannot be started at all: the message holds what the last one said."""


@dataclass(frozen=True)
class Judgement:
    """`score` is None where there is none, and then `reason` says why."""

    score: float | None
    reason: str = ""


@dataclass
class PoolCounts:
    """What happened so far. `killed`: overran their limit. `crashed`: ended by themselves within a request."""

    answered: int = 0
    killed: int = 0
    crashed: int = 0
    started: int = 0


@dataclass
class ChildPool:
    """`processes` children with `memory_mb` of address space each and `seconds` for a judgement."""

    processes: int = 2
    seconds: float = 5.0
    memory_mb: int = 1024
    counts: PoolCounts = field(default_factory=PoolCounts)

    def __post_init__(self) -> None:
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], Future[Judgement]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._children: set[_Child] = set()
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._closed = False

    async def ask(self, kind: str, **request: str) -> Judgement:
        """The judgement of a child. Raises ChildStartError where none can be started."""
        return await asyncio.wrap_future(self.submit(kind, **request))

    def submit(self, kind: str, **request: str) -> "Future[Judgement]":
        """The same for callers without an event loop. Raises RuntimeError after `close`."""
        future: Future[Judgement] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of verifier processes is closed")
            self._requests.put(({"kind": kind, "seconds": self.seconds, **request}, future))
            if len(self._threads) < self.processes:
                # A daemon: a program that ends without `close` is not held up, and its children end with it.
                thread = threading.Thread(target=self._serve, name="verifier-child", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    @property
    def pids(self) -> list[int]:
        """Of the children that live now."""
        with self._lock:
            return [child.process.pid for child in self._children]

    def close(self) -> None:
        """End all children, also in the middle of a request, and wait until they are gone."""
        with self._lock:
            self._closed = True
            threads, children = list(self._threads), list(self._children)
        for child in children:
            child.process.kill()
        for _ in threads:
            self._requests.put(None)
        for thread in threads:
            thread.join()

    def _serve(self) -> None:
        child: _Child | None = None
        while (item := self._requests.get()) is not None:
            request, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if child is not None and child.process.poll() is not None:
                    self._drop(child)
                    child = None
                if not self._closed:
                    child = child or self._start()
                    judgement = self._judge(child, request)
                    if not child.usable:
                        self._drop(child)
                        child = None
            except Exception as error:  # whatever it is, nobody may wait for ever
                if not self._closed:
                    future.set_exception(error)
                    continue
            future.set_result(Judgement(None, "the pool was closed") if self._closed else judgement)
        self._drop(child)

    def _judge(self, child: "_Child", request: dict[str, Any]) -> Judgement:
        try:
            reply = child.exchange(request, self.seconds)
        except TimeoutError:
            child.usable = False
            self._count("killed")
            return Judgement(None, f"no answer within {self.seconds:g} s")
        except (OSError, EOFError):
            child.usable = False
            self._count("crashed")
            return Judgement(None, f"the verifier process ended {child.ending()}")
        self._count("answered")
        return Judgement(reply["score"], reply["reason"])

    def _start(self) -> "_Child":
        """A child that is ready. Raises ChildStartError, at once where the last few starts have failed."""
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise ChildStartError(f"verifier processes failed to start {self._failed_starts} times in a row")
        child = _Child(self.memory_mb)
        with self._lock:
            self._children.add(child)
            closed = self._closed
        try:
            if closed:
                raise EOFError
            child.exchange(None, START_SECONDS)
        except (TimeoutError, OSError, EOFError):
            self._failed_starts += not self._closed
            said = child.said()
            self._drop(child)
            raise ChildStartError(f"a verifier process did not start: {said or child.ending()}") from None
        self._failed_starts = 0
        self._count("started")
        return child

    def _drop(self, child: "_Child | None") -> None:
        if child is not None:
            child.end()
            with self._lock:
                self._children.discard(child)

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self.counts, name, getattr(self.counts, name) + 1)


class _Child:
    """One process and our end of its socket. It finds the packages that we find. `usable`: it can take a request."""

    def __init__(self, memory_mb: int) -> None:
        self.usable = True
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        self._socket, theirs = socket.socketpair()
        variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        with theirs:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-P", "-m", "llmrl.rewards.child", str(memory_mb)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                cwd="/",
                env=variables | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                start_new_session=True,  # Ctrl-C in a terminal is for us to handle
            )

    def exchange(self, request: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        """Send `request`, if any, and read one message. Raises TimeoutError, or OSError or EOFError at a dead child."""
        deadline = time.monotonic() + seconds
        if request is not None:
            body = json.dumps(request).encode()
            self._socket.settimeout(seconds)
            self._socket.sendall(HEADER.pack(len(body)) + body)
        size = HEADER.unpack(self._exactly(HEADER.size, deadline))[0]
        return json.loads(self._exactly(size, deadline))

    def _exactly(self, size: int, deadline: float) -> bytes:
        read = bytearray()
        while len(read) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            part = self._socket.recv(size - len(read))
            if not part:
                raise EOFError
            read += part
        return bytes(read)

    def ending(self) -> str:
        """How the process ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=1)
            return f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return "without saying why"

    def said(self) -> str:
        """The last lines that it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-500:]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._socket.close()
        self._errors.close()
