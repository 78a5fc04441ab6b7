"""RLSP: PPO on an outcome verifier mixed with a reward for exploration that is blind to correctness.

Ye et al., "On the Emergence of Thinking in LLMs I", arXiv 2502.06773, Eq. 1: R = alpha V + (1 - alpha) Rex with
Rex = -C / |response|. The authors' code adds the terms unweighted, pays a response without a box -0.5, and counts
characters before the first box; per unit of V its length term is four times as strong. Both are here; the paper's is
the default because it is what the text argues for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.objectives.presets import Preset, preset
from llmrl.rewards.keys import RewardFunctionKeys, RewardKeys
from llmrl.trainers import online_config
from llmrl.trainers.ppo import CriticConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run

VERIFIER, EXPLORATION = "verifier", "exploration"


class RLSPConfig(CriticConfig):
    """RLSP: the method."""

    method: Literal["rlsp"] = "rlsp"
    """The method that this file configures."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Rollouts of each prompt."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-7
    """Peak learning rate of AdamW for the language model (the paper's, for all weights of 8B)."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = 1e-4
    """Peak learning rate of the value head. The paper's 2e-6 is for a whole critic that starts from the policy."""
    form_of_reward: Literal["paper", "code"] = "paper"
    """paper: alpha V + (1 - alpha) Rex; code: V + Rex, -0.5 without a box, characters before it counted."""
    reward_missing: Literal["leave_out", "no_score"] = "no_score"
    """Where a function has no score for a completion: it is not trained on, or the sum goes without (the verifier's
    silence would then count as wrong)."""
    verifier: Literal["accuracy", "correct_number", "exact_match"] = "accuracy"
    """The reward function that says whether the answer is right."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Weight of the verifier in the paper's form; 1 is plain PPO."""
    alpha_end: Annotated[float, Field(ge=0, le=1)] | None = None
    """Let alpha go linearly to this over the run (the text wants exploration to fade); null = alpha stays."""
    length_constant: Annotated[float, Field(gt=0)] = 1000.0
    """C: about the length of a response at the start is a sound choice for other lengths than the paper's."""
    exploration_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the exploration reward: guards against padding."""

    @model_validator(mode="after")
    def _own_rewards(self) -> Self:
        derived = ("form_of_reward", "verifier", "alpha", "alpha_end", "length_constant", "exploration_options")
        fields = type(self).model_fields
        given = [key for key in derived if getattr(self, key) != fields[key].get_default(call_default_factory=True)]
        if self.rewards and given:
            raise ValueError(
                f"`rewards` replaces RLSP's own, so that {', '.join(given)} would be ignored: give one or other"
            )
        if self.form_of_reward == "code" and self.verifier == "exact_match":
            raise ValueError("form_of_reward code grades what is in a box: verifier must be correct_number or accuracy")
        if self.alpha_end is not None and self.form_of_reward == "code":
            raise ValueError("alpha_end fades the paper's form: leave form_of_reward as it is")
        if self.alpha_end is not None and self.max_staleness:
            raise ValueError("alpha_end changes the reward from step to step, so that max_staleness must be 0")
        return self

    def reward_keys(self) -> RewardKeys:
        """The published rewards, where none are named."""
        if self.rewards:
            return self
        scale = {"scale": self.length_constant}
        if self.form_of_reward == "code":
            # V counts only where there is a box: without one the base is -0.5, whatever the answer.
            boxed = {"first_box": True, "require_box": True}
            entries = [
                RewardFunctionKeys(function=self.verifier, name=VERIFIER, options=boxed),
                RewardFunctionKeys(function="boxed", options={"present": 0.0, "absent": -0.5}),
                RewardFunctionKeys(
                    function="exploration",
                    name=EXPLORATION,
                    options={**scale, "unit": "characters", "before_box": True, **self.exploration_options},
                ),
            ]
        else:
            options = {**scale, **self.exploration_options}
            entries = [
                RewardFunctionKeys(function=self.verifier, name=VERIFIER, weight=self.alpha, options={}),
                RewardFunctionKeys(function="exploration", name=EXPLORATION, weight=1 - self.alpha, options=options),
            ]
        return self.model_copy(update={"rewards": entries})

    def alpha_at(self, step: int, total_steps: int) -> float:
        """Weight of the verifier in step `step` (from 0)."""
        if self.alpha_end is None or total_steps < 2:
            return self.alpha
        return self.alpha + (self.alpha_end - self.alpha) * step / (total_steps - 1)


Config = RLSPConfig


def algorithm_of(config: RLSPConfig) -> Preset:
    """The preset with what was configured over it."""
    return config.over(preset("rlsp"))


def describe(config: RLSPConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    return online_config.describe(config, algorithm_of(config), world_size)


def check(config: RLSPConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers.online import check_online

    return check_online(config, algorithm_of(config))


def train(config: RLSPConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.objectives.value import ValueRegression
    from llmrl.trainers.online import OnlineRun

    algorithm = algorithm_of(config)
    critic = ValueRegression(config.value_clip).objective()
    learner = config.learner_options
    with OnlineRun(config, run, algorithm, dataset=dataset, callbacks=callbacks, **learner) as online:
        for step in online.session.steps():
            alpha = config.alpha_at(step, online.session.total_steps)
            if config.alpha_end is not None:
                online.weigh({VERIFIER: alpha, EXPLORATION: 1 - alpha})
            collected = online.collect(step)
            experience = online.experience(collected)
            experience.assign_advantages(algorithm)
            critic_alone = critic if step < algorithm.critic_warmup else None
            online.record(collected, {**online.improve(experience, step, critic_alone), "alpha": alpha})
        online.session.finish()
