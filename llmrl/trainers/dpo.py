"""Direct Preference Optimization on a fixed set of preference pairs.

Rafailov et al., arXiv 2305.18290. The loss is `llmrl.objectives.dpo`; this file is its configuration and its loop.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.trainers.offline.config import OfflineKeys, PairKeys, describe_groups

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.learner.sequences import Floats, Group
    from llmrl.runs import Run


class DPOConfig(PairKeys, OfflineKeys):
    """DPO: what is optimized."""

    method: Literal["dpo"] = "dpo"
    """The method that this file configures."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW. About 1e-6 for all weights, 1e-5 to 5e-5 for a LoRA adapter."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference: larger keeps the policy closer."""
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm"] = "sigmoid"
    """sigmoid is the paper's; ipo divides log-ratios by length, as in TRL, ipo_sum does not; sigmoid_norm does."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong: conservative DPO with sigmoid, unbiased under noise with robust."""
    rpo_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answer's negative log-likelihood a token, beside the preference loss: keeps it likely."""

    @property
    def length_is_free(self) -> bool:
        """See RunKeys."""
        return self.lr_scheduler_type == "constant"

    @model_validator(mode="after")
    def _smoothable(self) -> Self:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust", "sigmoid_norm"):
            raise ValueError(
                f"label_smoothing has no meaning with loss_type {self.loss_type}; use sigmoid or robust, or set it to 0"
            )
        return self


Config = DPOConfig


def describe(config: DPOConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    return describe_groups(config, world_size, config.pairs_per_step)


def check(config: DPOConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.data.preferences import prepare_preferences
    from llmrl.trainers.offline.run import check_offline, prepared

    return check_offline(config, partial(prepared, config, prepare_preferences), config.pairs_per_step)


def train(config: DPOConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.data.preferences import prepare_preferences
    from llmrl.evaluation.implicit import learner_drift, without_drift
    from llmrl.evaluation.preferences import preference_metrics
    from llmrl.objectives.dpo import DPO
    from llmrl.trainers.offline.run import OfflineRun, pair, prepared

    tokenizer, data = prepared(config, prepare_preferences, run.note, dataset)
    objective = DPO(config.beta, config.loss_type, config.label_smoothing, config.rpo_alpha).objective()
    offline = OfflineRun(config, run, tokenizer, data, config.pairs_per_step, callbacks=callbacks)

    if data.heldout and (reason := without_drift(offline.learner)):
        run.note(f"Held-out pairs are evaluated without reference_drift: {reason}.")

    def heldout(groups: "list[Group]", logprobs: "list[list[Floats]]") -> dict[str, float]:
        return preference_metrics(groups, logprobs, objective) | learner_drift(offline.learner, groups, config.beta)

    offline.prepare(pair, {"preference": heldout})
    for step in offline.session.steps():
        offline.session.record(offline.learner.update(offline.groups(step), objective))
    offline.session.finish()
