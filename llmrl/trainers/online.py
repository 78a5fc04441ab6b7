"""A run of an online method: what its loop is made of. The loops themselves stand in loop, ppo, rlsp and pf_ppo."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llmrl.errors import LlmrlError, RunFailedError
from llmrl.learner.learner import Learner
from llmrl.objectives.presets import Preset
from llmrl.objectives.value import ValueRegression
from llmrl.rollout.collector import Collected
from llmrl.rollout.protocol import row_seed
from llmrl.rollout.trajectory import Rollout, RolloutGroup, mean_reward
from llmrl.runs import Run
from llmrl.trainers import checks
from llmrl.trainers.engines import check_engine, left_for_servers, raise_together
from llmrl.trainers.experience import Experience
from llmrl.trainers.online_config import OnlineConfig
from llmrl.trainers.online_task import OnlineTask
from llmrl.trainers.rollout_metrics import heldout_metrics, rollout_metrics
from llmrl.trainers.sampling import Sampler
from llmrl.trainers.session import Session
from llmrl.trainers.setup import build_learner, task_evaluation, task_problems

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from torch import Tensor
    from transformers import TrainerCallback

SAID_AFTER_EMPTY = 3


class OnlineRun:
    """A run of an online method: what is sampled, what is learned from it, and what surrounds both.

    The methods' loops stand in their own files; every step is `collect`, `experience`, `advantages`, `improve` and
    `record`.
    """

    def __init__(
        self,
        config: OnlineConfig,
        run: Run,
        algorithm: Preset,
        *,
        dataset: "Dataset | DatasetDict | None" = None,
        callbacks: "Sequence[TrainerCallback]" = (),
        **learner_options: Any,
    ) -> None:
        self.config, self.run, self.algorithm = config, run, algorithm
        self.task = task = OnlineTask(config, algorithm, run.note, dataset)
        run.verify_dataset(task.data.fingerprint)
        problems = task_problems(config.task_evaluation, config, task.tokenizer, run.note)
        total_steps = config.num_steps(len(task.data.train))
        self.learner = online_learner(config, algorithm, total_steps, run.note, **learner_options)
        self.sampler = Sampler(config, algorithm, task, self.learner, run)
        self.learner.accelerator.register_for_checkpointing(self)
        policy_gradient = algorithm.policy_gradient()
        self.objective = policy_gradient.objective()
        self.critic_alone = ValueRegression(policy_gradient.value_clip).objective()
        self._answers = task_evaluation(problems, self.learner.causal_lm, self.learner.accelerator, run)
        self.session = Session(
            run, self.learner, task.tokenizer, total_steps, task.data.fingerprint, self.evaluate, callbacks
        )
        task.trainer_state = lambda: self.session.state
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

    def collect(self, step: int) -> Collected:
        """The rollouts of step `step` (from 0), the same on every rank; kept in rollouts/step_N.jsonl.

        Where they fail or are interrupted, a checkpoint of the steps before is left.
        """
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
        return heldout_metrics(groups, asked)

    def _write(self, number: int, groups: Iterable[RolloutGroup]) -> None:
        """Keep a step's rollouts, on the first rank, and let older ones go; where that fails, all ranks end."""
        failure: LlmrlError | None = None
        if self.run.is_main:
            rollouts = [rollout for group in groups for rollout in group.rollouts]
            folder = self.run.directory / "rollouts"
            try:
                keep_rollouts(folder, number, rollouts, self.task.tokenizer.decode, self.config.save_rollouts)
            except (OSError, TypeError, ValueError) as error:
                what, remedy = f"{type(error).__name__}: {error}", "What is said and logged there must be JSON"
                if isinstance(error, OSError):
                    what = error.strerror or str(error)
                    remedy = "Free space on that disk, or keep the rollouts of fewer steps (save_rollouts)"
                failure = RunFailedError(f"{folder}/step_{number}.jsonl could not be written: {what}. {remedy}")
        raise_together(self.learner.accelerator, failure)

    # -- learning ------------------------------------------------------------------------------------------------

    def experience(self, collected: Collected) -> Experience:
        """The rollouts as the learner takes them; with what it says of them, where advantages are made of that: values
        of a critic, KL in the reward."""
        experience = Experience(collected.groups)
        if self.algorithm.needs_critic or self.algorithm.kl == "reward":
            self._score(experience)
        return experience

    def _score(self, experience: Experience) -> None:
        """What the algorithm compares with: the policy's own log-probabilities where it is updated more than once, the
        reference's, the critic's values."""
        algorithm, count = self.algorithm, len(experience)
        several = algorithm.epochs > 1 or algorithm.rollouts_in_update(count) < count
        experience.score(
            self.learner,
            old=several or algorithm.kl == "reward",
            reference=algorithm.needs_reference,
            values=algorithm.needs_critic,
            idle=self._idle_teach or algorithm.kl == "reward",
        )

    @property
    def _idle_teach(self) -> bool:
        """Whether rollouts without an advantage change the gradient: by KL or entropy in the loss, or a critic."""
        kl_in_loss = self.algorithm.kl == "loss" and self.algorithm.needs_reference
        return kl_in_loss or self.config.entropy_coef > 0 or self.algorithm.needs_critic

    def advantages(self, experience: Experience) -> "Tensor":
        """Advantages of all that was sampled; then, with `mask_truncated_completions`, what a limit cut off leaves,
        before anything is chosen of it. Returns the largest |A| of each rollout that is there, [S]."""
        largest_S = experience.assign_advantages(self.algorithm)
        if self.config.mask_truncated_completions:
            largest_S = largest_S[[i for i, sample in enumerate(experience.samples) if not sample.cut]]
            experience.leave_out_cut()
        return largest_S

    def improve(self, experience: Experience, step: int) -> dict[str, float]:
        """The optimizer steps of one step on what has its advantages; the means of their metrics. In the critic's
        warm-up the language model stays as it is."""
        if not experience.scored:
            self._score(experience)
        warms_up = step < self.algorithm.critic_warmup
        metrics = experience.train(
            self.learner,
            self.critic_alone if warms_up else self.objective,
            epochs=self.algorithm.epochs,
            rollouts_per_update=self.algorithm.rollouts_in_update(len(experience)),
            seed=row_seed(self.config.seed, step, 0),
            skip_idle=not self._idle_teach,
            whole_prompts=self.config.minibatches == "prompts",
            language=not warms_up,
        )
        self.sampler.policy_changed()
        if self.config.mask_truncated_completions:
            metrics["rollout/masked"] = float(experience.num_masked)
        return metrics

    def record(self, collected: Collected, metrics: dict[str, float]) -> None:
        """Log the step; ends a run in which nothing has been learned for long, with a checkpoint."""
        self.session.record({**collected.of_judging, **rollout_metrics(collected), **metrics})
        told_apart = tells_apart(collected.groups, over_step=self.algorithm.compares_step)
        self._empty_steps = 0 if told_apart and metrics["updates"] else self._empty_steps + 1
        is_last = self._empty_steps >= self.config.max_empty_steps
        if not is_last and self._empty_steps != SAID_AFTER_EMPTY:
            return
        mean = mean_reward(collected.groups)
        cause = "no rollout has a reward" if math.isnan(mean) else f"all rollouts are equally good (mean {mean:.4g})"
        if told_apart:
            cause = "whatever could teach ran into a limit, and mask_truncated_completions leaves it out"
        said = f"nothing could be learned in {self._empty_steps} steps in a row: {cause}"
        self.run.note(said)
        if is_last:
            with self.session.before_updates():
                raise RunFailedError(
                    f"{said}. Choose easier or harder prompts, a reward with more grades, more samples_per_prompt, or "
                    "a higher temperature"
                )


def keep_rollouts(
    folder: Path, number: int, rollouts: Sequence[Rollout], decode: Callable[[list[int]], str], limit: int | None
) -> None:
    """Write step_N.jsonl of step `number`, whole or not at all; of the files there, those of the `limit` newest steps
    stay (None: of all), and none of steps to come, which an earlier attempt at the run may have left."""
    file = folder / f"step_{number}.jsonl"
    if limit != 0:
        folder.mkdir(exist_ok=True)
        temporary = file.with_name(f".tmp_{file.name}")
        try:
            with open(temporary, "w", encoding="utf-8") as out:
                out.writelines(json.dumps(rollout.record(decode), default=str) + "\n" for rollout in rollouts)
        except BaseException:
            temporary.unlink(missing_ok=True)  # its room may be what a checkpoint needs
            raise
        temporary.replace(file)
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
    rewards = [[r.reward + r.penalty for r in group.rollouts if r.reward is not None] for group in groups]
    compared = [[reward for one in rewards for reward in one]] if over_step else rewards
    return any(len(set(each)) > 1 for each in compared)


def online_learner(
    config: OnlineConfig, algorithm: Preset, total_steps: int, say: Callable[[str], None], **further: Any
) -> Learner:
    """The learner that the algorithm needs: a value head, a reference, or (LOOP) one copy of the model and no more.

    `further`: LearnerOptions that the method sets.
    """
    if not algorithm.needs_reference:
        reference = "precomputed"  # never asked for
    else:
        reference = config.reference if config.reference != "auto" or config.use_peft else "frozen"
    keys = config.model_copy(update={"reference": reference})
    return build_learner(
        keys,
        keys,
        keys,
        total_steps,
        say,
        temperature=config.temperature,
        value_head=algorithm.needs_critic,
        most_skipped=config.most_skipped_updates,
        **further,
    )


def check_online(config: OnlineConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    said: list[str] = []
    check_engine(config.engine)
    task = OnlineTask(config, config.resolve(), said.append)
    task.close()
    task_problems(config.task_evaluation, config, task.tokenizer, said.append)
    steps = config.num_steps(len(task.data.train))
    said.append(f"{len(task.data.train)} prompts to train on, {len(task.data.heldout)} held out; {steps} steps")
    return said + checks.fits(config, config, config, left_for_servers(config))
