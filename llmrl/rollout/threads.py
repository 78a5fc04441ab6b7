"""Synchronous code of a user's, called from an event loop that must go on.

Invariants: a call ends within its limit; a thread cannot be stopped, so that one which overruns is left behind as a
daemon, which does not keep the process from ending; what ends a thread (`SystemExit`, too) is an Exception out here.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from llmrl.envs.protocol import Environment, EnvironmentFactory, Row

AT_ONCE_SECONDS = 0.1
AT_ONCE_ALTOGETHER = 1.0
Outcome = tuple[Any, Exception | None]


class OverdueError(TimeoutError):
    """The call itself took too long; what the function raised as a TimeoutError of its own is none."""


async def call(function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Any:
    """`function(*arguments)`: awaited if it is a coroutine function, else run in a thread of its own.

    Raises OverdueError after `timeout` seconds.
    """
    return await _within(timeout, _called(function, arguments))


async def _called(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    result = _value(await asyncio.wrap_future(_started(function, *arguments)))
    return await result if inspect.isawaitable(result) else result


class Maker:
    """Makes environments: their constructors are plain code of a user's, which may block.

    The loop waits for each, so that with environments that never wait things happen in the same order in every run:
    until one takes longer than `AT_ONCE_SECONDS`, or all together longer than `AT_ONCE_ALTOGETHER`. Those that come
    after it hold nobody up.
    """

    def __init__(self, factory: EnvironmentFactory, timeout: float | None) -> None:
        self.factory, self.timeout = factory, timeout
        self._at_once = AT_ONCE_ALTOGETHER

    async def make(self, row: Row, seed: int) -> Environment:
        """`factory(row, seed)`. Raises OverdueError after `timeout` seconds: what comes later is closed unused."""
        outcome = _started(self.factory, row, seed)
        if self._at_once > 0:
            began = time.monotonic()
            overran = wait([outcome], AT_ONCE_SECONDS).not_done
            self._at_once = 0.0 if overran else self._at_once - (time.monotonic() - began)
        try:
            if not outcome.done():
                await _within(self.timeout, asyncio.wrap_future(outcome))
            return _value(outcome.result())
        except BaseException:
            outcome.add_done_callback(_close_unused)
            raise


async def _within(seconds: float | None, awaited: Any) -> Any:
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaited
    except TimeoutError as error:
        if seconds is not None and limit.expired():
            raise OverdueError(f"took longer than {seconds:g} s") from error
        raise


def _started(function: Callable[..., Any], *arguments: Any) -> "Future[Outcome]":
    """The outcome to come of a call that runs in a thread."""
    future: Future[Outcome] = Future()
    future.set_running_or_notify_cancel()  # nobody who gives up waiting takes it from the others

    def work() -> None:
        outcome: Outcome
        try:
            outcome = function(*arguments), None
        except BaseException as error:
            outcome = None, _ordinary(error)
        future.set_result(outcome)

    threading.Thread(target=work, name=f"call of {getattr(function, '__qualname__', function)}", daemon=True).start()
    return future


def _ordinary(error: BaseException) -> Exception:
    """An error that a coroutine can raise and a caller can handle."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(repr(error)).with_traceback(error.__traceback__)


def _value(outcome: Outcome) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


def _close_unused(made: "Future[Outcome]") -> None:
    """Close what was made for nobody; how that goes, nobody hears."""
    environment, error = made.result()
    if error is None:
        threading.Thread(target=_closed, args=(environment,), name="close of an environment", daemon=True).start()


def _closed(environment: Environment) -> None:
    with suppress(Exception):
        asyncio.run(call(environment.close))
