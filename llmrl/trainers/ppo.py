"""Proximal Policy Optimization with a critic: generalised advantage estimates, clipped ratios, KL in the reward.

Schulman et al., arXiv 1707.06347; for language models Ouyang et al., arXiv 2203.02155. Numbers where both are silent
are those of TRL's PPOTrainer, which is gone since TRL 1.13. The critic is a value head on the policy's last hidden
state.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from llmrl.trainers.online import policy_gradient_command
from llmrl.trainers.online.critic_config import CriticConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run
    from llmrl.trainers.online.policy_gradient_run import PolicyGradientRun


class PPOConfig(CriticConfig):
    """PPO: the method."""

    method: Literal["ppo"] = "ppo"
    """The method that this file configures."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Rollouts of each prompt; the critic is the baseline, so one is enough."""


Config = PPOConfig
describe, check = policy_gradient_command.describe, policy_gradient_command.check


def train(
    config: CriticConfig,
    run: "Run",
    *,
    dataset: Any = None,
    callbacks: "Sequence[TrainerCallback]" = (),
    before_step: "Callable[[PolicyGradientRun, int], dict[str, float]]" = lambda online, step: {},
) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object. before_step: called with the run
    and the step's number (from 0) before anything is sampled; what it returns is logged among the step's metrics. A
    resumed run begins with that of the latest step done, whose evaluation it may have to make again."""
    from llmrl.trainers.online.policy_gradient_run import PolicyGradientRun

    algorithm = config.resolve()
    learner = config.learner_options
    with PolicyGradientRun(config, run, algorithm, dataset=dataset, callbacks=callbacks, **learner) as online:
        if run.start_step:
            before_step(online, run.start_step - 1)
        for step in online.session.steps():
            known = before_step(online, step)
            collected = online.collect(step)
            experience = online.experience(collected)
            online.advantages(experience)
            online.record(collected, {**online.improve(experience, step), **known})
        online.session.finish()
