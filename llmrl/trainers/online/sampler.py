"""Where a step's rollouts come from: rows in their order, the engine with the right weights, every rank's share.

Invariants
- What a step rolls out follows from its number, the seed and the weights, so that a resumed run repeats it. A
  checkpoint holds the place in the rows and, where the next step's rollouts are sampled ahead, these.
- What fails on one rank is raised on all of them: they go on, or end with a checkpoint, together. A signal to one of
  them ends all collections within seconds, and nobody waits in a collective for another's.
- The engine never samples with other weights than the learner's as they were when the collection began, and is never
  given new ones while it samples. With `max_staleness` 0 these are the newest, with 1 at most one step older.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.data.order import RowCursor
from llmrl.errors import LlmrlError, RefusedError, RunFailedError, RunInterruptedError
from llmrl.learner.learner import Learner
from llmrl.learner.meeting import Meeting
from llmrl.learner.together import all_do, gather, raise_together
from llmrl.rollout.collector import Collected, Collector, GroupPolicy, Progress, Task
from llmrl.rollout.protocol import Engine, row_seed
from llmrl.rollout.trajectory import RolloutGroup
from llmrl.runs import Run
from llmrl.trainers.online.ahead import Ahead
from llmrl.trainers.online.collected import Share, added, beside, is_mixed, restored, sound, stored
from llmrl.trainers.online.config import SamplingConfig
from llmrl.trainers.online.engines import (
    adapter_alone,
    build_engine,
    length_within,
    put_to_sleep,
    synchronise,
    wake_up,
)
from llmrl.trainers.online.task import OnlineTask

MOST_REFILLS = 10


class Sampler:
    """Rolls out with the learner's policy.

    `policy_changed` after every step tells it that the engine's weights are old. `state_dict` and `load_state_dict` are
    for the checkpoint. `dynamic_sampling`: prompts whose rollouts are equally good are replaced.
    """

    def __init__(
        self, config: SamplingConfig, task: OnlineTask, learner: Learner, run: Run, dynamic_sampling: bool = False
    ) -> None:
        if config.max_staleness and dynamic_sampling and learner.accelerator.num_processes > 1:
            raise RefusedError(
                "max_staleness 1 with dynamic sampling needs the ranks to agree while they train; use max_staleness 0"
            )
        self.config, self.task, self.learner, self.run = config, task, learner, run
        self.dynamic_sampling = dynamic_sampling
        self.meeting, self._closing = Meeting(learner.accelerator), False
        self.engine = all_do(learner.accelerator, self._built)
        self.adapter = adapter_alone(config, learner)
        self.cursor = RowCursor(len(task.data.train), config.seed)
        self.version, self._synced = 0, -1  # how often the learner changed, and which of its states the engine has
        self._ahead: Ahead | None = None
        self._short_said = False

    def _built(self) -> Engine | None:
        engine = build_engine(self.config, self.learner, self.task.tokenizer, self.task.max_length)
        self.task.max_length = length_within(engine, self.config, self.task.max_length, self.run.note)
        return engine

    def close(self) -> None:
        self._closing = True
        if self._ahead is not None:
            self._ahead.wait()
        if self.engine is not None:
            self.engine.close()

    def policy_changed(self) -> None:
        """The learner was updated."""
        self.version += 1

    def rollouts(self, step: int, last: bool, keep: Callable[[Collected], None]) -> Collected:
        """Those of step `step` (from 0), the same on every rank; `last`: no step comes after it. `keep` is called with
        them; where it fails, a checkpoint repeats the step, as where they fail.

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
            if self.dynamic_sampling:
                self._discard(found)
            keep(found)
            if self.config.max_staleness and not last:
                self.synchronise()
                self._ahead = Ahead(self.cursor.position, functools.partial(self._step, step + 1))
            self._rest()
        except BaseException:
            self.cursor.position = position  # a checkpoint that is left now repeats this step
            raise
        return found

    def _discard(self, found: Collected) -> None:
        """Take out the prompts that teach nothing; said once where all refills did not make a whole step."""
        found.discarded = [group for group in found.groups if not is_mixed(group)]
        found.groups = [group for group in found.groups if is_mixed(group)]
        kept, asked = len(found.groups), self.config.prompts_at_once
        if kept < asked and not self._short_said:
            self._short_said = True
            self.run.note(
                f"dynamic sampling: only {kept} prompts for a step of {asked}: with {len(found.discarded)} others, in "
                f"{MOST_REFILLS} refills too, all rollouts are equally good (said once)"
            )

    def heldout(self) -> list[RolloutGroup]:
        """`eval_samples` rollouts of every held-out row at `eval_temperature`, with the newest weights; their random
        numbers are the same every time."""
        samples, temperature = self.config.eval_samples, self.config.eval_temperature
        tasks = [Task(prompt.number, prompt.row, samples, i) for i, prompt in enumerate(self.task.data.heldout)]
        with self.run.listening():
            if self._ahead is not None:
                self._ahead.wait()
                self._meet()
            self.synchronise()
            share = self._collect(tasks, temperature, GroupPolicy("accept", min_rollouts=1), "held-out rows", None)
            whole = self._whole([share])
            self._rest()
        return whole.groups

    def of_tasks(self, tasks: Sequence[Task], what: str, *, judged: bool = True) -> Collected:
        """Rollouts of tasks of the caller's, such as answers that have begun, with the newest weights; all ranks', and
        a group's `place` is its task's among `tasks`. `judged` False: no reward function is called, and each has reward
        0. Only between steps."""
        self.synchronise()
        temperature, policy = self.config.temperature, self._policy()
        whole = self._whole([self._collect(list(tasks), temperature, policy, what, None, judged)])
        self._rest()
        return whole

    def synchronise(self) -> None:
        """Give the engine the learner's weights, if they have changed since it got them; it is awake afterwards."""
        if self._synced != self.version:
            synchronise(self.engine, self.learner, self.adapter, self.version)
            self._synced = self.version
        elif self.config.engine.sleep:
            wake_up(self.engine, self.learner.accelerator)

    def _rest(self) -> None:
        """What the engine holds is the learner's until something is sampled again, where that was asked for."""
        if self.config.engine.sleep:
            put_to_sleep(self.engine, self.learner.accelerator)

    # -- one collection ------------------------------------------------------------------------------------------

    def _step(self, step: int) -> list[Share]:
        """This rank's share of a step's rollouts, in as many collections as it took; the last may have failed."""
        shares = [self._asked(step, 0, self.config.prompts_at_once)]
        if self.dynamic_sampling:
            for again in range(1, MOST_REFILLS + 1):
                whole = self._whole(shares)
                missing = self.config.prompts_at_once - sum(is_mixed(group) for group in whole.groups)
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
        what = f"rollouts of step {step + 1}"
        return self._collect(tasks, self.config.temperature, self._policy(), what, step)

    def _policy(self) -> GroupPolicy:
        """A group with fewer samples than `min_per_group` needs all of them; the collector sees to that."""
        keys = self.config.rollout
        return GroupPolicy(keys.on_error, keys.retries, keys.min_per_group, keys.early_stop)

    def _collect(
        self,
        tasks: list[Task],
        temperature: float,
        policy: GroupPolicy,
        what: str,
        steps_done: int | None,
        judged: bool = True,
    ) -> Share:
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
            functools.partial(self.task.score, steps_done=steps_done) if judged else _unjudged,
            policy,
            _Shown(self, what),
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
        finally:
            judging = self.task.of_judging()  # what was noted belongs to this collection, however it ended
        found.logged, found.tallies = judging
        for group in found.groups:
            group.place = rank + world * group.place
        return found

    def _whole(self, shares: list[Share]) -> Collected:
        """All ranks' shares together, in the order of the tasks."""
        self._meet()
        everyone = gather(self.learner.accelerator, sound(shares) or [])
        failure = next((share for share in shares if isinstance(share, LlmrlError)), None)
        if self.run.interrupted and not self.run.training:  # nobody else would hear of it before the first step
            failure = failure or RunInterruptedError("a signal asked for it before the first step")
        raise_together(self.learner.accelerator, failure)
        rounds = [beside([theirs[i] for theirs in everyone]) for i in range(len(shares))]
        return functools.reduce(added, rounds)

    def _meet(self) -> None:
        """Wait for the ranks that are still collecting."""
        self.meeting.wait(lambda: self.run.interrupted)

    def is_to_stop(self) -> bool:
        """Whether a collection under way is to end: a signal asked any rank to stop, or nobody wants it any more."""
        self.run.interrupted = self.meeting.stop_asked(self.run.interrupted) or self.run.interrupted
        return self.run.interrupted or self._closing

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The place in the rows, and the rollouts that were sampled ahead (all ranks': called on all of them)."""
        if self._ahead is None:
            return {"position": self.cursor.position, "ahead": None}
        mine = self._ahead.sound()
        self._meet()
        shares = gather(self.learner.accelerator, mine)
        if any(share is None for share in shares):  # the next step will say why; a resumed run tries again
            return {"position": self._ahead.position, "ahead": None}
        parts = [[stored(part) for part in share or []] for share in shares]
        return {"position": self.cursor.position, "ahead": {"position": self._ahead.position, "shares": parts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor.position = state["position"]
        self.version = self.run.start_step
        if state["ahead"] is not None:
            mine = state["ahead"]["shares"][self.learner.accelerator.process_index]
            self._ahead = Ahead(state["ahead"]["position"], lambda: [restored(part) for part in mine])


@dataclass
class _Shown:
    """Progress of a collection, said now and then; ends it when the sampler is to stop."""

    sampler: Sampler
    what: str
    said_at: float = 0.0

    def __call__(self, progress: Progress) -> None:
        if self.sampler.is_to_stop():
            raise RunInterruptedError(f"a signal asked for it during {self.what}")
        if progress.seconds - self.said_at > 10:
            self.said_at = progress.seconds
            rate = progress.num_sampled / max(progress.seconds, 1e-9)
            self.sampler.run.console.say(
                f"{self.what}: {progress.done} of {progress.total}, {rate:,.0f} sampled tokens/s, most wait for "
                f"{progress.waiting_for}"
            )


async def _unjudged(group: RolloutGroup) -> None:
    """What is kept whatever it is worth."""
    for rollout in group.rollouts:
        rollout.reward = 0.0
