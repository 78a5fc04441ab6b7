"""VPO online (optimism): rounds of sampling from the current policy, labelling by rewards, and DPO with a bonus.

Cen et al., arXiv 2405.19320, Algorithm 1. Every step is a round: two answers to each prompt from the policy as it is,
the better one is preferred, and the loss of `llmrl.objectives.vpo`, with s = +1, is minimised on the pairs; what the
reference would say becomes less likely, so that the policy explores. The reference is the model that training began
with. Offline VPO (pessimism) is `llmrl.trainers.vpo.offline`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrl.trainers.online.command import check, describe_sampling, reward_in_words
from llmrl.trainers.vpo.online_config import VPOOnlineConfig

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from llmrl.runs import Run

__all__ = ["Config", "VPOOnlineConfig", "check", "describe", "train"]


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
    from llmrl.trainers.vpo.rounds import Rounds

    with Rounds(config, run, dataset, callbacks) as rounds:
        rounds.draw_calibration()
        for step in rounds.session.steps():
            rounds.stop_if_unbounded()
            collected = rounds.collect(step)
            labelled = rounds.label(collected.groups)
            metrics = rounds.improve(step)
            taught, cause = labelled["pairs"] > 0, rounds.why_nothing(labelled)
            if not taught:  # whose loss is 0, as if all were learned
                ties, cut_off = labelled["pairs/ties"], labelled["pairs/cut_off"]
                run.console.say(f"step {step + 1}: no pair, no update ({ties:.0f} ties, {cut_off:.0f} answers cut off)")
            rounds.record_step(collected, labelled | metrics, taught=taught, cause=cause)
        rounds.session.finish()
