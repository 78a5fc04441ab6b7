"""How far a run is, how fast, and how long it will take: a bar on a terminal, plain lines elsewhere.

Rates are over the last minute or so of this process; time spent in evaluation and saving counts, as it does for the
person who waits.
"""

import math
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from llmrl.runs.console import Console

LINE_SECONDS = 10.0
WINDOW = 64


class Progress:
    """Shows steps, reward, loss, tokens/s and the time left. Used as a context; `step` is called once a step."""

    def __init__(self, console: Console, total_steps: int, start: int = 0, tokens: int | None = None) -> None:
        """`total_steps` of the whole run, `start`: steps done before, `tokens`: tokens seen before (None: unknown)."""
        self.total_steps = total_steps
        self.done = start
        self._console = console
        self._loss: float | None = None
        self._reward: float | None = None
        self._readings: deque[tuple[float, int, int | None]] = deque([(time.monotonic(), start, tokens)], maxlen=WINDOW)
        self._last_line = (-math.inf, -1)
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._console.attach(None)
            self._bar.stop()
            self._bar = None

    def step(
        self, step: int, loss: float | None = None, num_tokens: int | None = None, reward: float | None = None
    ) -> None:
        """Step number `step` (from 1) is done; `num_tokens` counts from the run's beginning; `reward` is the mean of
        the step's rollouts, where there are any: the loss of a policy gradient says nothing about progress."""
        self.done = step
        self._reward = self._reward if reward is None else reward
        self._loss = self._loss if loss is None else loss
        self._readings.append((time.monotonic(), step, num_tokens))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=self._facts())
        elif step != self._last_line[1] and (
            step >= self.total_steps or time.monotonic() - self._last_line[0] > LINE_SECONDS
        ):
            self._last_line = (time.monotonic(), step)
            self._console.say(f"step {step}/{self.total_steps}  {self._facts()}")

    @property
    def tokens_per_second(self) -> float | None:
        """Over the window; None while it cannot be known."""
        known = [(at, tokens) for at, _, tokens in self._readings if tokens is not None]
        if len(known) < 2 or known[-1][0] <= known[0][0]:
            return None
        return (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])

    @property
    def seconds_left(self) -> float | None:
        """At the rate of the window; None while it cannot be known."""
        (begin, first, _), (end, last, _) = self._readings[0], self._readings[-1]
        return (end - begin) / (last - first) * max(self.total_steps - last, 0) if last > first else None

    def _facts(self) -> str:
        reward = "" if self._reward is None else f"reward {self._reward:.4g}"
        loss = "" if self._loss is None else f"loss {self._loss:.4f}"
        rate = self.tokens_per_second
        tokens = "" if rate is None else f"{rate:,.0f} tokens/s"
        left = self.seconds_left
        eta = "" if left is None else f"{clock(left)} left"
        return "  ".join(part for part in (reward, loss, tokens, eta) if part)

    def _open_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        screen = RichConsole(file=self._console.stream)  # type: ignore[arg-type]
        facts = TextColumn("{task.fields[facts]}")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), facts)
        self._bar = RichProgress(*columns, console=screen)
        self._task = self._bar.add_task("training", total=self.total_steps, completed=self.done, facts="")
        self._bar.start()
        self._console.attach(self._bar.console)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
