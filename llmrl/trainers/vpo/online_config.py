"""What online VPO is configured with. Loads without torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import Positive, SchedulerType
from llmrl.trainers.online.config import SteppedConfig


class VPOOnlineConfig(SteppedConfig):
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
    alpha: Annotated[float, Field(ge=0, le=1e4)] = 1e-3
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
        if self.pairing == "in_order" and self.samples_per_prompt % 2:
            raise ValueError(
                f"samples_per_prompt {self.samples_per_prompt} with pairing in_order leaves each prompt's last sample "
                "without another. Use an even number, or pairing best_worst"
            )
        if self.calibration_samples != 1 and self.calibration != "reference":
            raise ValueError(f"calibration_samples has no meaning with calibration {self.calibration}")
        return self
