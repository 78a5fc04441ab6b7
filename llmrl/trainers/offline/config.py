"""Configuration of the methods that train on a fixed set of groups: pairs, segments, the scored samples of a prompt."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmrl.config import DataKeys, Housekeeping, ModelKeys, TaskEvaluationKeys, TrainingKeys
from llmrl.errors import RefusedError


class FixedDataKeys(ModelKeys, DataKeys):
    """Rows that are read once, before training: what becomes of those that cannot be trained on."""

    faulty_rows: Literal["error", "drop"] = "error"
    """What happens to a row that cannot be trained on (an empty answer, two equal ones); dropped ones are counted."""


class PairKeys(FixedDataKeys):
    """Pairs: how many make a step."""

    pairs_per_step: Annotated[int, Field(ge=1)] = 16
    """Pairs in one optimizer step, over all processes together."""


class OfflineKeys(FixedDataKeys, TrainingKeys):
    """Reference and held-out scores: what the policy is compared with."""

    reference: Literal["auto", "adapter_off", "precomputed", "frozen"] = "auto"
    """Where the reference's log-probabilities come from; auto: adapter_off with use_peft, else precomputed at first."""
    form: Literal["auto", "tree", "padded"] = "auto"
    """Forward pass: prefix trees (a shared prompt is computed once) or padded rows; auto: the tree where it works."""
    task_evaluation: Annotated[TaskEvaluationKeys | None, Housekeeping()] = None
    """Greedy accuracy on problems with known answers, beside the held-out scores."""

    @model_validator(mode="after")
    def _one_reference_and_form(self) -> Self:
        if self.reference == "adapter_off" and not self.use_peft:
            raise ValueError("reference adapter_off needs use_peft: true; without an adapter use precomputed")
        if self.form == "tree" and self.attn_implementation != "auto":
            raise ValueError(
                "form tree brings its own attention, so attn_implementation must be auto; or use form padded"
            )
        return self


def describe_groups(
    config: OfflineKeys, world_size: int, per_step: int, noun: str = "pairs", sequences: str | None = None
) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone.

    per_step: groups in a step, which the key `{noun}_per_step` holds. sequences: of a step, in words; two in each group
    if not given. Raises RefusedError where a process would be left without a group.
    """
    if per_step < world_size:
        raise RefusedError(
            f"{noun}_per_step {per_step} over {world_size} processes leaves some without a {noun.removesuffix('s')}; "
            f"set it to at least {world_size}"
        )
    counted = config.max_steps > 0
    steps = str(config.max_steps) if counted else f"{config.num_train_epochs:g} x {noun} / {per_step}, rounded up"
    seen = f", {config.max_steps * per_step} {noun}" if counted else ""
    return {
        "processes": world_size,
        "optimizer steps": steps + seen,
        f"{noun} per step": f"{per_step} in all, about {per_step / world_size:g} a process",
        "sequences per step": 2 * per_step if sequences is None else sequences,
        "micro-batches": f"of {config.tokens_per_microbatch} tokens; they never change the gradient",
    }
