"""RLSP: PPO on an outcome verifier mixed with a reward for exploration that is blind to correctness.

Ye et al., "On the Emergence of Thinking in LLMs I", arXiv 2502.06773, Eq. 1: R = alpha V + (1 - alpha) Rex with
Rex = -C / |response|, or the grade that a judge gives for effort. The authors' code adds the terms unweighted, pays a
response without a box -0.5, and counts characters before the first box; per unit of V its length term is four times as
strong. With a judge it is alpha of that sum and 1 - alpha of the grade. All are here; the paper's is the default for it
is what the text argues for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import SchedulerType
from llmrl.rewards.keys import RewardFunctionKeys, RewardKeys
from llmrl.trainers import ppo
from llmrl.trainers.online import policy_gradient_command
from llmrl.trainers.online.critic_config import CriticConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run
    from llmrl.trainers.online.policy_gradient_run import PolicyGradientRun

VERIFIER, EXPLORATION, JUDGE, BOXED = "verifier", "exploration", "judge", "boxed"
DERIVED = ("form_of_reward", "judge", "verifier", "alpha", "alpha_end", "length_constant", "exploration_options")
"""Keys that RLSP's rewards are made of."""


class RLSPConfig(CriticConfig):
    """RLSP: the method."""

    method: Literal["rlsp"] = "rlsp"
    """The method that this file configures."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Rollouts of each prompt."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-7
    """Peak learning rate of AdamW for the language model (the paper's, for all weights of 8B)."""
    lr_scheduler_type: SchedulerType = "cosine_with_min_lr"
    """Shape of the learning rate over the steps (the paper's: to a tenth of the peak)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises from 0 to its peak (the paper's)."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean (the authors' code's)."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = 1e-4
    """Peak learning rate of the value head. The paper's 2e-6 is for a whole critic that starts from the policy."""
    form_of_reward: Literal["paper", "code"] = "paper"
    """paper: alpha V + (1 - alpha) Rex; code: V + Rex, -0.5 without a box, characters before it counted."""
    judge: RewardFunctionKeys | None = None
    """A reward function of yours, or a reward model with the option sigmoid, that grades effort and not correctness, in
    [0, 1]: what lies outside is no score. With form paper it is Rex in place of the length; with code the reward is
    alpha (V + length) + (1 - alpha) judge."""
    reward_missing: Literal["leave_out", "no_score"] = "no_score"
    """Where a function has no score for a completion: it is not trained on, or the sum goes without (the verifier's
    silence would then count as wrong)."""
    verifier: Literal["accuracy", "correct_number", "exact_match"] = "accuracy"
    """The reward function that says whether the answer is right."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Weight of the verifier in the paper's form, of all but the judge in the code's; 1 is plain PPO in the paper's."""
    alpha_end: Annotated[float, Field(ge=0, le=1)] | None = None
    """Let alpha go linearly to this over the run (the text wants exploration to fade); null = alpha stays."""
    length_constant: Annotated[float, Field(gt=0)] = 1000.0
    """C: about the length of a response at the start is a sound choice for other lengths than the paper's."""
    exploration_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the exploration reward: guards against padding."""

    def own_keys(self) -> list[tuple[str, Any, Any]]:
        replaced = [("rewards", "one's own", "RLSP's")] if self.rewards else []
        judge = [] if self.judge is None else [("judge", self.judge.function, "none")]
        plain = [key for key in DERIVED if key != "judge"]
        return super().own_keys() + replaced + judge + self.beside_default(*plain, "reward_missing")

    @model_validator(mode="after")
    def _own_rewards(self) -> Self:
        given = [key for key, own, its in self.beside_default(*DERIVED) if own != its]
        if self.rewards and given:
            raise ValueError(
                f"`rewards` replaces RLSP's own, so that {', '.join(given)} would be ignored: give one or other"
            )
        if self.form_of_reward == "code" and self.verifier == "exact_match":
            raise ValueError("form_of_reward code grades what is in a box: verifier must be correct_number or accuracy")
        if self.judge is not None and (self.judge.weight != 1 or self.judge.name):
            raise ValueError("judge: give function and options alone: its weight is 1 - alpha, its name judge")
        unread = [key for key in given if key in ("length_constant", "exploration_options")]
        if self.judge is not None and self.form_of_reward == "paper" and unread:
            raise ValueError(f"with a judge the paper's form has no reward for length: leave out {', '.join(unread)}")
        if self.judge is None and self.form_of_reward == "code" and "alpha" in given:
            raise ValueError("alpha has no meaning in the code's form without a judge: leave it out")
        if self.alpha_end is not None and self.form_of_reward == "code":
            raise ValueError("alpha_end fades the paper's form: leave form_of_reward as it is")
        if self.alpha_end is not None and self.max_staleness:
            raise ValueError("alpha_end changes the reward from step to step, so that max_staleness must be 0")
        return self

    def reward_keys(self) -> RewardKeys:
        """The published rewards, where none are named."""
        if self.rewards:
            return self
        code = self.form_of_reward == "code"
        options: dict[str, dict[str, Any]] = {
            # V counts only where there is a box: without one the base is -0.5, whatever the answer.
            VERIFIER: {"first_box": True, "require_box": True} if code else {},
            BOXED: {"present": 0.0, "absent": -0.5},
            EXPLORATION: {
                "scale": self.length_constant,
                **({"unit": "characters", "before_box": True} if code else {}),
                **self.exploration_options,
            },
            JUDGE: {} if self.judge is None else self.judge.options,
        }
        functions = {VERIFIER: self.verifier, JUDGE: "" if self.judge is None else self.judge.function}
        entries = [
            RewardFunctionKeys(function=functions.get(name, name), name=name, weight=weight, options=options[name])
            for name, weight in self.weights(self.alpha).items()
        ]
        return self.model_copy(update={"rewards": entries})

    @property
    def score_ranges(self) -> dict[str, tuple[float, float]]:
        return {} if self.judge is None else {JUDGE: (0.0, 1.0)}

    def weights(self, alpha: float) -> dict[str, float]:
        """Of the rewards, by their names in metrics: (verifier, exploration, judge) is (alpha, 1 - alpha, 0) in the
        paper, (alpha, 0, 1 - alpha) there with a judge, (1, 1, 0) in the code, (alpha, alpha, 1 - alpha) with one."""
        if self.form_of_reward == "paper":
            return {VERIFIER: alpha, (EXPLORATION if self.judge is None else JUDGE): 1 - alpha}
        own = 1.0 if self.judge is None else alpha
        graded = {} if self.judge is None else {JUDGE: 1 - alpha}
        return {VERIFIER: own, BOXED: own, EXPLORATION: own, **graded}

    @property
    def length_is_free(self) -> bool:
        """See RunKeys: alpha reaches alpha_end in the last step."""
        return super().length_is_free and self.alpha_end is None

    def alpha_at(self, step: int, total_steps: int) -> float:
        """Weight of the verifier in step `step` (from 0)."""
        if self.alpha_end is None or total_steps < 2:
            return self.alpha
        return self.alpha + (self.alpha_end - self.alpha) * step / (total_steps - 1)


Config = RLSPConfig
describe, check = policy_gradient_command.describe, policy_gradient_command.check


def train(config: RLSPConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as PPO does, with the rewards weighed anew where alpha fades. `dataset` replaces `dataset_name` by a
    `datasets` object."""

    def fade(online: "PolicyGradientRun", step: int) -> dict[str, float]:
        alpha = config.alpha_at(step, online.session.total_steps)
        if config.alpha_end is not None:
            online.weigh(config.weights(alpha))
        return {"alpha": alpha}

    ppo.train(config, run, dataset=dataset, callbacks=callbacks, before_step=fade)
