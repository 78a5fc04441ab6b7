"""BRAIn, iterated: fit the reward-conditioned posterior to samples of the policy, then sample again.

Pandey et al., arXiv 2402.02479v2. Each step draws n samples of each prompt from the policy as it is (the proposal q'),
has them scored, and makes a few passes over whole prompts; the prior p is the model that training began with. The
objective is `llmrl.objectives.brain`; `brain_offline` does the same on samples that were drawn before.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import SchedulerType
from llmrl.trainers.brain.keys import BRAInKeys
from llmrl.trainers.online.command import check, describe_sampling, reward_in_words
from llmrl.trainers.online.config import SteppedConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.learner.sequences import Group
    from llmrl.runs import Run

__all__ = ["BRAInConfig", "Config", "check", "describe", "train"]


class BRAInConfig(SteppedConfig, BRAInKeys):
    """BRAIn, iterated: how often the samples are used before they are drawn again."""

    method: Literal["brain"] = "brain"
    """The method that this file configures."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW. About 1e-6 for all weights, 1e-5 for a LoRA adapter."""
    lr_scheduler_type: SchedulerType = "constant"
    """Shape of the learning rate over the steps."""
    proposal: Literal["old", "behaviour"] = "old"
    """Where the proposal's log-probabilities come from: computed again by the model that is trained, before a step's
    first update, or those that the engine gave with its samples."""
    epochs_per_step: Annotated[int, Field(ge=1)] = 2
    """Passes over a step's samples (TRL: num_iterations)."""
    prompts_per_update: Annotated[int, Field(ge=1)] = 8
    """Prompts, with all their samples, in one optimizer step."""

    @model_validator(mode="after")
    def _exact_weights(self) -> Self:
        if self.temperature != 1:
            raise ValueError(
                f"temperature {self.temperature:g}: samples are weighed by the policy's own probabilities, "
                "and these would be drawn from another distribution. Set it to 1"
            )
        if self.max_staleness and self.proposal == "old":
            raise ValueError(
                "max_staleness 1 with proposal old: the samples are those of the policy a step before, whose "
                "log-probabilities it no longer gives. Use proposal behaviour, or max_staleness 0"
            )
        return self

    @model_validator(mode="after")
    def _compared(self) -> Self:
        least = min(self.samples_per_prompt, self.rollout.min_per_group)
        if least < 2:
            key = "samples_per_prompt" if self.samples_per_prompt < 2 else "rollout.min_per_group"
            raise ValueError(
                f"{key} {least}: the samples of a prompt are weighed against one another, so there must be at least 2"
            )
        if self.prompts_per_update > self.prompts_per_step:
            raise ValueError(
                f"prompts_per_update {self.prompts_per_update} is more than a step has: lower it to prompts_per_step, "
                f"{self.prompts_per_step}, or less"
            )
        return self

    @property
    def updates_per_step(self) -> int:
        return self.epochs_per_step * -(-self.prompts_per_step // self.prompts_per_update)


Config = BRAInConfig
REMEDY = "Raise beta, or draw samples more often: epochs_per_step 1, fewer prompts_per_step, a lower learning_rate"


def describe(config: BRAInConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic and the method in words, from the configuration alone."""
    updates = config.updates_per_step
    size = f"{config.prompts_per_update} prompts"
    gap = "" if config.most_prior_gap is None else f"; samples over {config.most_prior_gap:g} nats from it are left out"
    return {
        **describe_sampling(config, world_size, updates),
        "optimizer steps per step": f"{config.epochs_per_step} epochs x {updates // config.epochs_per_step} of {size}",
        "reward": reward_in_words(config),
        "target": f"prior x exp(reward / {config.beta:g}){gap}",
        "loss": "KL(target || policy) over a prompt's samples"
        if config.baseline
        else "likelihood weighted by the target",
    }


def train(config: BRAInConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.trainers.brain.update import SampleSizeWatch, improve
    from llmrl.trainers.online.experience import Experience
    from llmrl.trainers.online.metrics import means_of_updates
    from llmrl.trainers.online.run import SampledRun, tells_apart

    brain, watch = config.objective(config.proposal), SampleSizeWatch(run.note, REMEDY)
    with SampledRun(config, run, needs_reference=True, dataset=dataset, callbacks=callbacks) as sampled:
        learner = sampled.learner
        for step in sampled.session.steps():
            collected = sampled.collect(step)
            experience = Experience(collected.groups)
            if config.truncated_samples == "leave_out":
                experience.leave_out_cut()
            experience.score(learner, old=config.proposal == "old", reference=True, values=False)
            prompts = [group for group in experience.prompts() if num_samples(group) > 1]
            done = [improve(learner, brain, batch, advance_schedule=False) for batch in batches(prompts, config, step)]
            learner.advance_schedule()
            sampled.policy_changed()
            metrics = means_of_updates(done, learner.learning_rate) | {"rollout/masked": float(experience.num_masked)}
            metrics.pop("reward", None)  # of the prompts that are left; the step's is that of all rollouts
            watch(metrics)
            cause = why_nothing_is_left(config, bool(prompts), metrics)
            taught = cause is None and tells_apart(collected.groups, over_step=False)
            sampled.record_step(collected, metrics, taught=taught, cause=cause)
        sampled.session.finish()


def why_nothing_is_left(config: BRAInConfig, has_prompts: bool, metrics: dict[str, float]) -> str | None:
    """Why a step's updates had no sample to learn from; None where they had."""
    if not has_prompts:
        return "no prompt has two samples left that ended by themselves"
    if metrics.get("brain/left_out") == 1:
        return f"most_prior_gap ({config.most_prior_gap}) leaves out every sample: raise it"
    return None


def num_samples(group: "Group") -> int:
    """Sequences of a group; a rollout in several pieces is one."""
    return sum(not piece.continues for piece in group)


def batches(prompts: "list[Group]", config: BRAInConfig, step: int) -> "Iterator[list[Group]]":
    """Whole prompts for each update of a step: every epoch goes through all once, in an order of its own."""
    import numpy as np

    from llmrl.rollout.protocol import row_seed

    for epoch in range(config.epochs_per_step):
        draw = np.random.RandomState(row_seed(config.seed, step, epoch) % 2**32)
        order = draw.permutation(len(prompts)).tolist()
        for start in range(0, len(order), config.prompts_per_update):
            yield [prompts[i] for i in order[start : start + config.prompts_per_update]]
