"""A small pool of child processes for work that can hang: neither a hang nor a crash costs more than itself.

Invariants: every request is answered, with a value or with the reason for none, within its limit of seconds once a
child has it; a child that overruns or ends is killed, waited for and replaced; at most `processes` children live at a
time, none before the first request, none after `close`; an event loop is never blocked.

One thread a child does the waiting, so the pool can be used from any event loop, and from none. What a child does is
said by the module that is started in it (`serving.py`). This protects from accidents (an answer over which a library
hangs or swells), not from hostile code: nothing that runs a model's text may be called there.
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
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from llmrl.children.serving import HEADER

START_SECONDS = 120.0
"""For Python and its libraries to load on a busy machine; not part of any request's limit."""
MOST_FAILED_STARTS = 3
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL")
"""What a child gets of our environment: enough to start, no secrets."""


class ChildStartError(Exception):
    """Children cannot be started at all: the message holds what the last one said."""


@dataclass(frozen=True)
class Answer:
    """`value`, anything that JSON holds, is None where there is none, and then `reason` says why."""

    value: Any
    reason: str = ""


CLOSED = Answer(None, "the pool was closed")


@dataclass
class PoolCounts:
    """What happened so far. `killed`: overran their limit. `crashed`: ended by themselves within a request."""

    answered: int = 0
    killed: int = 0
    crashed: int = 0
    started: int = 0


class ChildPool:
    """Up to `processes` children that run `python -m module`, with `memory_mb` of address space each and `seconds` for
    a request. `variables`: of their environment, beside the few of ours that they get."""

    def __init__(
        self, module: str, processes: int, seconds: float, memory_mb: int, variables: Mapping[str, str] | None = None
    ) -> None:
        self.module, self.processes, self.seconds, self.memory_mb = module, processes, seconds, memory_mb
        self.variables = dict(variables or {})
        self.counts = PoolCounts()
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], Future[Answer]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._children: set[_Child] = set()
        self._lock = threading.Lock()
        self._open = self._failed_starts = 0  # requests without an answer; children that did not start, in a row
        self._closed = False

    async def ask(self, kind: str, **request: Any) -> Answer:
        """The answer of a child. Raises ChildStartError where none can be started."""
        return await asyncio.wrap_future(self.submit(kind, **request))

    def submit(self, kind: str, seconds: float | None = None, **request: Any) -> "Future[Answer]":
        """The same for callers without an event loop. `seconds`: this request's limit, where it has one of its own.
        Raises RuntimeError after `close`."""
        future: Future[Answer] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of child processes is closed")
            self._requests.put(({"kind": kind, "seconds": seconds or self.seconds, **request}, future))
            self._open += 1
            if len(self._threads) < min(self._open, self.processes):
                # A daemon: a program that ends without `close` is not held up, and its children end with it.
                thread = threading.Thread(target=self._serve, name=f"child of {self.module}", daemon=True)
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
            answer: Answer | Exception = CLOSED
            wanted = future.set_running_or_notify_cancel()
            if wanted and not self._closed:
                try:
                    child = self._living(child)
                    answer = self._asked(child, request)
                except Exception as error:  # whatever it is, nobody may wait for ever
                    self._drop(child)
                    child, answer = None, error
            with self._lock:
                self._open -= 1
                answer = CLOSED if self._closed else answer
            if wanted:
                future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
        self._drop(child)

    def _living(self, child: "_Child | None") -> "_Child":
        """The thread's child, or a new one in its place."""
        if child is not None and child.process.poll() is None:
            return child
        self._drop(child)
        return self._start()

    def _asked(self, child: "_Child", request: dict[str, Any]) -> Answer:
        try:
            reply = child.exchange(request, request["seconds"])
        except TimeoutError:
            self._drop(child)
            self._count("killed")
            return Answer(None, f"no answer within {request['seconds']:g} s")
        except (OSError, EOFError):
            ending = child.ending()
            self._drop(child)
            self._count("crashed")
            return Answer(None, f"the child process ended {ending}")
        self._count("answered")
        return Answer(reply["value"], reply["reason"])

    def _start(self) -> "_Child":
        """A child that is ready. Raises ChildStartError, at once where the last few starts have failed."""
        if self._failed_starts >= MOST_FAILED_STARTS:
            raise ChildStartError(
                f"child processes ({self.module}) failed to start {self._failed_starts} times in a row"
            )
        child = _Child(self.module, self.memory_mb, self.variables)
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
            raise ChildStartError(f"a child process ({self.module}) did not start: {said or child.ending()}") from None
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
    """One process and our end of its socket. It finds the packages that we find."""

    def __init__(self, module: str, memory_mb: int, further: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        self._socket, theirs = socket.socketpair()
        variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        with theirs:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(memory_mb)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                cwd="/",
                env={**variables, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **further},
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
