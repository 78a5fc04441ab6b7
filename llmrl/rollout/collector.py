"""Many rollouts at once, each advancing on its own: environment, engine, environment, ..., reward.

Invariants
- A rollout's random numbers follow from its seed alone, so what is collected depends on the tasks and the weights, not
  on how fast anything was (for environments that never wait the order of events is the same, too), as long as no
  deadline passes and nothing is given up.
- Every rollout ends exactly once, in one of the states of `trajectory.EndState`; what ended without a reward is
  retried, left out or an error, as the group policy says, and is counted.
- Everything that is waited for has a deadline, and its name is in the error.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from llmrl.envs.protocol import EnvironmentFactory
from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout.episode import Episode, Limits, Stage
from llmrl.rollout.protocol import Engine, row_seed
from llmrl.rollout.rendering import Renderer
from llmrl.rollout.threads import Maker
from llmrl.rollout.trajectory import BROKEN, Rollout, RolloutGroup

Result = TypeVar("Result")


@dataclass(frozen=True)
class GroupPolicy:
    """What becomes of rollouts that break (an environment that raises or hangs, a reward that is no score).

    fail: an error. retry: again in a fresh environment with another seed, up to `retries` times, then an error. accept:
    left out, as long as the group keeps `min_rollouts`; a smaller group is left out whole.
    early_stop: once this share of all rollouts has ended and every group has `min_rollouts` that did not break (or none
    under way), the rest is given up (LOOP's early stop of stragglers, arXiv 2502.01600 and its code); 1 waits for all.
    What broke has ended, too: nobody waits for it any more.
    """

    on_error: Literal["fail", "retry", "accept"] = "retry"
    retries: int = 2
    min_rollouts: int = 2
    early_stop: float = 1.0


@dataclass(frozen=True)
class Task:
    """Ask for `samples` rollouts of one row (numbered from 1), with seeds that follow from `seed`; `given`: tokens with
    which the policy's first completion begins, for what would follow them."""

    number: int
    row: dict[str, Any]
    samples: int
    seed: int
    given: tuple[int, ...] = ()


@dataclass
class Collected:
    """What came of it. `counts` by name: rollouts, ended by end state, retried, given_up, left_out, groups_left_out,
    rewritten (pieces begun because a chat template rewrote history).

    Of the judging, by the names of metrics: `logged`, the values that reward functions gave, of which means are shown,
    and `tallies`, numbers that add up over collections and ranks. Whoever owns the reward functions puts them here.
    `discarded`: prompts that dynamic sampling took out of `groups`; None where there is none.
    """

    groups: list[RolloutGroup]
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    num_sampled: int = 0
    logged: dict[str, list[float]] = field(default_factory=dict)
    tallies: dict[str, float] = field(default_factory=dict)
    discarded: list[RolloutGroup] | None = None

    @property
    def of_judging(self) -> dict[str, float]:
        """`logged` and `tallies` as metrics."""
        means = {name: sum(values) / len(values) for name, values in self.logged.items() if values}
        return {**means, **self.tallies}


class ScoreGroup(Protocol):
    """Puts `scores` and `reward` into the rollouts of one group."""

    def __call__(self, group: RolloutGroup) -> Awaitable[None]: ...


@dataclass(frozen=True)
class Progress:
    """How far a collection is: rollouts ended and asked for, tokens sampled, seconds, what is waited for most."""

    done: int
    total: int
    num_sampled: int
    seconds: float
    waiting_for: str


class Collector:
    """Rollouts of `environment`s with the policy in `engine`, scored by `score` as soon as a group is whole.

    `report` hears about once a second how far it is; what it raises ends the collection.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        environment: EnvironmentFactory,
        limits: Limits,
        score: ScoreGroup,
        policy: GroupPolicy = GroupPolicy(),
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        self.engine, self.renderer, self.environment = engine, renderer, environment
        self.limits, self.score, self.policy, self.report = limits, score, policy, report

    def collect(self, tasks: Sequence[Task], temperature: float = 1.0) -> Collected:
        """All rollouts of `tasks`, groups in their order. Starts an event loop, so not from within one."""
        return asyncio.run(_Collection(self, tasks, temperature).run())


class _Collection:
    """One call of `collect`."""

    def __init__(self, collector: Collector, tasks: Sequence[Task], temperature: float) -> None:
        self.collector, self.tasks = collector, tasks
        self.limits, self.policy = collector.limits, collector.policy
        self.started = time.monotonic()
        maker = Maker(collector.environment, self.limits.environment_seconds)
        self.stage = Stage(collector.engine, collector.renderer, maker, self.limits, temperature)
        self.room = asyncio.Semaphore(self.limits.concurrent_rollouts)
        self.counts: dict[str, int] = {}
        self.ended: dict[tuple[int, int], Rollout] = {}
        self.left = [task.samples for task in tasks]  # rollouts of each task that have not ended
        self.sound = [0 for _ in tasks]  # those that have ended without breaking
        self.under_way: set[Episode] = set()
        self.num_sampled = 0
        self.endings: asyncio.Queue[asyncio.Task[Any]] = asyncio.Queue()
        self.rolling: set[asyncio.Task[Any]] = set()
        self.scoring: dict[int, asyncio.Task[RolloutGroup]] = {}
        self.judging: set[asyncio.Task[Any]] = set()  # those of `scoring` that have not ended

    async def run(self) -> Collected:
        """The first rollout of every task, then the second of every task, ... (their order in the queue)."""
        most = max((task.samples for task in self.tasks), default=0)
        order = [(t, s) for s in range(most) for t in range(len(self.tasks)) if s < self.tasks[t].samples]
        reporting = self._begun(self._report(len(order)))
        self.rolling = {self._begun(self._rollout_until_sound(t, s)) for t, s in order}
        try:
            while self.rolling and not self._enough(len(order)):
                await self._next_ending()
            await self._give_up()
            for t in range(len(self.tasks)):
                self._start_scoring(t)
            while self.judging or not self.endings.empty():
                await self._next_ending()
            scored = {t: self.scoring[t].result() for t in sorted(self.scoring)}
            groups = [group for t, group in scored.items() if self._is_whole(group, self.tasks[t])]
        finally:
            remaining = [reporting, *self.rolling, *self.judging]
            for task in remaining:
                task.cancel()
            await asyncio.gather(*remaining, return_exceptions=True)
        return Collected(groups, self.counts, time.monotonic() - self.started, self.num_sampled)

    def _begun(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """The work as a task, of whose end `endings` hears."""
        task = asyncio.create_task(work)
        task.add_done_callback(self.endings.put_nowait)
        return task

    async def _next_ending(self) -> None:
        """Wait until a rollout or a scoring ends; an error of any of them, or of `report`, ends everything."""
        task = await self.endings.get()
        self.rolling.discard(task)
        self.judging.discard(task)
        task.result()

    def _enough(self, total: int) -> bool:
        """Whether the early stop's share has ended, and no group could still come to `min_rollouts` by waiting."""
        if len(self.ended) < self.policy.early_stop * total:
            return False
        least = [min(self.policy.min_rollouts, task.samples) for task in self.tasks]
        return all(not left or have >= need for left, have, need in zip(self.left, self.sound, least, strict=True))

    async def _give_up(self) -> None:
        """End the rollouts that are still under way."""
        late = [task for task in self.rolling if not task.done()]
        for task in late:
            task.remove_done_callback(self.endings.put_nowait)
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        self.rolling -= set(late)
        self._count("given_up", sum(task.cancelled() for task in late))

    def _start_scoring(self, t: int) -> None:
        """Score what has ended of a task's rollouts, beside the rollouts of others."""
        rollouts = [self.ended[t, s] for s in range(self.tasks[t].samples) if (t, s) in self.ended]
        if rollouts and t not in self.scoring:
            group = RolloutGroup(self.tasks[t].number, self.tasks[t].row, rollouts, place=t)
            self.scoring[t] = self._begun(self._score(group))
            self.judging.add(self.scoring[t])

    async def _score(self, group: RolloutGroup) -> RolloutGroup:
        """The rollouts of the group that have a reward; those that broke say nothing of the policy and get none."""
        sound = replace(group, rollouts=[r for r in group.rollouts if r.end_state not in BROKEN])
        if sound.rollouts:
            await self.collector.score(sound)
        kept = replace(group, rollouts=[r for r in sound.rollouts if r.reward is not None])
        self._count("left_out", len(group.rollouts) - len(kept.rollouts))
        return kept

    def _is_whole(self, group: RolloutGroup, task: Task) -> bool:
        enough = len(group.rollouts) >= min(self.policy.min_rollouts, task.samples)
        self._count("groups_left_out", not enough)
        return enough

    # -- one rollout ---------------------------------------------------------------------------------------------

    async def _rollout_until_sound(self, t: int, s: int) -> None:
        """A rollout, again with another seed where it breaks and the policy says so."""
        task = self.tasks[t]
        async with self.room:
            for attempt in range(1 + (self.policy.retries if self.policy.on_error == "retry" else 0)):
                if attempt:
                    self._count("retried", 1)
                seed = row_seed(task.seed, s, attempt)
                rollout = await self._rollout(task, s, seed)
                if rollout.end_state not in BROKEN:
                    break
        if rollout.end_state in BROKEN and self.policy.on_error != "accept":
            tries = f", {attempt + 1} times in a row," if attempt else ""
            raise RunFailedError(
                f"row {task.number}, sample {s + 1}: the environment broke{tries} ({rollout.end_state}): "
                f"{rollout.error}. Mend it, or set on_error: accept to go on with fewer rollouts"
            )
        self._count("rollouts", 1)
        self._count(rollout.end_state, 1)
        self.num_sampled += rollout.num_sampled
        self.ended[t, s] = rollout
        self.left[t] -= 1
        self.sound[t] += rollout.end_state not in BROKEN
        if not self.left[t]:
            self._start_scoring(t)

    async def _rollout(self, task: Task, s: int, seed: int) -> Rollout:
        started = time.monotonic()
        episode = Episode(self.stage, task.row, seed, task.given)
        self.under_way.add(episode)
        try:
            async with asyncio.timeout(self.limits.rollout_seconds) as limit:
                end, what = await episode.play()
        except TimeoutError:
            if not limit.expired():
                raise
            end, what = "error-timeout", f"not done after rollout_seconds {self.limits.rollout_seconds:g}"
        except RefusedError as refused:  # the data does not fit the engine or the template: not this rollout's fault
            raise RefusedError(f"row {task.number}: {refused}") from refused
        finally:
            await episode.close()
            self.under_way.discard(episode)
            self._count("rewritten", episode.rewritten)
            self._count("close_failed", episode.close_failed)
        return episode.rollout(task.number, s, end, what, time.monotonic() - started)

    def _count(self, name: str, number: int) -> None:
        if number:
            self.counts[name] = self.counts.get(name, 0) + number

    async def _report(self, total: int) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self.collector.report is None:
                continue
            kinds = [episode.waits_for for episode in self.under_way]
            most = max(set(kinds), key=kinds.count) if kinds else "nothing"
            seconds = time.monotonic() - self.started
            self.collector.report(Progress(len(self.ended), total, self.num_sampled, seconds, most))
