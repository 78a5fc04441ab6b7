"""What runs in a child process of `children.py`: judgements that can hang or crash on what a model wrote.

Invariants: nothing here imports torch; a child outlives neither its parent nor a request's limit, not even inside C
code that never lets go of the interpreter (the kernel's own alarm ends it); standard output belongs to nobody, so that
a library that prints cannot break the protocol.

Protocol, over the socket that is the child's standard input: each message is a length in 4 bytes, big-endian, and so
many bytes of JSON. The child says {"ready": true} first and then answers each request with {"score": number or null,
"reason": text}; null is no score.
"""

import json
import logging
import os
import re
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

CHANNEL = 0
HEADER = struct.Struct(">I")
PARENT_CHECK_SECONDS = 5.0
ALARM_GRACE_SECONDS = 1.0
"""The parent kills at the limit; the alarm is for a child whose parent is gone."""

Reply = dict[str, Any]


def equal(request: dict[str, Any]) -> Reply:
    """Whether `answer` equals `gold`, both LaTeX or plain mathematics without dollars or boxes, by math-verify."""
    from math_verify import verify  # type: ignore[import-untyped]

    gold = _parsed(request["gold"])
    if not gold:
        return {"score": None, "reason": f"the right answer {request['gold']!r} cannot be read"}
    right = verify(gold, _parsed(request["answer"]), timeout_seconds=None, raise_on_error=True)
    return {"score": float(right), "reason": ""}


def _parsed(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # In a box, so that the whole text is the expression. Only the child's end bounds the time: math-verify's own
    # limits are alarms, which C code ignores.
    return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)


def match(request: dict[str, Any]) -> Reply:
    """Whether the regular expression `pattern` matches at the start of `text`; `.` takes line ends too, `$` is any."""
    found = re.match(request["pattern"], request["text"], re.DOTALL | re.MULTILINE)
    return {"score": float(found is not None), "reason": ""}


HANDLERS: dict[str, Callable[[dict[str, Any]], Reply]] = {"equal": equal, "match": match}


def main() -> None:
    memory_mb = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(2, 1)
    logging.disable(logging.WARNING)  # math-verify warns of each limit that it is told to do without
    equal(
        {"gold": r"\frac{x}{2}", "answer": "x/2"}
    )  # loads and compiles what would else cost the first request its time

    parent = os.getppid()
    _send({"ready": True})
    while (request := _receive(parent)) is not None:
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + ALARM_GRACE_SECONDS)
        reply = _answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(reply)


def _answer(request: dict[str, Any]) -> Reply:
    try:
        return HANDLERS[request["kind"]](request)
    except MemoryError:
        raise  # what is left of this process is not to be trusted: the parent sees it end
    except Exception as error:
        return {"score": None, "reason": f"{type(error).__name__}: {str(error)[:200]}"}


def _receive(parent: int) -> dict[str, Any] | None:
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


def _send(reply: Reply) -> None:
    body = json.dumps(reply).encode()
    left = memoryview(HEADER.pack(len(body)) + body)
    while left:
        left = left[os.write(CHANNEL, left) :]


if __name__ == "__main__":
    main()
