"""VPO offline (pessimism): DPO that also keeps calibration answers likely.

Cen et al., arXiv 2405.19320, Algorithm 2. The loss is `llmrl.objectives.vpo`, with s = -1; this file is configuration
and loop. Online VPO (optimism) is `llmrl.trainers.vpo.online`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.keys import Positive
from llmrl.trainers.offline.config import OfflineKeys, PairKeys, describe_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from llmrl.data.preferences import PreferenceData
    from llmrl.learner.sequences import Group
    from llmrl.runs import Run
    from llmrl.trainers.offline.run import OfflineRun


class VPOConfig(PairKeys, OfflineKeys):
    """VPO: what is optimized."""

    method: Literal["vpo"] = "vpo"
    """The method that this file configures: value-incentivized preference optimization, offline."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW. About 1e-6 for all weights, 1e-5 to 5e-5 for a LoRA adapter."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference: larger keeps the policy closer."""
    alpha: Annotated[float, Field(ge=0, le=1e4)] = 0.5
    """Strength of the pessimism, in the mean form: alpha x beta is the weight of a nat of a calibration answer's
    log-likelihood beside the preference loss. 0 is DPO."""
    calibration: Literal["chosen", "both", "column", "reference"] = "chosen"
    """Whose answers become likelier: the chosen ones, both of each pair, those in the data's column `calibration`, or
    samples of the reference, drawn before training (rollouts/calibration.jsonl)."""
    calibration_samples: Positive = 1
    """Samples for each prompt with calibration reference."""
    calibration_max_tokens: Positive = 256
    """Longest such sample; max_length ends it, too."""

    @model_validator(mode="after")
    def _sampling_is_asked_for(self) -> Self:
        for name in ("calibration_samples", "calibration_max_tokens"):
            if self.calibration != "reference" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning with calibration {self.calibration}, which samples none")
        return self


Config = VPOConfig


def describe(config: VPOConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    sequences = None  # none but the pair's
    if config.calibration == "reference":
        sequences = f"{2 + config.calibration_samples} of each pair"
    elif config.calibration == "column":
        sequences = "2 of each pair and those of its calibration"
    return {
        **describe_groups(config, world_size, config.pairs_per_step, sequences=sequences),
        "calibration": f"{config.calibration}, weight alpha x beta = {config.alpha * config.beta:g} a nat",
    }


def check(config: VPOConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers.offline.run import check_offline

    return check_offline(config, partial(_data, config), config.pairs_per_step)


def train(config: VPOConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.evaluation.preferences import preference_metrics
    from llmrl.objectives.dpo import DPO
    from llmrl.objectives.vpo import VPO
    from llmrl.trainers.offline.run import OfflineRun, pair

    tokenizer, data = _data(config, run.note, dataset)
    kinds: dict[str, Literal["chosen", "pair", "samples"]] = {"chosen": "chosen", "both": "pair"}
    objective = VPO(config.beta, config.alpha, "pessimism", kinds.get(config.calibration, "samples")).objective()
    offline = OfflineRun(config, run, tokenizer, data, config.pairs_per_step, callbacks=callbacks)
    # Held-out numbers are DPO's, whatever the calibration: comparable with a run of DPO, and with one another.
    heldout = partial(preference_metrics, objective=DPO(config.beta).objective())
    offline.prepare(_group_of(config, offline, data, tokenizer), {"preference": heldout}, heldout_of=pair)
    for step in offline.session.steps():
        offline.session.record(offline.learner.update(offline.groups(step), objective))
    offline.session.finish()


def _data(
    config: VPOConfig, say: Callable[[str], None], dataset: Any = None
) -> "tuple[PreTrainedTokenizerBase, PreferenceData]":
    from llmrl.data.preferences import prepare_preferences
    from llmrl.trainers.offline.run import prepared

    return prepared(config, prepare_preferences, say, dataset, calibration=config.calibration == "column")


def _group_of(
    config: VPOConfig, offline: "OfflineRun", data: "PreferenceData", tokenizer: "PreTrainedTokenizerBase"
) -> "Callable[[dict[str, Any]], Group]":
    """What makes a training row's group: the pair, and behind it the calibration answers that are not in it."""
    from llmrl.trainers.offline.run import pair

    if config.calibration == "column":
        return lambda row: (*pair(row), *_in_row(row))
    if config.calibration == "reference":
        answers = _sampled(config, offline, data, tokenizer)
        return lambda row: (*pair(row), *answers[row["row"]])
    return pair


def _in_row(row: dict[str, Any]) -> "Group":
    from llmrl.learner.sequences import completion

    ids = iter(row["calibration_ids"])
    return tuple(completion(row["prompt_ids"], list(islice(ids, length))) for length in row["calibration_lengths"])


def _sampled(
    config: VPOConfig, offline: "OfflineRun", data: "PreferenceData", tokenizer: "PreTrainedTokenizerBase"
) -> "dict[int, Group]":
    """By row: samples of the policy as it is before its first update."""
    from llmrl.rollout.protocol import SamplingParams
    from llmrl.trainers.vpo.calibration import drawn_once, sampled_answers

    used = sorted({index for step in range(offline.total_steps) for index in offline.rows(step)})
    prompts = {row["row"]: row["prompt_ids"] for row in map(data.train.__getitem__, used)}
    sampling = SamplingParams(config.calibration_max_tokens, n=config.calibration_samples, seed=config.seed)

    def draw() -> "dict[int, Group]":
        say = offline.run.console.say
        return sampled_answers(offline.learner, tokenizer, prompts, sampling, config.max_length, say)

    return drawn_once(offline.run, offline.learner, set(prompts), draw, tokenizer.decode)
