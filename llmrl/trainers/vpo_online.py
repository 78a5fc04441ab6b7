"""VPO online (optimism): rounds of sampling from the current policy, labelling by rewards, and DPO with a bonus.

Cen et al., arXiv 2405.19320, Algorithm 1. Every step is a round: two answers to each prompt from the policy as it is,
the better one is preferred, and the loss of `llmrl.objectives.vpo`, with s = +1, is minimised on the pairs; what the
reference would say becomes less likely, so that the policy explores. The reference is the model that training began
with. Offline VPO (pessimism) is `llmrl.trainers.vpo`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import Positive, SchedulerType
from llmrl.trainers.online.command import check, describe_sampling, reward_in_words
from llmrl.trainers.online.config import SamplingConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run

__all__ = ["Config", "VPOOnlineConfig", "check", "describe", "train"]


class VPOOnlineConfig(SamplingConfig):
    """VPO online: what a round learns from its samples."""

    method: Literal["vpo_online"] = "vpo_online"
    """The method that this file configures: value-incentivized preference optimization, online."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW. About 1e-6 for all weights, 1e-5 to 5e-5 for a LoRA adapter."""
    lr_scheduler_type: SchedulerType = "constant"
    """Shape of the learning rate over the steps."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 2
    """Answers sampled to each prompt; two of them make a pair."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference: larger keeps the policy closer."""
    alpha: Annotated[float, Field(ge=0)] = 1e-3
    """Strength of the optimism, in the mean form: alpha x beta is the weight of a nat of a calibration answer's
    log-likelihood beside the preference loss. 0 is online DPO. The term has no lower bound: keep it small."""
    alpha_schedule: Literal["constant", "inverse_sqrt"] = "constant"
    """alpha in round k: the same, or alpha / sqrt(k)."""
    calibration: Literal["reference", "both"] = "reference"
    """Whose answers become less likely: samples of the reference, drawn once before training
    (rollouts/calibration.jsonl), or both of each pair, which is what the policy itself says."""
    calibration_samples: Positive = 1
    """Samples of the reference for each prompt."""
    calibration_floor: Annotated[float, Field(lt=0)] | None = None
    """A calibration answer whose log-ratio (nats) is below this is no longer pushed down; null = no floor."""
    least_log_ratio: Annotated[float, Field(lt=0)] | None = -5.0
    """Guard: a mean log-ratio of calibration answers (nats) below this calls for `below_least`; null = never."""
    below_least: Literal["skip", "stop"] = "skip"
    """What the guard does: updates leave the optimism out until the mean is above it again, or the run ends."""
    pairing: Literal["in_order", "best_worst"] = "in_order"
    """Pairs of a prompt's samples: first and second, third and fourth, ..., as independent draws; or the best and the
    worst alone."""
    pairs: Literal["newest", "aggregated"] = "newest"
    """Pairs that a round trains on: its own, or those of all rounds so far."""
    updates_per_step: Positive = 1
    """Optimizer steps of a round."""
    pairs_per_update: Positive | None = None
    """Pairs in one of them; null = as many as the round has brought."""

    @model_validator(mode="after")
    def _sampling_is_asked_for(self) -> Self:
        if self.calibration_samples != 1 and self.calibration != "reference":
            raise ValueError(f"calibration_samples has no meaning with calibration {self.calibration}")
        return self


Config = VPOOnlineConfig


def describe(config: VPOOnlineConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic and the method in words, from the configuration alone."""
    in_order = config.pairing == "in_order"
    pairs = config.prompts_per_step * (config.samples_per_prompt // 2 if in_order else 1)
    weight = f"{config.alpha * config.beta:g}" + (" / sqrt(step)" if config.alpha_schedule == "inverse_sqrt" else "")
    return {
        **describe_sampling(config, world_size, config.updates_per_step),
        "pairs per step": f"at most {pairs}, less the ties; trained on with {config.pairs} pairs",
        "reward": reward_in_words(config),
        "calibration": f"{config.calibration}, weight alpha x beta = {weight} a nat",
    }


def train(
    config: VPOOnlineConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()
) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.trainers.vpo_rounds import Rounds

    with Rounds(config, run, dataset, callbacks) as rounds:
        rounds.draw_calibration()
        for step in rounds.session.steps():
            rounds.stop_if_unbounded()
            collected = rounds.collect(step)
            labelled = rounds.label(collected.groups)
            metrics = rounds.improve(step)
            rounds.record_step(collected, labelled | metrics, taught=labelled["pairs"] > 0)
        rounds.session.finish()
