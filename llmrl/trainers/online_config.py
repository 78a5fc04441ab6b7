"""What every online method is configured with, and the arithmetic of its batches. Loads without torch."""

import dataclasses
import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from llmrl.config import Housekeeping, ModelKeys, OptimizationKeys, RunKeys, TaskEvaluationKeys
from llmrl.config.online import OnlineKeys, PolicyGradientKeys
from llmrl.errors import RefusedError
from llmrl.objectives.presets import Place, Preset
from llmrl.rewards.keys import RewardFunctionKeys, RewardKeys


class OnlineConfig(ModelKeys, OnlineKeys, RewardKeys, OptimizationKeys, PolicyGradientKeys, RunKeys):
    """Keys of the methods that learn from their own rollouts."""

    rewards: list[RewardFunctionKeys] = Field(default_factory=list)
    """Reward functions, each a name or a section (function, weight, name, options); the reward is their weighted sum
    and that of the environment's own rewards. Empty: the environment's own alone."""
    task_evaluation: Annotated[TaskEvaluationKeys | None, Housekeeping()] = None
    """Greedy accuracy on further problems with known answers, beside the held-out rows."""

    @model_validator(mode="after")
    def _rewarded(self) -> Self:
        if self.environment == "question_answer" and not self.reward_keys().rewards:
            raise ValueError(
                "environment question_answer has no rewards of its own: name reward functions in `rewards`"
            )
        return self

    def num_steps(self, num_prompts: int) -> int:
        """Steps of the method: max_steps, or as many as the epochs need."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * num_prompts / self.prompts_per_step)

    def rollouts_in_update(self, algorithm: Preset, rollouts: int) -> int:
        """Rollouts in one optimizer step, of `rollouts` that a step trains on."""
        return max(min(self.rollouts_per_update or math.ceil(rollouts / algorithm.updates), rollouts), 1)

    def reward_keys(self) -> RewardKeys:
        """What the reward functions are built from."""
        return self

    def over(self, algorithm: Preset) -> Preset:
        """The algorithm with what was configured over its published values."""
        if self.beta is not None:
            place: Place = "none" if self.beta == 0 else algorithm.kl if algorithm.kl != "none" else "loss"
            algorithm = dataclasses.replace(algorithm, kl=place, beta=self.beta)
        return dataclasses.replace(algorithm, epochs=self.epochs_per_step or algorithm.epochs)

    def settings(self, on_policy_engine: bool) -> dict[str, Any]:
        """Settings of PolicyGradient that were configured over the algorithm's own."""
        given: dict[str, Any] = {"entropy_coef": self.entropy_coef}
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        correction = self.correction
        if correction == "auto":
            correction = "none" if on_policy_engine else "truncate"
        return {
            **given,
            "correction": correction,
            "correction_level": self.correction_level,
            "correction_cap": self.correction_cap,
        }


def describe(
    config: OnlineConfig, algorithm: Preset, world_size: int, trained_per_prompt: int | None = None
) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone. `trained_per_prompt`: rollouts of a prompt that are
    trained on, where they are not all."""
    if config.prompts_per_step < world_size:
        raise RefusedError(
            f"prompts_per_step {config.prompts_per_step} over {world_size} processes leaves some without a prompt; "
            f"set it to at least {world_size}"
        )
    rollouts = config.prompts_per_step * config.samples_per_prompt
    trained = config.prompts_per_step * (trained_per_prompt or config.samples_per_prompt)
    size = config.rollouts_in_update(algorithm, trained)
    epochs = config.epochs_per_step or algorithm.epochs
    updates = epochs * math.ceil(trained / size)
    steps = (
        str(config.max_steps)
        if config.max_steps > 0
        else f"{config.num_train_epochs:g} x prompts / {config.prompts_per_step}, rounded up"
    )
    return {
        "processes": world_size,
        "steps": f"{steps}, each of a rollout phase and up to {updates} optimizer steps",
        "prompts per step": f"{config.prompts_per_step}, about {config.prompts_per_step / world_size:g} a process",
        "rollouts per step": f"{config.prompts_per_step} prompts x {config.samples_per_prompt} samples = {rollouts}",
        "optimizer steps per step": f"{epochs} epochs x {math.ceil(trained / size)} updates of {size} rollouts",
        "sampled tokens per step": f"at most {rollouts * config.rollout.max_turns * config.max_completion_length:,}",
        "micro-batches": f"of {config.tokens_per_microbatch} tokens; they never change the gradient",
    }
