"""A run of a method that samples from its policy: rows, rewards, learner, rollouts, evaluation, and their records.

What is learned from the rollouts stands in the methods' own files; `online` adds what policy gradients share.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llmrl.errors import RunFailedError
from llmrl.evaluation.samples import KeptSamples, samples_of
from llmrl.files import write_lines
from llmrl.learner.learner import Learner
from llmrl.learner.together import all_do
from llmrl.rollout.collector import Collected
from llmrl.rollout.trajectory import RolloutGroup, mean_reward
from llmrl.runs import Run
from llmrl.trainers import checks
from llmrl.trainers.online.config import SamplingConfig
from llmrl.trainers.online.engines import check_engine, left_for_servers
from llmrl.trainers.online.metrics import heldout_metrics, rollout_metrics
from llmrl.trainers.online.sampler import Sampler
from llmrl.trainers.online.task import OnlineTask
from llmrl.trainers.session import Session
from llmrl.trainers.setup import build_learner, task_evaluation, task_problems

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import TrainerCallback

SAID_AFTER_EMPTY = 3


class SampledRun:
    """What surrounds the steps of a method that samples: every step is `collect`, what the method learns from it, then
    `policy_changed` and `record_step`.

    `needs_reference`: whether the learner keeps one. `total_steps`: of the learning rate's schedule and the session,
    where they are not the configuration's. `learner_options`: LearnerOptions that the method sets.
    """

    def __init__(
        self,
        config: SamplingConfig,
        run: Run,
        *,
        needs_reference: bool,
        dynamic_sampling: bool = False,
        overlong_buffer: float = 0.0,
        total_steps: int | None = None,
        dataset: "Dataset | DatasetDict | None" = None,
        callbacks: "Sequence[TrainerCallback]" = (),
        **learner_options: Any,
    ) -> None:
        self.config, self.run = config, run
        check_engine(config.engine)
        self.task = task = OnlineTask(config, run.note, dataset, overlong_buffer)
        run.verify_dataset(task.data.fingerprint)
        problems = task_problems(config.task_evaluation, config, task.tokenizer, run.note)
        steps = config.num_steps(len(task.data.train)) if total_steps is None else total_steps
        self.learner = sampled_learner(config, needs_reference, steps, run.note, **learner_options)
        self.sampler = Sampler(config, task, self.learner, run, dynamic_sampling)
        self.learner.accelerator.register_for_checkpointing(self)
        self._answers = task_evaluation(problems, self.learner.causal_lm, self.learner.accelerator, run)
        self.session = Session(
            run, self.learner, task.tokenizer, steps, task.data.fingerprint, self.evaluate, callbacks
        )
        task.trainer_state = lambda: self.session.state
        self._heldout_samples = KeptSamples(run.directory / "samples.json", "heldout", begun=run.checkpoint is not None)
        self._empty_steps, self._cut_said = 0, False

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; called on all ranks."""
        return {"sampler": self.sampler.state_dict(), "empty_steps": self._empty_steps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.sampler.load_state_dict(saved["sampler"])
        self._empty_steps = saved["empty_steps"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.sampler.close()
        self.task.close()

    # -- sampling ------------------------------------------------------------------------------------------------

    def collect(self, step: int, first_row: int | None = None) -> Collected:
        """The rollouts of step `step` (from 0), the same on every rank; kept in rollouts/step_N.jsonl.

        first_row: how many rows come before them in the order of the rows; None: they go on behind the last step's.
        Where they fail or are interrupted, a checkpoint of the steps before is left.
        """
        if first_row is not None:
            self.sampler.cursor.position = first_row
        with self.session.before_updates():
            last = step + 1 == self.session.total_steps
            collected = self.sampler.rollouts(step, last, lambda found: self._write(step + 1, found.groups))
        counts = collected.counts
        self._say_if_cut(counts.get("truncated-turns", 0), counts.get("rollouts", 0))
        return collected

    def _say_if_cut(self, cut: int, count: int) -> None:
        most = self.config.rollout.max_turns
        if self._cut_said or not turns_too_few(cut, count, most):
            return
        self._cut_said = True
        self.run.note(
            f"the environment went on after the last turn of {cut} of {count} rollouts, which ended there: is "
            f"rollout.max_turns {most} meant?"
            + (" (`multi_turn = True` on the environment's class has this refused)" if most == 1 else "")
        )

    def weigh(self, weights: dict[str, float]) -> None:
        """Change the weights of reward functions, by their names, from the next rollouts on."""
        assert self.task.scorer is not None
        self.task.scorer.weights |= weights

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Rollouts of the held-out rows, and the answers to the problems of task_evaluation.

        The first and the latest of both are kept in samples.json.
        Where they fail or are interrupted, a checkpoint of the steps before is left.
        """
        asked = len(self.task.data.heldout) * self.config.eval_samples
        with self.session.before_updates():
            found = {"heldout": self._heldout(asked)} if asked else {}
            return found | self._answers()

    def _heldout(self, asked: int) -> dict[str, float]:
        groups = self.sampler.heldout()
        ends = [rollout.end_state for group in groups for rollout in group.rollouts]
        self._say_if_cut(ends.count("truncated-turns"), len(ends))
        if self.run.is_main:
            self._heldout_samples.keep(samples_of(groups))
        return heldout_metrics(groups, asked)

    def _write(self, number: int, groups: Sequence[RolloutGroup]) -> None:
        """Keep a step's rollouts, on the first rank, and let older ones go; where that fails, all ranks end."""

        def write() -> None:
            folder = self.run.directory / "rollouts"
            try:
                keep_rollouts(folder, number, groups, self.task.tokenizer.decode, self.config.save_rollouts)
            except (OSError, TypeError, ValueError) as error:
                what, remedy = f"{type(error).__name__}: {error}", "What is said and logged there must be JSON"
                if isinstance(error, OSError):
                    what = error.strerror or str(error)
                    remedy = "Free space on that disk, or keep the rollouts of fewer steps (save_rollouts)"
                said = f"{folder}/step_{number}.jsonl could not be written: {what}. {remedy}"
                raise RunFailedError(said) from error

        all_do(self.learner.accelerator, write if self.run.is_main else None)

    # -- records -------------------------------------------------------------------------------------------------

    def policy_changed(self) -> None:
        """The learner was updated: what is sampled from now on needs its new weights."""
        self.sampler.policy_changed()

    def record_step(
        self, collected: Collected, metrics: dict[str, float], *, taught: bool, cause: str | None = None
    ) -> None:
        """Log the step; ends a run in which nothing has been learned for long, with a checkpoint.

        `taught`: whether the step's rollouts could teach anything; `cause`: why not, where it is not their rewards.
        """
        self.session.record({**collected.of_judging, **rollout_metrics(collected), **metrics})
        self._empty_steps = 0 if taught else self._empty_steps + 1
        is_last = self._empty_steps >= self.config.max_empty_steps
        if not is_last and self._empty_steps != SAID_AFTER_EMPTY:
            return
        mean = mean_reward(collected.groups)
        if cause is None:
            cause = (
                "no rollout has a reward" if math.isnan(mean) else f"all rollouts are equally good (mean {mean:.4g})"
            )
        said = f"nothing could be learned in {self._empty_steps} steps in a row: {cause}"
        self.run.note(said)
        if is_last:
            with self.session.before_updates():
                raise RunFailedError(
                    f"{said}. Choose easier or harder prompts, a reward with more grades, more samples_per_prompt, or "
                    "a higher temperature"
                )


def keep_rollouts(
    folder: Path, number: int, groups: Sequence[RolloutGroup], decode: Callable[[list[int]], str], limit: int | None
) -> None:
    """Write step_N.jsonl of step `number`, whole or not at all: a rollout a line, with its row's `answer` where there
    is one. Of the files there, those of the `limit` newest steps stay (None: of all), and none of steps to come, which
    an earlier attempt at the run may have left."""
    if limit != 0:
        folder.mkdir(exist_ok=True)
        answers = ({"answer": group.row["answer"]} if "answer" in group.row else {} for group in groups)
        records = (
            {**rollout.record(decode), **answer}
            for group, answer in zip(groups, answers, strict=True)
            for rollout in group.rollouts
        )
        write_lines(folder / f"step_{number}.jsonl", records, default=str)
    for other in folder.glob("step_*.jsonl"):
        step = other.stem.removeprefix("step_")
        if step.isdigit() and (int(step) > number or (limit is not None and int(step) <= number - limit)):
            other.unlink()


def turns_too_few(cut: int, count: int, max_turns: int) -> bool:
    """Whether `max_turns` cut off so many of `count` rollouts that the key was most likely forgotten: all of them, or
    half where it is 1, the default."""
    return 0 < count <= cut * (2 if max_turns == 1 else 1)


def tells_apart(groups: Sequence[RolloutGroup], over_step: bool) -> bool:
    """Whether a step's rewards prefer any rollout: to others of its prompt, or `over_step`."""
    rewards = [[r.total for r in group.rollouts if r.reward is not None] for group in groups]
    compared = [[reward for one in rewards for reward in one]] if over_step else rewards
    return any(len(set(each)) > 1 for each in compared)


def sampled_learner(
    config: SamplingConfig, needs_reference: bool, total_steps: int, say: Callable[[str], None], **further: Any
) -> Learner:
    """The learner of a method that samples: with a reference, or one copy of the model and no more.

    `further`: LearnerOptions that the method sets.
    """
    reference = config.reference if config.reference != "auto" or config.use_peft else "frozen"
    return build_learner(
        config,
        total_steps,
        say,
        reference=reference if needs_reference else "none",
        form=config.form,
        temperature=config.temperature,
        most_skipped=config.most_skipped_updates,
        **further,
    )


def check_sampling(config: SamplingConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    said: list[str] = []
    check_engine(config.engine)
    task = OnlineTask(config, said.append)
    try:
        task.try_rewards()
    finally:
        task.close()
    task_problems(config.task_evaluation, config, task.tokenizer, said.append)
    steps = config.num_steps(len(task.data.train))
    said.append(f"{len(task.data.train)} prompts to train on, {len(task.data.heldout)} held out; {steps} steps")
    return said + checks.fits(config, left_for_servers(config))
