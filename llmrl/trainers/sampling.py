"""Where a step's rollouts come from: rows in their order, the engine with the right weights, every rank's share.

Invariants
- What a step rolls out follows from its number, the seed and the weights, so that a resumed run repeats it. A
  checkpoint holds the place in the rows and, where the next step's rollouts are sampled ahead, these.
- What fails on one rank is raised on all of them: they go on, or end with a checkpoint, together.
- The engine never samples with other weights than the learner's as they were when the collection began, and is never
  given new ones while it samples. With `max_staleness` 0 these are the newest, with 1 at most one step older.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

from llmrl.data.order import RowCursor
from llmrl.errors import LlmrlError, RefusedError, RunFailedError, RunInterruptedError
from llmrl.learner.learner import Learner
from llmrl.learner.sharding import gather_objects
from llmrl.objectives.presets import Preset
from llmrl.rollout.collector import Collected, Collector, GroupPolicy, Progress, Task
from llmrl.rollout.protocol import Engine, row_seed
from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn
from llmrl.runs import Run, ranks
from llmrl.trainers.engines import adapter_alone, build_engine, raise_together, synchronise
from llmrl.trainers.online_config import OnlineConfig
from llmrl.trainers.online_task import OnlineTask

MOST_REFILLS = 10
Share = Collected | LlmrlError
"""What one rank has collected, or why it could not."""


class Sampler:
    """Rolls out with the learner's policy.

    `policy_changed` after every step tells it that the engine's weights are old. `state_dict` and `load_state_dict` are
    for the checkpoint.
    """

    def __init__(self, config: OnlineConfig, algorithm: Preset, task: OnlineTask, learner: Learner, run: Run) -> None:
        if config.max_staleness and algorithm.dynamic_sampling and learner.accelerator.num_processes > 1:
            raise RefusedError(
                "max_staleness 1 with dynamic sampling needs the ranks to agree while they train; use max_staleness 0"
            )
        if config.max_staleness and config.engine.kind == "vllm" and config.use_peft and config.lora_dropout:
            raise RefusedError(
                "max_staleness 1 with engine.kind vllm shares random numbers with lora_dropout; set it to 0"
            )
        self.config, self.algorithm, self.task, self.learner, self.run = config, algorithm, task, learner, run
        self.engine = self._built()
        self.adapter = adapter_alone(config, learner)
        longest = getattr(self.engine, "max_model_len", None)  # a server may take less than the model could
        if longest is not None:
            task.max_length = min(task.max_length or longest, longest)
        self.cursor = RowCursor(len(task.data.train), config.seed)
        self.version, self._synced = 0, -1  # how often the learner changed, and which of its states the engine has
        self._ahead: _Ahead | None = None

    def _built(self) -> Engine | None:
        engine, failure = None, None
        try:
            engine = build_engine(self.config, self.learner, self.task.tokenizer, self.task.max_length)
        except LlmrlError as error:
            failure = error
        raise_together(self.learner.accelerator, failure)
        return engine

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.wait()
        if self.engine is not None:
            self.engine.close()

    def policy_changed(self) -> None:
        """The learner was updated."""
        self.version += 1

    def rollouts(self, step: int, last: bool) -> Collected:
        """Those of step `step` (from 0), the same on every rank; `last`: no step comes after it.

        With dynamic sampling, prompts whose rollouts are equally good are replaced by the next ones, as often as needed
        but at most ten times (arXiv 2503.14476, Sec. 3.2, and its code).
        """
        ahead, self._ahead = self._ahead, None
        position = self.cursor.position if ahead is None else ahead.position
        try:
            if ahead is None:
                self.synchronise()
                found = self._whole(self._step(step))
            else:
                found = self._whole(ahead.result())
            if self.config.max_staleness and not last:
                self.synchronise()
                self._ahead = _Ahead(self.cursor.position, functools.partial(self._step, step + 1))
        except BaseException:
            self.cursor.position = position  # a checkpoint that is left now repeats this step
            raise
        return found

    def heldout(self) -> list[Rollout]:
        """One greedy rollout of every held-out row, with the newest weights."""
        tasks = [Task(prompt.number, prompt.row, 1, i) for i, prompt in enumerate(self.task.data.heldout)]
        if self._ahead is not None:
            self._ahead.wait()
        self.synchronise()
        share = self._collect(tasks, 0.0, GroupPolicy("accept", min_rollouts=1), "held-out rows")
        return [rollout for group in self._whole([share]).groups for rollout in group.rollouts]

    def synchronise(self) -> None:
        """Give the engine the learner's weights, if they have changed since it got them."""
        if self._synced != self.version:
            synchronise(self.engine, self.learner, self.adapter, self.version)
            self._synced = self.version

    # -- one collection ------------------------------------------------------------------------------------------

    def _step(self, step: int) -> list[Share]:
        """This rank's share of a step's rollouts, in as many collections as it took; the last may have failed."""
        shares = [self._asked(step, 0, self.config.prompts_per_step)]
        if self.algorithm.dynamic_sampling:
            for again in range(1, MOST_REFILLS + 1):
                whole = self._whole(shares)
                missing = self.config.prompts_per_step - sum(len(set(g.rewards)) > 1 for g in whole.groups)
                if missing <= 0:
                    break
                shares.append(self._asked(step, again, missing))
        return shares

    def _asked(self, step: int, again: int, count: int) -> Share:
        """Roll out the next `count` prompts."""
        seed = row_seed(self.config.seed, step, again)
        prompts = [self.task.data.train[row] for row in self.cursor.take(count)]
        tasks = [
            Task(prompt.number, prompt.row, self.config.samples_per_prompt, row_seed(seed, place, 0))
            for place, prompt in enumerate(prompts)
        ]
        keys = self.config.rollout
        least = min(keys.min_per_group, self.config.samples_per_prompt)
        policy = GroupPolicy(keys.on_error, keys.retries, least, keys.early_stop)
        return self._collect(tasks, self.config.temperature, policy, f"rollouts of step {step + 1}")

    def _collect(self, tasks: list[Task], temperature: float, policy: GroupPolicy, what: str) -> Share:
        """This rank's share of the tasks: each has its own engine, or the first asks the servers for all."""
        accelerator = self.learner.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        if self.config.engine.kind == "vllm_server":
            rank, world = 0, 1
        if self.engine is None:
            return Collected([], {})
        collector = Collector(
            self.engine,
            self.task.renderer,
            self.task.kind.make,
            self.task.limits(),
            self.task.score,
            policy,
            _Shown(self.run, what),
        )
        try:
            with accelerator.autocast():  # sampled in the precision that is trained in
                found = collector.collect(tasks[rank::world], temperature)
        except LlmrlError as error:
            return error
        except Exception as error:  # the other ranks must hear of it, or they would wait for this one
            if world == 1 and accelerator.num_processes == 1:
                raise
            return RunFailedError(f"{what}: {type(error).__name__}: {error}")
        for group in found.groups:
            group.place = rank + world * group.place
        return found

    def _whole(self, shares: list[Share]) -> Collected:
        """All ranks' shares together, in the order of the tasks, without what dynamic sampling leaves out."""
        everyone = gather_objects(self.learner.accelerator, _sound(shares) or [])
        raise_together(self.learner.accelerator, next((s for s in shares if isinstance(s, LlmrlError)), None))
        rounds = [beside([theirs[i] for theirs in everyone]) for i in range(len(shares))]
        whole = functools.reduce(added, rounds)
        if self.algorithm.dynamic_sampling and self.config.samples_per_prompt > 1:
            whole.groups = [group for group in whole.groups if len(set(group.rewards)) > 1 or len(group.rollouts) == 1]
        return whole

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The place in the rows, and the rollouts that were sampled ahead (all ranks': called on all of them)."""
        if self._ahead is None:
            return {"position": self.cursor.position, "ahead": None}
        shares = gather_objects(self.learner.accelerator, self._ahead.sound())
        if any(share is None for share in shares):  # the next step will say why; a resumed run tries again
            return {"position": self._ahead.position, "ahead": None}
        parts = [[asdict(part) for part in share or []] for share in shares]
        return {"position": self.cursor.position, "ahead": {"position": self._ahead.position, "shares": parts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor.position = state["position"]
        self.version = self.run.start_step
        if state["ahead"] is not None:
            mine = state["ahead"]["shares"][self.learner.accelerator.process_index]
            self._ahead = _Ahead(state["ahead"]["position"], lambda: [_restored(part) for part in mine])


class _Ahead:
    """A collection in a thread of its own; `position` is the place in the rows before it."""

    def __init__(self, position: int, collect: Callable[[], list[Share]]) -> None:
        self.position = position
        self._future: Future[list[Share]] = Future()
        self._thread = Thread(target=self._run, args=(collect,), name="rollouts of the next step", daemon=True)
        self._thread.start()

    def _run(self, collect: Callable[[], list[Share]]) -> None:
        try:
            self._future.set_result(collect())
        except BaseException as error:
            self._future.set_exception(error)

    def wait(self) -> None:
        """Until it has ended, however it did."""
        self._thread.join()

    def result(self) -> list[Share]:
        """What it brought; raises what it raised."""
        return self._future.result()

    def sound(self) -> list[Collected] | None:
        """What it brought, or None where it failed."""
        self.wait()
        return None if self._future.exception() else _sound(self._future.result())


@dataclass
class _Shown:
    """Progress of a collection, said now and then; ends it when a signal asked this process to stop."""

    run: Run
    what: str
    said_at: float = 0.0

    def __call__(self, progress: Progress) -> None:
        if self.run.training and self.run.interrupted and ranks.world_size() == 1:  # several ranks stop together, later
            raise RunInterruptedError(f"a signal asked for it during {self.what}")
        if progress.seconds - self.said_at > 10:
            self.said_at = progress.seconds
            rate = progress.num_sampled / max(progress.seconds, 1e-9)
            self.run.console.say(
                f"{self.what}: {progress.done} of {progress.total}, {rate:,.0f} sampled tokens/s, most wait for "
                f"{progress.waiting_for}"
            )


def _sound(shares: Sequence[Share]) -> list[Collected] | None:
    """They, or None where one of them failed."""
    sound = [share for share in shares if isinstance(share, Collected)]
    return sound if len(sound) == len(shares) else None


def added(first: Collected, second: Collected) -> Collected:
    """What two collections brought, one after the other."""
    counts = {n: first.counts.get(n, 0) + second.counts.get(n, 0) for n in {*first.counts, *second.counts}}
    return Collected(
        first.groups + second.groups,
        counts,
        first.seconds + second.seconds,
        first.num_sampled + second.num_sampled,
    )


def beside(shares: Sequence[Collected]) -> Collected:
    """The ranks' collections, which went on beside each other, with groups in the order of the tasks."""
    together = functools.reduce(added, shares)
    together.groups.sort(key=lambda group: group.place)
    together.seconds = max(share.seconds for share in shares)
    return together


def _restored(stored: dict[str, Any]) -> Collected:
    groups = [
        RolloutGroup(
            **{
                **group,
                "rollouts": [
                    Rollout(**{**rollout, "turns": [Turn(**turn) for turn in rollout["turns"]]})
                    for rollout in group["rollouts"]
                ],
            }
        )
        for group in stored["groups"]
    ]
    return Collected(**{**stored, "groups": groups})
