"""The two faces of an engine that decodes in steps: a batch at once, and many callers that each await one completion.

    class MyEngine(SteppedEngine):    # gives _add, _step, _abort and _check

Requests join and leave between steps. A step of the engine runs on the caller's event loop: what else runs there
(environments, rewards) goes on between two steps.

Invariant: before each step every caller whose completion came with the last one has run up to its next wait, so with
environments that never wait the requests of a step, and with them every sample, are the same in every run.
"""

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from llmrl.rollout.protocol import Completion, SamplingParams, row_seed


class SteppedEngine:
    """`generate` and `complete` on top of four methods of the engine's own."""

    policy_version: int = 0

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._callers: dict[int, asyncio.Future[Completion]] = {}
        self._driver: asyncio.Task[None] | None = None

    # -- what the engine gives -----------------------------------------------------------------------------------

    def _check(self, prompt_ids: Sequence[int], sampling: SamplingParams, number: int) -> None:
        """Raise RefusedError for a prompt (the `number`th, from 1) that cannot be continued."""
        raise NotImplementedError

    def _add(self, key: int, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Queue one completion (`sampling.n` 1, its seed `sampling.seed`)."""
        raise NotImplementedError

    def _step(self) -> list[tuple[int, Completion]]:
        """Decode one token of everything under way; returns what has ended, by key."""
        raise NotImplementedError

    def _abort(self, keys: Sequence[int]) -> None:
        """Forget these requests, wherever they are."""
        raise NotImplementedError

    def _working(self) -> AbstractContextManager[None]:
        """Around a run of steps."""
        return nullcontext()

    # -- what callers use ----------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """For each prompt `sampling.n` completions. Raises RefusedError for a prompt that cannot be continued."""
        for number, ids in enumerate(prompt_ids, 1):
            self._check(ids, sampling, number)
        places: dict[int, tuple[int, int]] = {}
        found: dict[tuple[int, int], Completion] = {}
        # The longest first, so that what does not fit into memory shows at once.
        for p in sorted(range(len(prompt_ids)), key=lambda p: len(prompt_ids[p]), reverse=True):
            for s in range(sampling.n):
                key = next(self._keys)
                places[key] = (p, s)
                self._add(key, prompt_ids[p], replace(sampling, n=1, seed=row_seed(sampling.seed, p, s)))
        try:
            with self._working():
                while len(found) < len(places):
                    found.update((places[key], completion) for key, completion in self._step() if key in places)
        except BaseException:
            self._abort([key for key, place in places.items() if place not in found])
            raise
        return [[found[p, s] for s in range(sampling.n)] for p in range(len(prompt_ids))]

    async def complete(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """One completion, beside all others that are under way. Cancelled, it leaves the engine."""
        self._check(prompt_ids, sampling, 1)
        loop, key = asyncio.get_running_loop(), next(self._keys)
        self._add(key, prompt_ids, sampling)
        self._callers[key] = loop.create_future()
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        try:
            return await self._callers[key]
        except asyncio.CancelledError:
            if self._callers.pop(key, None) is not None:
                self._abort([key])
            raise

    async def _drive(self) -> None:
        """Step while somebody waits; a failure reaches all of them."""
        with self._working():
            while True:
                await asyncio.sleep(0)  # those who were woken run first: what they ask for joins this step
                if not self._callers:
                    return
                try:
                    ended = self._step()
                except Exception as error:
                    self._fail(error)
                    return
                for key, completion in ended:
                    caller = self._callers.pop(key, None)
                    if caller is not None and not caller.done():
                        caller.set_result(completion)

    def _fail(self, error: Exception) -> None:
        self._abort(list(self._callers))
        for caller in self._callers.values():
            if not caller.done():
                caller.set_exception(error)
        self._callers.clear()
