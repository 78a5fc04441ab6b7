"""The child's side of `pool.py`: a module that is started there ends with `serve(handlers, prepare)`.

Invariants: a child outlives neither its parent nor a request's limit, not even inside C code that never lets go of the
interpreter (the kernel's own alarm ends it); standard output belongs to nobody, so that a library that prints cannot
break the protocol; memory is limited before anything is loaded.

Protocol, over the socket that is the child's standard input: each message is a length in 4 bytes, big-endian, and so
many bytes of JSON. The child says {"ready": true} first and then answers each request, {"kind": a handler's name,
"seconds": its limit, ...}, with {"value": what the handler returned, "reason": ""}, or null and why it raised.
"""

import json
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

CHANNEL = 0
HEADER = struct.Struct(">I")
PARENT_CHECK_SECONDS = 5.0
ALARM_GRACE_SECONDS = 1.0
"""The parent kills at the limit; the alarm is for a child whose parent is gone."""

Request = dict[str, Any]
Handler = Callable[[Request], Any]


def serve(handlers: Mapping[str, Handler], prepare: Callable[[], None]) -> None:
    """Answer requests until the parent is gone. `prepare` loads what would cost the first request its time. The first
    argument of the command line is the limit of address space in MiB."""
    memory = int(sys.argv[1]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(2, 1)
    parent = os.getppid()
    prepare()
    _send({"ready": True})
    while (request := _receive(parent)) is not None:
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + ALARM_GRACE_SECONDS)
        reply = _answer(handlers, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(reply)


def _answer(handlers: Mapping[str, Handler], request: Request) -> dict[str, Any]:
    try:
        return {"value": handlers[request["kind"]](request), "reason": ""}
    except MemoryError:
        raise  # what is left of this process is not to be trusted: the parent sees it end
    except Exception as error:
        return {"value": None, "reason": f"{type(error).__name__}: {str(error)[:200]}"}


def _receive(parent: int) -> Request | None:
    """The next request, or None once the parent is gone (its end of the socket may live on in another of its forks)."""
    while not select.select([CHANNEL], [], [], PARENT_CHECK_SECONDS)[0]:
        if os.getppid() != parent:
            return None
    header = _exactly(HEADER.size)
    body = header and _exactly(HEADER.unpack(header)[0])
    return json.loads(body) if body else None


def _exactly(size: int) -> bytes | None:
    read = bytearray()
    while len(read) < size:
        part = os.read(CHANNEL, size - len(read))
        if not part:
            return None
        read += part
    return bytes(read)


def _send(reply: dict[str, Any]) -> None:
    body = json.dumps(reply).encode()
    left = memoryview(HEADER.pack(len(body)) + body)
    while left:
        left = left[os.write(CHANNEL, left) :]
