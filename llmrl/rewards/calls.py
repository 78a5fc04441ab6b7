"""One call of a reward function, which may raise, hang, or return anything at all.

Invariants: a call ends within its limit, whatever the function does (a thread that hangs is left behind, counted and
said); what is not a finite number is no score; a function that fails again and again ends the run with its own words.
"""

import asyncio
import contextlib
import inspect
import math
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llmrl.errors import RefusedError, RunFailedError
from llmrl.rewards.functions import RewardFunction, Rewards
from llmrl.rewards.loading import is_async

Say = Callable[[str], None]
PACKAGE = Path(__file__).resolve().parents[1]


class _FailedCallError(Exception):
    """A call that gave no scores; the message is what is said of it. `fault`: what a function that raised did wrong."""

    def __init__(self, message: str, fault: "_Fault | None" = None) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True)
class _Fault:
    """What a function raised: the whole `text` with its traceback, one `line`, and the `place` in the code."""

    text: str
    line: str
    place: tuple[str, str, int]

    @classmethod
    def of(cls, error: BaseException) -> "_Fault":
        own = _own_frames(error.__traceback__)
        frame = traceback.extract_tb(own)[-1]
        what = "".join(traceback.format_exception_only(error)).strip()
        return cls(
            "raised:\n" + "".join(traceback.format_exception(type(error), error, own)).rstrip(),
            f"raised, in {frame.name} ({frame.filename}, line {frame.lineno}): {what}",
            (type(error).__name__, frame.filename, frame.lineno or 0),
        )


@dataclass
class Tally:
    """Of one function, over all calls. `no_score`: completions without one; of these `invalid` were given something
    that is no finite number, or outside of its range. `failures`: calls that raised or timed out, or whose values were
    all invalid. `abandoned`: threads left behind, which cannot be ended."""

    calls: int = 0
    no_score: int = 0
    invalid: int = 0
    failures: int = 0
    abandoned: int = 0
    seconds: float = 0.0


class Caller:
    """Calls one reward function: in the event loop if it is asynchronous, else in a thread, one call at a time."""

    def __init__(
        self,
        label: str,
        function: RewardFunction,
        timeout_seconds: float,
        max_failures: int,
        say: Say,
        within: tuple[float, float] | None = None,
    ) -> None:
        """`within`: [low, high], outside of which a number is no score."""
        self.label, self.function, self.say = label, function, say
        self.within = within
        self.timeout = None if function.bounded else timeout_seconds
        self.max_failures = max_failures
        self.tally = Tally()
        self._in_a_row = 0
        self._told: set[tuple[str, str, int]] = set()  # places whose traceback was said
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None

    async def __call__(self, arguments: dict[str, Any], count: int) -> Rewards:
        """[count] scores. Raises RunFailedError for what is plainly a bug of the function, and after `max_failures`
        failing calls in a row."""
        self._fitting(arguments)
        begun = time.monotonic()
        try:
            returned = await self._run(arguments)
            scores, invalid = self._scores(returned, count)
            if invalid and len(invalid) == count:
                raise _FailedCallError(f"returned {_short(invalid[0])}, which is {self._wrong}, for all completions")
        except _FailedCallError as failure:
            scores, invalid = [None] * count, []
            self._failed(str(failure) if failure.fault is None else self._raised(failure.fault, arguments))
        else:
            self._in_a_row = 0
            self._mention(invalid, count)
        tally = self.tally
        tally.calls += 1
        tally.no_score += scores.count(None)
        tally.invalid += len(invalid)
        tally.seconds += time.monotonic() - begun
        return scores

    async def try_out(self, arguments: dict[str, Any], count: int) -> None:
        """One call before any training. Raises RefusedError where it gives no [count] scores; None is one here."""
        try:
            self._fitting(arguments)
            self._scores(await self._run(arguments), count)
        except _FailedCallError as failure:
            why = str(failure) if failure.fault is None else self._raised(failure.fault, arguments)
            raise RefusedError(f"reward function {self.label}, tried with one short answer, {why}") from failure
        except RunFailedError as error:
            raise RefusedError(f"tried with one short answer: {error}") from error

    def _fitting(self, arguments: Collection[str]) -> None:
        for names in self.function.needs:
            if not any(name in arguments for name in names):
                raise RunFailedError(
                    f"reward function {self.label} needs {columns_named(names)}, and gets "
                    f"{', '.join(sorted(arguments))}. {self.function.remedy(names, arguments)}"
                )

    async def _run(self, arguments: dict[str, Any]) -> Any:
        if is_async(self.function.call):
            return await self._awaited(arguments)
        async with self._turn():
            return await self._in_thread(arguments)

    def _turn(self) -> asyncio.Lock:
        """Functions written for one thread are called from one at a time. A lock belongs to one event loop."""
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = (loop, asyncio.Lock())
        return self._gate[1]

    async def _awaited(self, arguments: dict[str, Any]) -> Any:
        task = asyncio.ensure_future(self.function(**arguments))
        try:
            await asyncio.wait({task}, timeout=self.timeout)
        finally:
            if not task.done():
                task.cancel()  # and not waited for: a function may swallow it
        if not task.done():
            raise _FailedCallError(f"gave no answer within {self.timeout:g} s")
        if task.cancelled():
            raise _FailedCallError("cancelled itself")
        if error := task.exception():
            raise _FailedCallError("raised", _Fault.of(error))
        return task.result()

    async def _in_thread(self, arguments: dict[str, Any]) -> Any:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

        def work() -> None:
            try:
                outcome: tuple[Any, BaseException | None] = (self.function(**arguments), None)
            except BaseException as error:  # SystemExit too: it would end the thread without an answer
                outcome = (None, error)
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(outcome))

        threading.Thread(target=work, name=f"reward-{self.label}", daemon=True).start()
        try:
            returned, error = await asyncio.wait_for(ended, self.timeout)
        except TimeoutError:
            self.tally.abandoned += 1
            raise _FailedCallError(
                f"gave no answer within {self.timeout:g} s; its thread cannot be ended and is left behind "
                f"({self.tally.abandoned} so far)"
            ) from None
        if error is not None:
            raise _FailedCallError("raised", _Fault.of(error))
        return returned

    def _scores(self, returned: Any, count: int) -> tuple[Rewards, list[Any]]:
        """(scores, the values that are none). Raises RunFailedError where it is not a list of the right length."""
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        numbers = "1 number" if count == 1 else f"{count} numbers"
        expected = f"expected a list of {numbers}, one for each completion of the call, None for no score"
        if not isinstance(values, list | tuple):
            if inspect.iscoroutine(values):
                values.close()
            raise RunFailedError(f"reward function {self.label} returned {_short(returned)}; {expected}")
        if len(values) != count:
            raise RunFailedError(f"reward function {self.label} returned {len(values)} values; {expected}")
        scores = [self._score(value) for value in values]
        return scores, [v for v, score in zip(values, scores, strict=True) if score is None and v is not None]

    def _score(self, value: Any) -> float | None:
        number = _number(value)
        inside = number is None or self.within is None or self.within[0] <= number <= self.within[1]
        return number if inside else None

    @property
    def _wrong(self) -> str:
        return "no finite number" if self.within is None else f"no number from {self.within[0]:g} to {self.within[1]:g}"

    def _raised(self, fault: _Fault, arguments: dict[str, Any]) -> str:
        """A traceback is said once; what is raised at the same place again gets a line."""
        if fault.place in self._told:
            return fault.line
        self._told.add(fault.place)
        kind, completions = fault.place[0], arguments.get("completions")
        if not completions or kind not in ("TypeError", "AttributeError", "KeyError"):
            return fault.text
        return f"{fault.text}\n{_form_of(completions[0])}"

    def _failed(self, why: str) -> None:
        self.tally.failures += 1
        self._in_a_row += 1
        if self._in_a_row >= self.max_failures:
            raise RunFailedError(
                f"reward function {self.label} failed {self._in_a_row} times in a row; the last time it {why}\n"
                "Mend the function, or raise reward_timeout_seconds or reward_max_failures, and resume the run"
            )
        self.say(f"reward function {self.label} failed ({self._in_a_row} in a row), no score: it {why}")

    def _mention(self, invalid: list[Any], count: int) -> None:
        if invalid and not self.tally.invalid:
            self.say(
                f"reward function {self.label} gave {_short(invalid[0])}, {self._wrong}, in a call in which "
                f"{len(invalid)} of {count} completions got none: that counts as no score (said once)"
            )


def _number(value: Any) -> float | None:
    """A finite number as a float, also one of numpy or torch; else None."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):  # more than one number
            return None
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def columns_named(names: tuple[str, ...]) -> str:
    return "the column " + " or ".join(f"`{name}`" for name in names)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = "something"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _own_frames(found: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this package that led to the function; all of it where it has no others."""
    own = found
    while own is not None and Path(own.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
        own = own.tb_next
    return own or found


def _form_of(completion: Any) -> str:
    """What trips functions that were written for the other kind of row."""
    if isinstance(completion, str):
        return "(Its completions are text here, as the rows' prompts are.)"
    return (
        "(Its completions are lists of messages here, and text only where a row's prompt is: what the model said is "
        'completion[0]["content"], or llmrl.rewards.texts.text_of(completion).)'
    )
