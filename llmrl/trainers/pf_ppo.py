"""PF-PPO: PPO on those responses of a prompt whose reward can be trusted.

Zhang et al., "Policy Filtration for RLHF to Mitigate Noise in Reward Models", arXiv 2409.06957: a reward model is
reliable for the best and the worst of a prompt's responses, and noisy between. All responses go through advantages and
whitening, then the filtration says how often each counts; the objective stays PPO's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.objectives.presets import Preset, preset
from llmrl.trainers import online_config
from llmrl.trainers.ppo import CriticConfig

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from llmrl.objectives.filtration import Strategy
    from llmrl.rollout.collector import Collected
    from llmrl.runs import Run

STRATEGIES: "tuple[Strategy, ...]" = ("none", "best", "best_random", "best_worst", "power")


class PFPPOConfig(CriticConfig):
    """PF-PPO: the filtration."""

    method: Literal["pf_ppo"] = "pf_ppo"
    """The method that this file configures."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 5
    """Responses to each prompt, among which the filtration chooses."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate of AdamW for the language model (the paper's, for all weights of 7B)."""
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
    """Name of a reward (of weight 0, say) that gives the actual score: R^2 of how well the reward predicts it is then
    logged for every filtration, the paper's measure for choosing one."""

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


def algorithm_of(config: PFPPOConfig) -> Preset:
    """The preset with what was configured over it."""
    return config.over(preset("pf_ppo"))


def describe(config: PFPPOConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    kept = {"none": config.samples_per_prompt, "best": 1, "power": config.rows_per_prompt}.get(config.filtration, 2)
    lines = online_config.describe(config, algorithm_of(config), world_size, kept)
    return {**lines, "trained on": f"{config.filtration}: {kept} of {config.samples_per_prompt} rollouts of a prompt"}


def check(config: PFPPOConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers.online import check_online

    return check_online(config, algorithm_of(config))


def train(config: PFPPOConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    import torch

    from llmrl.objectives.filtration import filtration_metrics, multiplicities
    from llmrl.objectives.value import ValueRegression
    from llmrl.rollout.protocol import row_seed
    from llmrl.trainers.online import OnlineRun

    algorithm = algorithm_of(config)
    critic = ValueRegression(config.value_clip).objective()
    learner = config.learner_options
    with OnlineRun(config, run, algorithm, dataset=dataset, callbacks=callbacks, **learner) as online:
        for step in online.session.steps():
            collected = online.collect(step)
            experience = online.experience(collected)
            experience.assign_advantages(algorithm)
            metrics: dict[str, float] = {}
            if len(experience):
                rewards_S, group_S = experience.rewards_S, experience.group_index_S
                draws = torch.Generator().manual_seed(row_seed(config.seed, step, 2))
                counts_S = multiplicities(
                    rewards_S, group_S, config.filtration, draws, config.filtration_power, config.rows_per_prompt
                )
                metrics = filtration_metrics(rewards_S, group_S, counts_S) | reward_fits(config, collected, draws)
                experience.set_weights(counts_S.tolist())
            critic_alone = critic if step < algorithm.critic_warmup else None
            online.record(collected, {**metrics, **online.improve(experience, step, critic_alone)})
        online.session.finish()


def reward_fits(config: PFPPOConfig, collected: "Collected", draws: "torch.Generator") -> dict[str, float]:
    """R^2 of the actual score's regression on the reward under each filtration; nothing without `truth`."""
    import torch

    from llmrl.objectives.filtration import rank_weights, reward_edges, reward_fit

    if config.truth is None:
        return {}
    known = [
        (rollout.reward, rollout.scores.get(config.truth), number)
        for number, group in enumerate(collected.groups)
        for rollout in group.rollouts
    ]
    sound = [(reward, truth, number) for reward, truth, number in known if reward is not None and truth is not None]
    if not sound:
        return {}
    rewards_S, truth_S, group_S = (torch.tensor(column) for column in zip(*sound, strict=True))
    edges = reward_edges(rewards_S)
    fits = {}
    for strategy in STRATEGIES:
        weights_S = torch.ones(len(sound), dtype=torch.float64)
        if strategy != "none":
            weights_S = rank_weights(rewards_S, group_S, strategy, draws, config.filtration_power)
        fits[strategy] = reward_fit(rewards_S, truth_S, weights_S, edges)
    return {
        f"filtration/r_squared/{strategy}": fit.r_squared for strategy, fit in fits.items() if fit.r_squared is not None
    }
