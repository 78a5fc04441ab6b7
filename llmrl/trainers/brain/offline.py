"""BRAIn on scored samples that were drawn before: one round, in which the proposal never changes.

Pandey et al., arXiv 2402.02479v2, Sec. 4 with the proposal q' fixed: the samples of the model that training begins with
(q' = p), or of any model whose log-probabilities stand beside them. `brain` draws its samples itself, again and again.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.errors import RefusedError
from llmrl.trainers.brain.keys import BRAInKeys
from llmrl.trainers.offline.config import OfflineKeys, describe_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from llmrl.data.scored import ScoredData
    from llmrl.learner.learner import Learner
    from llmrl.learner.sequences import Group
    from llmrl.runs import Run


class BRAInOfflineConfig(OfflineKeys, BRAInKeys):
    """BRAIn, offline: whose samples they are."""

    method: Literal["brain_offline"] = "brain_offline"
    """The method that this file configures."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW. About 1e-6 for all weights, 1e-5 for a LoRA adapter."""
    proposal: Literal["prior", "behaviour"] = "prior"
    """Which model drew the samples: the one that training begins with, at temperature 1; or another, whose
    log-probabilities are the data's column `logprobs`."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    """Prompts, with all their samples, in one optimizer step, over all processes together."""

    @model_validator(mode="after")
    def _a_gap(self) -> Self:
        if self.most_prior_gap is not None and self.proposal == "prior":
            raise ValueError(
                "most_prior_gap would be ignored: with proposal prior, prior and proposal are the same model"
            )
        return self


Config = BRAInOfflineConfig
MOST_GAP = 0.5
"""Nats an answer by which two engines hardly ever differ on the same model, even in half precision."""
REMEDY = "Raise beta, or use `brain`, which draws new samples as the policy moves"


def describe(config: BRAInOfflineConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    return {
        **describe_groups(
            config, world_size, config.prompts_per_step, "prompts", "as many as their prompts have samples"
        ),
        "target": f"prior x exp(reward / {config.beta:g})",
        "loss": "KL(target || policy) over a prompt's samples"
        if config.baseline
        else "likelihood weighted by the target",
    }


def check(config: BRAInOfflineConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers.offline.run import check_offline

    return check_offline(config, lambda say: _data(config, say), config.prompts_per_step, "prompts")


def train(
    config: BRAInOfflineConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()
) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from functools import partial

    from llmrl.trainers.brain.update import SampleSizeWatch, heldout_metrics, improve
    from llmrl.trainers.offline.run import OfflineRun

    brain, watch = config.objective(config.proposal), SampleSizeWatch(run.note, REMEDY)
    tokenizer, data = _data(config, run.note, dataset)
    offline = OfflineRun(config, run, tokenizer, data, config.prompts_per_step, "prompts", callbacks=callbacks)
    offline.prepare(samples, {"brain": partial(heldout_metrics, brain=brain)})
    if config.proposal == "prior":
        _say_if_another_sampled(offline.groups(0), offline.learner, run.note)
    for step in offline.session.steps():
        metrics = improve(offline.learner, brain, offline.groups(step))
        watch(metrics)
        offline.session.record(metrics)
    offline.session.finish()


def samples(row: dict[str, Any]) -> "Group":
    """A row of ScoredData -> the group of its samples."""
    import dataclasses

    import numpy as np

    from llmrl.learner.sequences import completion

    group = [completion(row["prompt_ids"], ids) for ids in row["completion_ids"]]
    drawn = row["logprobs"] or [None] * len(group)
    return tuple(
        dataclasses.replace(
            sequence,
            values={"reward": reward},
            behaviour_logprobs=None if logprobs is None else np.asarray(logprobs, np.float32),
        )
        for sequence, reward, logprobs in zip(group, row["rewards"], drawn, strict=True)
    )


def _say_if_another_sampled(groups: "list[Group]", learner: "Learner", say: Callable[[str], None]) -> None:
    """The samples of some prompts are scored by the model that training begins with, where the data says what they were
    drawn with: by another model or another temperature they are no samples of the prior."""
    import numpy as np

    scored = learner.logprobs(groups)
    gaps = [
        abs(float(np.sum(found - piece.behaviour_logprobs)))
        for group, known in zip(groups, scored, strict=True)
        for piece, found in zip(group, known, strict=True)
        if piece.behaviour_logprobs is not None
    ]
    if gaps and (gap := float(np.mean(gaps))) > MOST_GAP:
        say(
            "proposal prior, but the log-probabilities that the model gives the first samples are not those that they "
            f"were drawn with, by {gap:.3g} nats an answer: they are another model's, or of another temperature. Use "
            "proposal behaviour"
        )


def _data(
    config: BRAInOfflineConfig, say: Callable[[str], None], dataset: Any = None
) -> "tuple[PreTrainedTokenizerBase, ScoredData]":
    from llmrl.data.scored import prepare_scored
    from llmrl.trainers.offline.run import prepared

    own = {"needs_logprobs": config.proposal == "behaviour", "cut_off": config.truncated_samples}
    tokenizer, data = prepared(config, prepare_scored, say, dataset, **own)
    _refuse_equal_rewards(data, config.dataset_name or "the given dataset", say)
    return tokenizer, data


def _refuse_equal_rewards(data: "ScoredData", where: str, say: Callable[[str], None]) -> None:
    """At the prior, samples of equal rewards have no gradient, whatever the proposal; if there are no others, the
    policy stays there. Raises RefusedError then, and else says how many prompts are like that."""
    count = len(data.train)
    equal = sum(len(set(rewards)) == 1 for rewards in data.train["rewards"])
    if equal == count:
        raise RefusedError(
            f"{where}, column `rewards`: of all {count} prompts to train on the samples are equally good, so nothing "
            "says what to prefer. Remedy: a reward with more grades, more samples of a prompt, or easier or harder "
            "prompts (`llmrl sample` has --rewards and --samples_per_prompt)"
        )
    if equal:
        say(
            f"data: {equal} of {count} prompts to train on have samples that are all equally good: they tell nothing "
            "apart, and hold the policy to the prior alone"
        )
