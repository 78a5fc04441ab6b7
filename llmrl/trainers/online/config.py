"""What every method that samples from its policy is configured with: model, prompts, engine, rewards. Loads without
torch."""

import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from llmrl.config import Housekeeping, TaskEvaluationKeys, TrainingKeys
from llmrl.config.online import SamplingKeys, StepKeys
from llmrl.rewards.keys import RewardFunctionKeys, RewardKeys


class SamplingConfig(SamplingKeys, RewardKeys, TrainingKeys):
    """Keys of the methods that learn from what they sample, whatever their objective is."""

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

    @model_validator(mode="after")
    def _own_random_numbers(self) -> Self:
        if self.max_staleness and self.engine.kind == "vllm" and self.use_peft and self.lora_dropout:
            raise ValueError(
                "max_staleness 1 with engine.kind vllm shares random numbers with lora_dropout; set it to 0"
            )
        return self

    @property
    def prompts_at_once(self) -> int:
        """Prompts that are answered with the same weights, over all processes together."""
        raise NotImplementedError

    def num_steps(self, num_prompts: int) -> int:
        """Steps of the method: max_steps, or as many as the epochs need."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * num_prompts / self.prompts_at_once)

    def reward_keys(self) -> RewardKeys:
        """What the reward functions are built from."""
        return self

    def beside_default(self, *names: str) -> list[tuple[str, Any, Any]]:
        """These keys as (name, value, default)."""
        fields = type(self).model_fields
        return [(name, getattr(self, name), fields[name].get_default(call_default_factory=True)) for name in names]


class SteppedConfig(SamplingConfig, StepKeys):
    """Keys of those that sample in every step."""

    @property
    def prompts_at_once(self) -> int:
        """Those of a step."""
        return self.prompts_per_step
