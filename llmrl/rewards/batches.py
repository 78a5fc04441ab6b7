"""Rows of many calls in one forward pass of a model: PPO's calls are of a single row each.

Invariants: one thread computes; whoever calls waits in its event loop, which goes on; a call gets its own scores or its
own error, whoever shared a batch with it.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llmrl.rewards.functions import Rewards

Sequences = list[list[int] | None]


@dataclass
class _Call:
    """Rows that were asked for together; `sequences` are their token ids, None for a row that cannot be scored."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    result: Future[Rewards] = field(default_factory=Future)
    sequences: Sequences = field(default_factory=list)


class Batches:
    """Scores rows of prompts and completions.

    `tokenize` makes token ids of them (None: no score), `score` a number of each list of ids. What waits is scored
    together as soon as it is `rows` rows, or when the first of them has waited `wait_seconds`. 0: calls stay apart.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[Any], Sequence[Any]], Sequences],
        score: Callable[[list[list[int]]], list[float]],
        rows: int,
        wait_seconds: float,
    ) -> None:
        self._tokenize, self._score, self._rows, self._wait_seconds = tokenize, score, rows, wait_seconds
        self._waiting: list[_Call] = []
        self._came = threading.Condition()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward-model")  # ends with whoever holds this

    async def scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Rewards:
        """One for each row. Raises what went wrong with these rows."""
        call = _Call(prompts, completions)
        with self._came:
            self._waiting.append(call)
            self._came.notify()
        self._thread.submit(self._work)
        return await asyncio.wrap_future(call.result)

    def _work(self) -> None:
        """The calls that wait; there are none where an earlier one took them along."""
        readable = []
        for call in self._taken():
            try:
                call.sequences = self._tokenize(call.prompts, call.completions)
                readable.append(call)
            except Exception as error:
                call.result.set_exception(error)
        if readable:
            self._settle(readable)

    def _taken(self) -> list[_Call]:
        with self._came:
            until = time.monotonic() + self._wait_seconds
            while self._waiting and self._num_rows() < self._rows and (left := until - time.monotonic()) > 0:
                self._came.wait(left)
            taken = self._waiting[:] if self._wait_seconds else self._waiting[:1]
            del self._waiting[: len(taken)]
        return [call for call in taken if call.result.set_running_or_notify_cancel()]

    def _num_rows(self) -> int:
        return sum(len(call.prompts) for call in self._waiting)

    def _settle(self, calls: list[_Call]) -> None:
        rows = [ids for call in calls for ids in call.sequences if ids is not None]
        try:
            scores = iter(self._score(rows) if rows else [])
        except Exception as error:
            if len(calls) == 1:
                calls[0].result.set_exception(error)
                return
            for call in calls:  # each on its own, so that the error reaches whose it is
                self._settle([call])
            return
        for call in calls:
            call.result.set_result([None if ids is None else next(scores) for ids in call.sequences])
