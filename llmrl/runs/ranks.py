"""Which process of how many this is, as accelerate and torchrun tell it in the environment; no torch needed.

Invariant: the first process reports before the others leave. A launcher ends all that are left as soon as one has gone
with another code than 0, and the summary would be lost.
"""

import atexit
import contextlib
import os
import signal
import sys
from datetime import timedelta
from typing import Any, NoReturn

PATIENCE = timedelta(seconds=30)
"""How long the others wait for the first process's report; it may be gone."""
REPORTED = "llmrl/reported"


def rank() -> int:
    """This process's number over all machines; 0 writes and speaks."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def zero_stage() -> int:
    """DeepSpeed's ZeRO stage that these processes were launched for; 0 for none, or where only a file of DeepSpeed's
    own says it."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return 0
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 0)


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def leave(code: int, together: bool) -> NoReturn:
    """End this process with this code. `together`: all ranks come to this end, so that their group can be closed.

    One of several processes ends without the interpreter's finalisation, during which threads of the process group and
    of DeepSpeed are still releasing Python objects: they would abort it, and the launcher would report a failure.
    """
    if world_size() == 1:
        sys.exit(code)
    for number in (signal.SIGTERM, signal.SIGINT):  # launchers pass on what has just ended the run
        signal.signal(number, signal.SIG_IGN)
    distributed = _group()
    if distributed is not None:
        _wait_for_the_report(distributed)
        if together:
            distributed.destroy_process_group()
    atexit._run_exitfuncs()  # what libraries and trackers still have to do
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, gone, or never there
            stream.flush()
    os._exit(code)


def _group() -> Any:
    """torch.distributed where this process is in a group, else None."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _wait_for_the_report(distributed: Any) -> None:
    store = distributed.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):  # the first process never came to this, or has gone with the store
        if is_main():
            store.set(REPORTED, "")
        else:
            store.wait([REPORTED], PATIENCE)
