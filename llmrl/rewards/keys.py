"""The keys by which a method's configuration says what is rewarded. Loads without torch.

A method inherits `RewardKeys` beside its other groups.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails

from llmrl.config import Housekeeping, Keys
from llmrl.config.nearest import nearest
from llmrl.config.schema import shape

Text = Annotated[str, Field(min_length=1)]


class RewardFunctionKeys(Keys):
    """One entry of `rewards`."""

    function: Text
    """A built-in function's name, `FILE.py:FUNCTION` or `PACKAGE.MODULE:FUNCTION` of your own, or a reward model: the
    hub id or folder of a sequence classifier with one output."""
    weight: float = 1.0
    """What its scores are multiplied by before they are added up."""
    name: Text | None = None
    """Its name in metrics (rewards/NAME/mean); the function's own when not given."""
    options: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Its options: of a built-in function its own, of one of yours further keyword arguments."""

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A text is a function without more; options are typed as YAML types them; mistakes name entry and key."""
        if isinstance(value, str):
            value = {"function": value}
        if isinstance(value, dict) and isinstance(value.get("options"), dict):
            value = value | {"options": _typed(value["options"])}
        try:
            return handler(value)
        except ValidationError as error:
            mistakes = "; ".join(_mistake(details) for details in error.errors())
            raise ValueError(f"{mistakes}, in the entry {value}") from None

    @property
    def label(self) -> str:
        """`name`, or else what the function is called: the part behind a colon, the last part of a path."""
        return self.name or self.function.rpartition(":")[2].rstrip("/").rpartition("/")[2]


class RewardKeys(Keys):
    """Rewards: what judges an answer."""

    rewards: Annotated[list[RewardFunctionKeys], Field(min_length=1)]
    """Reward functions, each a name or a section (function, weight, name, options); their weighted sum counts."""
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    """The weighted sum is held between minus this and this; null = as it is."""
    reward_missing: Literal["leave_out", "no_score"] = "leave_out"
    """Where a function has no score for a completion: its part is left out of the sum, as in TRL, or there is no sum
    and the completion is not trained on. Without any function's score there is never a sum."""
    reward_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """A call of one of your reward functions that takes longer gives no score."""
    reward_max_failures: Annotated[int, Field(ge=1), Housekeeping()] = 3
    """The run stops after so many calls of one reward function in a row that raised, timed out or scored nothing."""
    verifier_processes: Annotated[int, Field(ge=1), Housekeeping()] = 2
    """Child processes for verifications that could hang or crash."""
    verifier_timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """A verification that takes longer is ended and gives no score."""

    @property
    def score_ranges(self) -> dict[str, tuple[float, float]]:
        """Of functions, by label, whose scores must lie within bounds: what lies outside is no score."""
        return {}

    @model_validator(mode="after")
    def _distinct_rewards(self) -> Self:
        labels = [entry.label for entry in self.rewards]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise ValueError(f"rewards: two functions are called `{twice}`; give each a `name` of its own")
        if self.rewards and all(entry.weight == 0 for entry in self.rewards):
            raise ValueError("rewards: every weight is 0, so that nothing is rewarded")
        return self


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_typed(inner) for inner in value]
    return shape(value, Any, "") if isinstance(value, str) else value


def _mistake(details: ErrorDetails) -> str:
    key = ".".join(map(str, details["loc"]))
    if details["type"] == "extra_forbidden":
        return f"unknown key `{key}`; did you mean `{nearest(key, RewardFunctionKeys.model_fields)}`?"
    if details["type"] == "missing":
        return f"key `{key}` is missing"
    return f"`{key}`: {details['msg']}" if key else details["msg"]
