"""Synchronous code of a user's, called from an event loop that must go on."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def call(function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Any:
    """`function(*arguments)`: awaited if it is a coroutine function, else run in a thread of its own.

    Raises TimeoutError after `timeout` seconds. A thread cannot be stopped: one that overruns is left behind as a
    daemon, which does not keep the process from ending.
    """
    async with asyncio.timeout(timeout):
        if inspect.iscoroutinefunction(function):
            return await function(*arguments)
        result = await _in_thread(function, *arguments)
        return await result if inspect.isawaitable(result) else result


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def work() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (function(*arguments), None)
        except BaseException as error:
            outcome = (None, RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name=f"call of {getattr(function, '__qualname__', function)}", daemon=True).start()
    return await future
