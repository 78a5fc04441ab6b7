"""LOOP and its critic-free relatives: rollouts of a prompt are judged against one another.

Chen et al., "Reinforcement Learning for Long-Horizon Interactive LLM Agents", arXiv 2502.01600, Algorithm 1: one copy
of the language model, no value network, several optimizer steps on each batch of rollouts. The objective is
`llmrl.objectives.policy_gradient`, the published algorithms are `llmrl.objectives.presets`; this file is configuration
and loop.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import SchedulerType
from llmrl.trainers.online import policy_gradient_command
from llmrl.trainers.online.policy_gradient_config import PolicyGradientConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run


class LOOPConfig(PolicyGradientConfig):
    """LOOP: which algorithm of the family, and what is left out."""

    method: Literal["loop"] = "loop"
    """The method that this file configures."""
    algorithm: Literal[
        "loop", "loop_code", "loop_turn", "loop_trajectory", "rloo", "reinforce", "grpo", "dr_grpo", "gspo", "cispo",
        "dapo_clip", "reinforce_plus_plus", "reinforce_plus_plus_baseline",
    ] = "loop"  # fmt: skip
    """The published algorithm: null keys have its values. dapo_clip is decoupled-clip DAPO (arXiv 2503.14476)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW. About 1e-6 for all weights, 2e-5 to 5e-5 for a LoRA adapter."""
    lr_scheduler_type: SchedulerType = "constant"
    """Shape of the learning rate over the steps."""
    min_advantage: Annotated[float, Field(ge=0)] = 0.01
    """Rollouts with a smaller absolute advantage are not trained on: LOOP's filter; the others only skip zeros."""
    rollouts_per_update: Annotated[int, Field(ge=1)] | None = None
    """Rollouts in one optimizer step; null = 32 for loop and its variants, a sixteenth of a step for dapo_clip, all of
    them at once for the others."""

    @property
    def algorithm_name(self) -> str:
        return self.algorithm

    @property
    def filters(self) -> bool:
        """Whether the algorithm leaves out what has a small advantage."""
        return self.algorithm.startswith("loop")

    def own_keys(self) -> list[tuple[str, Any, Any]]:
        return super().own_keys() + self.beside_default("min_advantage")

    @model_validator(mode="after")
    def _a_filter_of_loops(self) -> Self:
        if not self.filters and any(own != its for _, own, its in self.beside_default("min_advantage")):
            raise ValueError(f"min_advantage would be ignored: it is LOOP's filter, and {self.algorithm} has none")
        return self

    @model_validator(mode="after")
    def _group_of_one(self) -> Self:
        if self.samples_per_prompt < 2 and self.published.advantage != "reward_to_go":
            raise ValueError(
                f"samples_per_prompt {self.samples_per_prompt}: {self.algorithm} judges the rollouts of a prompt "
                "against one another and needs at least 2"
            )
        return self


Config = LOOPConfig
describe, check = policy_gradient_command.describe, policy_gradient_command.check


def train(config: LOOPConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.objectives.advantages import worth_training
    from llmrl.trainers.online.policy_gradient_run import PolicyGradientRun

    algorithm = config.resolve()
    with PolicyGradientRun(config, run, algorithm, dataset=dataset, callbacks=callbacks) as online:
        for step in online.session.steps():
            collected = online.collect(step)
            experience = online.experience(collected)
            advantages_S = online.advantages(experience)
            if config.filters:
                experience.keep(worth_training(advantages_S, config.min_advantage))
            online.record(collected, online.improve(experience, step))
        online.session.finish()
