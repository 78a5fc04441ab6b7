"""A run of an online method: what its loop is made of. The loops themselves stand in loop, ppo, rlsp and pf_ppo."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

from llmrl.errors import RunFailedError
from llmrl.learner.learner import Learner
from llmrl.objectives.policy_gradient import PolicyGradient
from llmrl.objectives.presets import Preset
from llmrl.objectives.scored import Objective
from llmrl.rollout.collector import Collected
from llmrl.rollout.protocol import row_seed
from llmrl.rollout.trajectory import RolloutGroup, mean_reward
from llmrl.runs import Run
from llmrl.trainers import checks
from llmrl.trainers.experience import Experience
from llmrl.trainers.online_config import OnlineConfig
from llmrl.trainers.online_task import OnlineTask
from llmrl.trainers.rollout_metrics import heldout_metrics, rollout_metrics
from llmrl.trainers.sampling import Sampler
from llmrl.trainers.session import Session
from llmrl.trainers.setup import build_learner, task_evaluation, task_problems

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import TrainerCallback

SAID_AFTER_EMPTY = 3


class OnlineRun:
    """A run of an online method: what is sampled, what is learned from it, and what surrounds both.

    The methods' loops stand in their own files; every step is `collect`, `experience`, advantages, `improve`, `record`.
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
        self.learner.accelerator.register_for_checkpointing(self.sampler)
        self.objective = online_objective(config, algorithm).objective()
        self._answers = task_evaluation(problems, self.learner.causal_lm, self.learner.accelerator, run)
        self.session = Session(
            run, self.learner, task.tokenizer, total_steps, task.data.fingerprint, self.evaluate, callbacks
        )
        task.trainer_state = self.session.state
        self._empty_steps = 0

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
            collected = self.sampler.rollouts(step, last=step + 1 == self.session.total_steps)
            self._write(step + 1, collected.groups)
        return collected

    def weigh(self, weights: dict[str, float]) -> None:
        """Change the weights of reward functions, by their names, from the next rollouts on."""
        assert self.task.scorer is not None
        self.task.scorer.weights |= weights

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Greedy rollouts of the held-out rows, and the answers to the problems of task_evaluation.

        Where they fail or are interrupted, a checkpoint of the steps before is left.
        """
        asked = len(self.task.data.heldout)
        with self.session.before_updates():
            found = {"heldout": heldout_metrics(self.sampler.heldout(), asked)} if asked else {}
            if self.task.scorer is not None:
                self.task.scorer.metrics()  # what was noted just now is no step's
            return found | self._answers()

    def _write(self, number: int, groups: Iterable[RolloutGroup]) -> None:
        if not self.run.is_main:
            return
        folder = self.run.directory / "rollouts"
        folder.mkdir(exist_ok=True)
        file = folder / f"step_{number}.jsonl"
        temporary = file.with_name(f".tmp_{file.name}")
        with open(temporary, "w", encoding="utf-8") as out:
            for group in groups:
                for rollout in group.rollouts:
                    record = rollout.record(self.task.tokenizer.decode)
                    out.write(json.dumps(record, default=str) + "\n")
        temporary.replace(file)

    # -- learning ------------------------------------------------------------------------------------------------

    def experience(self, collected: Collected) -> Experience:
        """The rollouts as the learner takes them, with what the algorithm compares with: the policy's own
        log-probabilities where it is updated more than once, the reference's, the critic's values."""
        experience = Experience(collected.groups)
        if len(experience):
            algorithm, count = self.algorithm, len(experience)
            several = algorithm.epochs > 1 or self.config.rollouts_in_update(algorithm, count) < count
            experience.score(
                self.learner,
                old=several or algorithm.kl == "reward",
                reference=algorithm.needs_reference,
                values=algorithm.needs_critic,
            )
        return experience

    def improve(self, experience: Experience, step: int, critic_alone: Objective | None = None) -> dict[str, float]:
        """The optimizer steps of one step; the means of their metrics. `critic_alone`: through this objective, and the
        language model stays as it is."""
        kl_in_loss = self.algorithm.kl == "loss" and self.algorithm.needs_reference
        more = kl_in_loss or self.config.entropy_coef > 0 or self.algorithm.needs_critic
        metrics = experience.train(
            self.learner,
            critic_alone or self.objective,
            epochs=self.algorithm.epochs,
            rollouts_per_update=self.config.rollouts_in_update(self.algorithm, len(experience)),
            seed=row_seed(self.config.seed, step, 0),
            skip_idle=not more,
            language=critic_alone is None,
        )
        self.sampler.policy_changed()
        return metrics

    def record(self, collected: Collected, metrics: dict[str, float]) -> None:
        """Log the step; ends a run in which nothing has been learned for long, with a checkpoint."""
        noted = {} if self.task.scorer is None else self.task.scorer.metrics()
        self.session.record({**noted, **rollout_metrics(collected), **metrics})
        self._empty_steps = 0 if tells_apart(collected.groups) else self._empty_steps + 1
        if self._empty_steps not in (SAID_AFTER_EMPTY, self.config.max_empty_steps):
            return
        mean = mean_reward(collected.groups)
        cause = "no rollout has a reward" if math.isnan(mean) else f"all rollouts are equally good (mean {mean:.4g})"
        said = f"nothing could be learned in {self._empty_steps} steps in a row: {cause}"
        self.run.note(said)
        if self._empty_steps == self.config.max_empty_steps:
            with self.session.before_updates():
                raise RunFailedError(
                    f"{said}. Choose easier or harder prompts, a reward with more grades, more samples_per_prompt, or "
                    "a higher temperature"
                )


def tells_apart(groups: Sequence[RolloutGroup]) -> bool:
    """Whether a step's rewards prefer any rollout: to others of its prompt, or of the step where there are none."""
    alone = all(len(group.rollouts) < 2 for group in groups)
    rewards = [[rollout.reward for rollout in group.rollouts] for group in groups]
    compared = [[reward for one in rewards for reward in one]] if alone else rewards
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


def online_objective(config: OnlineConfig, algorithm: Preset) -> PolicyGradient:
    """The preset's objective with the configuration's settings over it."""
    rollouts = config.prompts_per_step * config.samples_per_prompt
    own = config.settings(on_policy_engine=config.engine.kind == "huggingface")
    return algorithm.policy_gradient(
        config.max_completion_length, config.rollouts_in_update(algorithm, rollouts), **own
    )


def check_online(config: OnlineConfig, algorithm: Preset) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    said: list[str] = []
    task = OnlineTask(config, algorithm, said.append)
    task.close()
    task_problems(config.task_evaluation, config, task.tokenizer, said.append)
    online_objective(config, algorithm)
    steps = config.num_steps(len(task.data.train))
    said.append(f"{len(task.data.train)} prompts to train on, {len(task.data.heldout)} held out; {steps} steps")
    return said + checks.fits(config, config, config)
