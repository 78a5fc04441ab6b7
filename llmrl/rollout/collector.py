"""Many rollouts at once, each advancing on its own: environment, engine, environment, ..., reward.

Invariants
- A rollout's random numbers follow from its seed alone, so what is collected depends on the tasks and the weights, not
  on how fast anything was (for environments that never wait the order of events is the same, too).
- Every rollout ends exactly once, in one of the states of `trajectory.EndState`; what ended without a reward is
  retried, left out or an error, as the group policy says, and is counted.
- Everything that is waited for has a deadline, and its name is in the error.
"""

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from llmrl.envs import returned
from llmrl.envs.protocol import Environment, EnvironmentFactory
from llmrl.errors import RefusedError, RunFailedError
from llmrl.rollout.dialogue import Dialogue
from llmrl.rollout.protocol import Engine, SamplingParams, row_seed
from llmrl.rollout.rendering import ParseFault, Renderer
from llmrl.rollout.threads import call
from llmrl.rollout.trajectory import BROKEN, EndState, Rollout, RolloutGroup, Turn

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Limits:
    """What ends a rollout: turns, tokens of one turn, tokens of the whole context, seconds for one environment call
    and for the whole rollout (None: no limit), and how many rollouts are under way at once.

    `cut_turns`: whether a turn that ran into `max_completion_length` ends the rollout, or is closed and answered by the
    environment like any other (as LOOP's authors do; the closing token is no action).
    """

    max_turns: int = 1
    max_completion_length: int = 256
    max_length: int | None = None
    environment_seconds: float | None = 60.0
    rollout_seconds: float | None = None
    concurrent_rollouts: int = 256
    cut_turns: Literal["end", "go_on"] = "end"


@dataclass(frozen=True)
class GroupPolicy:
    """What becomes of rollouts that break (an environment that raises or hangs, a reward that is no score).

    fail: an error. retry: again in a fresh environment with another seed, up to `retries` times, then an error. accept:
    left out, as long as the group keeps `min_rollouts`; a smaller group is left out whole.
    early_stop: once this share of all rollouts has ended and every group has `min_rollouts`, the rest is given up
    (LOOP's early stop of stragglers, arXiv 2502.01600 and its code); 1 waits for all.
    """

    on_error: Literal["fail", "retry", "accept"] = "retry"
    retries: int = 2
    min_rollouts: int = 2
    early_stop: float = 1.0


@dataclass(frozen=True)
class Task:
    """Ask for `samples` rollouts of one row (numbered from 1), with seeds that follow from `seed`."""

    number: int
    row: dict[str, Any]
    samples: int
    seed: int


@dataclass
class Collected:
    """What came of it. `counts` by name: rollouts, ended by end state, retried, given_up, left_out, groups_left_out,
    rewritten (pieces begun because a chat template rewrote history)."""

    groups: list[RolloutGroup]
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    num_sampled: int = 0


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
    """Rollouts of `environment`s with the policy in `engine`, scored by `score` (None: environments' own rewards).

    `report` hears about once a second how far it is; what it raises ends the collection.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        environment: EnvironmentFactory,
        limits: Limits,
        score: ScoreGroup | None = None,
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
        self.collector, self.tasks, self.temperature = collector, tasks, temperature
        self.limits, self.policy = collector.limits, collector.policy
        self.started = time.monotonic()
        self.room = asyncio.Semaphore(self.limits.concurrent_rollouts)
        self.counts: dict[str, int] = {}
        self.ended: dict[tuple[int, int], Rollout] = {}
        self.places: dict[tuple[int, int], str] = {}  # what each rollout under way waits for
        self.num_sampled = 0
        self.scoring: dict[int, asyncio.Task[RolloutGroup]] = {}

    async def run(self) -> Collected:
        """The first rollout of every task, then the second of every task, ... (their order in the queue)."""
        most = max((task.samples for task in self.tasks), default=0)
        order = [(t, s) for s in range(most) for t in range(len(self.tasks)) if s < self.tasks[t].samples]
        running = {asyncio.create_task(self._rollout_until_sound(t, s)): (t, s) for t, s in order}
        reporting = asyncio.create_task(self._report(len(order)))
        try:
            await self._until_enough(set(running), reporting)
            for t in range(len(self.tasks)):
                self._start_scoring(t)
            await self._until_scored(reporting)
            scored = {t: self.scoring[t].result() for t in sorted(self.scoring)}
            groups = [group for t, group in scored.items() if self._is_whole(group, self.tasks[t])]
        finally:
            reporting.cancel()
            for task in (*running, *self.scoring.values()):
                task.cancel()
            await asyncio.gather(*running, *self.scoring.values(), reporting, return_exceptions=True)
        return Collected(groups, self.counts, time.monotonic() - self.started, self.num_sampled)

    async def _until_enough(self, running: set[asyncio.Task[None]], reporting: asyncio.Task[None]) -> None:
        """Wait for all rollouts, or for as many as the early stop asks for; the first error ends everything."""
        total = len(running)
        while running:
            await _first_of({*running, *self.scoring.values(), reporting})
            running = {task for task in running if not task.done()}
            if running and self.policy.early_stop < 1 and self._enough(total):
                self._count("given_up", len(running))
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                return

    async def _until_scored(self, reporting: asyncio.Task[None]) -> None:
        """Wait for all scores; `reporting` goes on hearing of signals while a reward function is slow."""
        while not all(task.done() for task in self.scoring.values()):
            await _first_of({*self.scoring.values(), reporting})

    def _enough(self, total: int) -> bool:
        sound = [0] * len(self.tasks)
        for (t, _), rollout in self.ended.items():
            sound[t] += rollout.end_state not in BROKEN
        least = [min(self.policy.min_rollouts, task.samples) for task in self.tasks]
        whole = all(have >= need for have, need in zip(sound, least, strict=True))
        return whole and sum(sound) >= self.policy.early_stop * total

    def _start_scoring(self, t: int) -> None:
        """Score what has ended of a task's rollouts, beside the rollouts of others."""
        rollouts = [self.ended[t, s] for s in range(self.tasks[t].samples) if (t, s) in self.ended]
        if rollouts and t not in self.scoring:
            group = RolloutGroup(self.tasks[t].number, self.tasks[t].row, rollouts, place=t)
            self.scoring[t] = asyncio.create_task(self._score(group))

    async def _score(self, group: RolloutGroup) -> RolloutGroup:
        """The rollouts of the group that have a reward; those that broke say nothing of the policy and get none."""
        sound = replace(group, rollouts=[r for r in group.rollouts if r.end_state not in BROKEN])
        if self.collector.score is None:
            for rollout in sound.rollouts:
                rollout.scores = dict(rollout.environment_rewards)
                # An episode that came to its end without any reward was not judged, which is not the same as 0.
                judged = bool(rollout.scores) or rollout.end_state != "completed"
                rollout.reward = sum(rollout.environment_rewards.values()) if judged else None
        elif sound.rollouts:
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
                rollout = await self._rollout(task, s, seed, (t, s))
                if rollout.end_state not in BROKEN:
                    break
        self.places.pop((t, s), None)
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
        if all((t, other) in self.ended for other in range(task.samples)):
            self._start_scoring(t)

    async def _rollout(self, task: Task, s: int, seed: int, place: tuple[int, int]) -> Rollout:
        started = time.monotonic()
        episode = _Episode(self, task.row, seed, place)
        try:
            async with asyncio.timeout(self.limits.rollout_seconds):
                end, what = await episode.play()
        except TimeoutError:
            end, what = "error-timeout", f"not done after rollout_seconds {self.limits.rollout_seconds:g}"
        except RefusedError as refused:  # the data does not fit the engine or the template: not this rollout's fault
            raise RefusedError(f"row {task.number}: {refused}") from refused
        finally:
            await episode.close()
        return episode.rollout(task.number, s, end, what, time.monotonic() - started)

    def _count(self, name: str, number: int) -> None:
        if number:
            self.counts[name] = self.counts.get(name, 0) + number

    async def _report(self, total: int) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self.collector.report is None:
                continue
            kinds = list(self.places.values())
            most = max(set(kinds), key=kinds.count) if kinds else "nothing"
            seconds = time.monotonic() - self.started
            self.collector.report(Progress(len(self.ended), total, self.num_sampled, seconds, most))


async def _first_of(tasks: set[asyncio.Task[Any]]) -> None:
    """Until one of them ends that has not ended yet; raises what any of them has raised."""
    await asyncio.wait({task for task in tasks if not task.done()}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()


class _Episode:
    """The token side and the environment side of one rollout, brought together."""

    def __init__(self, collection: _Collection, row: dict[str, Any], seed: int, place: tuple[int, int]) -> None:
        self.collection, self.row, self.seed, self.place = collection, row, seed, place
        self.limits, self.engine = collection.limits, collection.collector.engine
        self.environment: Environment | None = None
        self.dialogue: Dialogue | None = None
        self.opening = 0
        self.turns: list[Turn] = []

    async def play(self) -> tuple[EndState, str]:
        """To the end; returns how it ended, and what went wrong where something did."""
        try:
            messages, tools = _checked(returned.opening, await self._environment("init"))
        except _BrokenEnvironment as broken:
            return broken.end_state, broken.what
        self.dialogue = Dialogue(self.collection.collector.renderer, messages, tools)
        self.opening = len(self.dialogue.messages)
        for turn in range(self.limits.max_turns):
            room = self._room()
            if room < 1:
                return ("truncated-length" if turn else "truncated-prompt"), ""
            message = await self._complete(self.dialogue, turn, room)
            if isinstance(message, ParseFault):
                return "error-parse", message.reason
            cut = self.turns[-1].finish_reason == "length"
            if cut and self.limits.max_turns > 1 and self._ends_here(room):
                return "truncated-length", ""
            try:
                result = _checked(returned.step_result, await self._environment("step", message))
            except _BrokenEnvironment as broken:
                return broken.end_state, broken.what
            self.turns[-1] = replace(self.turns[-1], rewards=result.rewards)
            if result.done:
                return ("truncated-length" if cut and self.limits.max_turns == 1 else "completed"), ""
            try:
                extends = self.dialogue.extend(result.messages)
            except RefusedError as error:  # it said nothing, or what the chat template refuses
                return "error-abort", str(error)
            if not extends:
                self.collection._count("rewritten", 1)
        return "truncated-turns", ""

    def _ends_here(self, room: int) -> bool:
        """Whether a turn that had `room` and was cut is the last: also where the whole context is full."""
        return self.limits.cut_turns == "end" or room < self.limits.max_completion_length

    def _room(self) -> int:
        assert self.dialogue is not None
        most = self.limits.max_completion_length
        if self.limits.max_length is None:
            return most
        return min(most, self.limits.max_length - len(self.dialogue.prompt_ids))

    async def _complete(self, dialogue: Dialogue, turn: int, room: int) -> dict[str, Any] | ParseFault:
        self.collection.places[self.place] = "the engine"
        sampling = SamplingParams(room, self.collection.temperature, seed=row_seed(self.seed, turn, 0))
        found = await self.engine.complete(dialogue.prompt_ids, sampling)
        message = dialogue.complete(found.token_ids, found.finish_reason)
        pieces = dialogue.pieces()
        piece, (_, start, end) = len(pieces) - 1, pieces[-1].turns[-1]
        self.turns.append(Turn(piece, start, end, found.logprobs, found.finish_reason, found.policy_version))
        return message

    async def _environment(self, method: str, *arguments: Any) -> Any:
        """Call the environment (made at the first call); raises _BrokenEnvironment."""
        self.collection.places[self.place] = f"the environment's {method}"
        seconds = self.limits.environment_seconds
        try:
            if self.environment is None:
                self.environment = self.collection.collector.environment(self.row, self.seed)
            return await call(getattr(self.environment, method), *arguments, timeout=seconds)
        except TimeoutError:
            raise _BrokenEnvironment("error-timeout", f"{method}() took longer than {seconds:g} s") from None
        except (RefusedError, asyncio.CancelledError):
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{method}() raised {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            raise _BrokenEnvironment("error-abort", what) from error

    async def close(self) -> None:
        """Close the environment; whatever goes wrong there no longer matters to the rollout."""
        if self.environment is not None:
            try:
                await call(self.environment.close, timeout=self.limits.environment_seconds)
            except Exception:
                self.collection._count("close_failed", 1)

    def rollout(self, row: int, sample: int, end: EndState, error: str, seconds: float) -> Rollout:
        """The record of what was played."""
        pieces = [] if self.dialogue is None else [piece.token_ids for piece in self.dialogue.pieces()]
        messages = [] if self.dialogue is None else self.dialogue.messages
        return Rollout(row, sample, self.seed, pieces, self.turns, messages, self.opening, end, error, seconds=seconds)


def _checked(check: Callable[[Any], Checked], value: Any) -> Checked:
    """What an environment's method returned, as `check` has it; raises _BrokenEnvironment."""
    try:
        return check(value)
    except ValueError as error:
        raise _BrokenEnvironment("error-abort", str(error)) from error


class _BrokenEnvironment(Exception):
    """The environment raised or overran; how the rollout ends, and what happened."""

    def __init__(self, end_state: EndState, what: str) -> None:
        super().__init__(what)
        self.end_state, self.what = end_state, what
