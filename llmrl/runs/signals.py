"""SIGTERM and SIGINT as a wish to stop with a whole checkpoint.

Invariants: while steps are being trained a signal sets `run.interrupted` and the loop ends the step (or gives it up,
where nothing is changed yet), saves, and raises RunInterruptedError; before training there is nothing to save, so it
is raised at once, but for those who listen for it themselves (`run.listening`); a later signal ends the process at
once with 128 + its number. Launchers pass a signal on that the process may have got already from its group, so
signals within `SAME_WISH` seconds of the first are the same wish. Forked workers die of a signal as ever.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from llmrl.errors import RunInterruptedError
from llmrl.runs.console import complain
from llmrl.runs.directory import Run

SAME_WISH = 3.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """Within the context signals mean the above; the earlier handlers come back after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []
    owner = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != owner:  # a forked worker has this handler too, and its pool waits for it to die
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if first:
            if time.monotonic() - first[0] >= SAME_WISH:
                if run.is_main:
                    complain(f"{name} again: ending at once, what is not yet saved is lost")
                os._exit(128 + number)
            return
        first.append(time.monotonic())
        run.interrupted = True
        if not (run.training or run.listens):
            raise RunInterruptedError(f"{name} before the first step; nothing was trained yet")
        run.note(
            f"{name}: process {owner} stops with a checkpoint, at the latest after this step, even if its launcher "
            f"ends before it (once more in {SAME_WISH:.0f} s or later: at once)"
        )

    earlier = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
