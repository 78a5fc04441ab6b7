"""PF-PPO: PPO on those responses of a prompt whose reward can be trusted.

Zhang et al., "Policy Filtration for RLHF to Mitigate Noise in Reward Models", arXiv 2409.06957: a reward model is
reliable for the best and the worst of a prompt's responses, and noisy between. All responses go through advantages and
whitening, then the filtration says how often each counts; the objective stays PPO's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import SchedulerType
from llmrl.trainers.online import policy_gradient_command
from llmrl.trainers.online.critic_config import CriticConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run


class PFPPOConfig(CriticConfig):
    """PF-PPO: the filtration."""

    ranks_prompts: ClassVar[bool] = True
    method: Literal["pf_ppo"] = "pf_ppo"
    """The method that this file configures."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 5
    """Responses to each prompt, among which the filtration chooses."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate of AdamW for the language model (the paper's, for all weights of 7B)."""
    lr_scheduler_type: SchedulerType = "cosine"
    """Shape of the learning rate over the steps (the authors' code's)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises from 0 to its peak (the authors' code's)."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean (the authors' code's)."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = 1e-4
    """Peak learning rate of the value head. The paper's 9e-6 is for a whole critic that starts from the policy."""
    filtration: Literal["none", "best", "best_random", "best_worst", "power"] = "best_random"
    """Which responses of a prompt are trained on: the best (BoN), the best and a random other (BR, best in the paper's
    table), the best and the worst (BW), draws with probability |reward|^power over the whole step, or all."""
    filtration_power: Annotated[float, Field(gt=0)] = 2.0
    """The k of |reward|^k."""
    rows_per_prompt: Annotated[int, Field(ge=1)] = 2
    """Rows drawn a prompt with filtration power."""
    truth: str | None = None
    """Name of a reward (of weight 0, say) that gives the actual score: R^2 of how well the reward predicts it, with its
    interval, slope and points, is then logged for every filtration over the latest ten steps, the paper's measure for
    choosing one."""

    @property
    def trained_per_prompt(self) -> int:
        kept = {"none": self.samples_per_prompt, "best": 1, "power": self.rows_per_prompt}
        return kept.get(self.filtration, 2)

    @model_validator(mode="after")
    def _something_to_filter(self) -> Self:
        if self.filtration in ("best_random", "best_worst") and self.samples_per_prompt < 3:
            raise ValueError(
                f"samples_per_prompt {self.samples_per_prompt}: {self.filtration} takes two of a prompt's responses, "
                "so that with fewer than 3 nothing is filtered"
            )
        if self.truth is not None and self.truth not in {entry.label for entry in self.rewards}:
            raise ValueError(f"truth names `{self.truth}`, which is none of the rewards")
        return self


Config = PFPPOConfig
check = policy_gradient_command.check


def describe(config: PFPPOConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic and the algorithm in force, from the configuration alone."""
    kept = f"{config.filtration}: {config.trained_per_prompt} of {config.samples_per_prompt} rollouts of a prompt"
    kept += f", drawn by |reward|^{config.filtration_power:g}" if config.filtration == "power" else ""
    return {**policy_gradient_command.describe(config, world_size), "trained on": kept}


def train(config: PFPPOConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    import torch

    from llmrl.objectives.filtration import filtration_metrics, multiplicities
    from llmrl.rollout.protocol import row_seed
    from llmrl.trainers.online.policy_gradient_run import PolicyGradientRun
    from llmrl.trainers.online.reward_fits import RewardFits

    algorithm = config.resolve()
    learner = config.learner_options
    with PolicyGradientRun(config, run, algorithm, dataset=dataset, callbacks=callbacks, **learner) as online:
        fits = None if config.truth is None else RewardFits(config.truth, config.filtration_power)
        if fits is not None:
            online.learner.accelerator.register_for_checkpointing(fits)
        for step in online.session.steps():
            collected = online.collect(step)
            experience = online.experience(collected)
            online.advantages(experience)
            metrics: dict[str, float] = {}
            if len(experience):
                rewards_S, group_S = experience.rewards_S, experience.group_index_S
                draws = torch.Generator().manual_seed(row_seed(config.seed, step, 2))
                counts_S = multiplicities(
                    rewards_S, group_S, config.filtration, draws, config.filtration_power, config.rows_per_prompt
                )
                metrics = filtration_metrics(rewards_S, group_S, counts_S)
                experience.set_weights(counts_S.tolist())
                if fits is not None:
                    fits.add(collected.groups)
                    metrics |= fits.metrics(draws)
            online.record(collected, {**metrics, **online.improve(experience, step)})
        online.session.finish()
