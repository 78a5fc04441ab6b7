"""What a policy-gradient method with a critic is configured with. Loads without torch."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from llmrl.trainers.online.policy_gradient_config import PolicyGradientConfig


class CriticConfig(PolicyGradientConfig):
    """Critic: what it learns, and how advantages are made of it. `null` is the algorithm's own, published value."""

    ranks_prompts: ClassVar[bool] = False
    learning_rate: Annotated[float, Field(gt=0)] = 3e-6
    """Peak learning rate of AdamW for the language model."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = 1e-4
    """Peak learning rate of the value head, which starts at zero and must learn faster; null = learning_rate."""
    value_coef: Annotated[float, Field(gt=0)] | None = None
    """Weight of the value loss."""
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    """Values are clipped to this distance from what they were when sampled; null = no clipping."""
    value_gradient: bool = False
    """Let the value loss reach the language model; otherwise the head reads its hidden states as they are."""
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    """Discount."""
    lam: Annotated[float, Field(ge=0, le=1)] | None = None
    """GAE's lambda: 1 is return minus value, 0 one-step differences."""
    critic_warmup: Annotated[int, Field(ge=0)] | None = None
    """Steps at the start in which only the critic learns."""

    def algorithm_keys(self) -> dict[str, Any]:
        own = {"gamma": self.gamma, "lam": self.lam, "critic_warmup": self.critic_warmup}
        return super().algorithm_keys() | {name: value for name, value in own.items() if value is not None}

    def loss_keys(self) -> dict[str, Any]:
        own = {} if self.value_coef is None else {"value_coef": self.value_coef}
        return super().loss_keys() | own | {"value_clip": self.value_clip}

    def own_keys(self) -> list[tuple[str, Any, Any]]:
        return super().own_keys() + self.beside_default("value_gradient")

    @model_validator(mode="after")
    def _the_critic_is_the_baseline(self) -> Self:
        if self.dynamic_sampling and not self.ranks_prompts:
            raise ValueError(
                "dynamic_sampling replaces prompts whose rollouts are equally good, because they teach methods that "
                "compare them nothing; here a critic is the baseline, and they teach. Set it to false"
            )
        return self

    @property
    def learner_options(self) -> dict[str, Any]:
        """LearnerOptions of a learner with a critic."""
        return {"value_learning_rate": self.value_learning_rate, "value_gradient": self.value_gradient}
