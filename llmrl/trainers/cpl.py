"""Contrastive Preference Learning on a fixed set of compared segments of behaviour.

Hejna et al., arXiv 2310.13639. The loss is `llmrl.objectives.cpl`; this file is its configuration and its loop:

1. clone the behaviour of all segments for `bc_steps`
2. a fresh optimizer and schedule; for CPL-KL the policy as it now is becomes the reference
3. learn from the comparisons for the steps that are left
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.errors import RefusedError
from llmrl.trainers.offline.config import OfflineKeys, describe_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from llmrl.data.comparisons import ComparisonData
    from llmrl.learner.sequences import Floats, Group
    from llmrl.objectives.cpl import CPL
    from llmrl.runs import Run

AUTHORS_BC_SHARE = 2 / 5
"""Of all steps (authors' code: 200,000 of 500,000 from states)."""
ALGORITHM = ("alpha", "lam", "bc_coef", "bc_on", "gamma", "step", "mean_per_step", "bc_steps", "bc_learning_rate")
"""Keys whose defaults are the published algorithm."""
SATURATED = 5.0
"""|A(p) - lam A(n)| above which the logistic hardly tells a little better from much better: its slope is below 1%."""
MOVED_BY = 10
"""Steps of comparisons after which a policy that began as its reference, with all scores 0, can be saturated."""


class CPLConfig(OfflineKeys):
    """CPL: how segments are scored and compared."""

    method: Literal["cpl"] = "cpl"
    """The method that this file configures."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Peak learning rate of AdamW when comparisons are learned. About 1e-6 for all weights, 2e-5 for a LoRA adapter."""
    variant: Literal["cpl", "cpl_bc", "cpl_kl"] = "cpl"
    """cpl: alpha 0.1, lam 0.5. cpl_bc: alpha 0.1, lam 1, bc_coef 1. cpl_kl: scores are log-ratios to a reference, the
    policy after cloning; alpha 0.2, lam 0.75."""
    alpha: Annotated[float, Field(gt=0, le=1e4)] | None = None
    """Scale of a segment's score, the sum of its log-probabilities; null: the variant's own. 0.01 to 0.05 suits long
    segments: a score difference far above 1 saturates the loss, which is said at the first step."""
    lam: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lambda, the weight of the score that was not preferred: below 1 the policy stays near the data; null: the
    variant's own."""
    bc_coef: Annotated[float, Field(ge=0)] | None = None
    """Weight of the behaviour-cloning loss beside the comparisons'; null: the variant's own."""
    bc_on: Literal["all", "preferred"] = "all"
    """Of which segments that loss is."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount a step of a segment, from its first; the authors' code does not discount."""
    step: Literal["token", "turn"] = "token"
    """What a step is: for gamma, mean_per_step and the cloning loss."""
    mean_per_step: bool = False
    """Scores are means over a segment's steps, against a pull towards short segments; alpha then wants to be larger."""
    comparisons: Literal["dense", "sparse", "across"] = "dense"
    """Of scored data only, what has a label has its pair. dense: all pairs of a row's segments; sparse: each segment in
    one pair, by rank; across: each in one pair with another prompt's sample, by reward less the mean of its prompt."""
    comparisons_per_step: Annotated[int, Field(ge=1)] = 16
    """Comparisons in one optimizer step, over all processes together: a pair, or (dense) all pairs of a row's segments.
    Behaviour is cloned from the segments of as many."""
    bc_steps: Annotated[int, Field(ge=-1)] = -1
    """The first so many steps clone the behaviour of all segments; -1 = two fifths of all steps, as the authors; 0 =
    none, for a model that was fine-tuned on such behaviour already."""
    bc_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the cloning, constant; null: learning_rate, and 10 times that with cpl_kl, as the authors."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        clones = self.variant == "cpl_bc" if self.bc_coef is None else self.bc_coef > 0
        if self.bc_on == "preferred" and not clones:
            raise ValueError("bc_on would be ignored: bc_coef is 0. Give one above 0, or use variant cpl_bc")
        if self.bc_learning_rate is not None and self.bc_steps == 0:
            raise ValueError("bc_learning_rate would be ignored: bc_steps is 0. Give bc_steps, or leave it out")
        if self.reference != "auto" and self.variant != "cpl_kl":
            raise ValueError(
                f"reference would be ignored: variant {self.variant} has none. Use cpl_kl, or leave it out"
            )
        if self.reference in ("adapter_off", "frozen") and self.bc_steps:
            raise ValueError(
                f"reference {self.reference} is the policy before it was cloned, but that of cpl_kl is the one after. "
                "Use reference auto, or bc_steps 0"
            )
        return self

    @property
    def cloning_rate(self) -> float:
        """Learning rate of the first phase."""
        return self.bc_learning_rate or self.learning_rate * (10 if self.variant == "cpl_kl" else 1)

    def cloning_steps(self, total_steps: int) -> int:
        """How many of the steps clone. Raises RefusedError if none is left for the comparisons."""
        steps = round(AUTHORS_BC_SHARE * total_steps) if self.bc_steps < 0 else self.bc_steps
        if steps >= total_steps:
            raise RefusedError(
                f"bc_steps {steps} of {total_steps} steps leave none to learn from comparisons; raise max_steps or "
                "num_train_epochs, or lower bc_steps"
            )
        return steps


Config = CPLConfig


def describe(config: CPLConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    described = describe_groups(
        config, world_size, config.comparisons_per_step, "comparisons", "two or more in each comparison"
    )
    if config.max_steps > 0:
        cloning = config.cloning_steps(config.max_steps)
        phases = f"{cloning} steps of cloning, then {config.max_steps - cloning} of comparisons"
    else:
        phases = f"{'two fifths' if config.bc_steps < 0 else config.bc_steps} of the steps clone, the others compare"
    return {**described, "phases": phases, "algorithm": f"{config.variant}, {_own(config) or 'as published'}"}


def _own(config: CPLConfig) -> str:
    """What is set otherwise than the variant has it."""
    given = {name: getattr(config, name) for name in ALGORITHM}
    changed = {name: value for name, value in given.items() if value != CPLConfig.model_fields[name].default}
    return ", ".join(f"{name} {str(value).lower()}" for name, value in changed.items())


def check(config: CPLConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers.offline.run import check_offline, num_steps

    def load(say: Callable[[str], None]) -> "tuple[PreTrainedTokenizerBase, ComparisonData]":
        tokenizer, data = _data(config, say)
        config.cloning_steps(num_steps(config, config.comparisons_per_step, len(data.train)))
        _objective(config, data)
        return tokenizer, data

    return check_offline(config, load, config.comparisons_per_step, "comparisons")


def train(config: CPLConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.objectives.cpl import BehaviourCloning
    from llmrl.trainers.offline.run import OfflineRun, num_steps

    tokenizer, data = _data(config, run.note, dataset)
    total_steps = num_steps(config, config.comparisons_per_step, len(data.train))
    cloning_steps = config.cloning_steps(total_steps)
    cpl = _objective(config, data)
    cloning, objective = BehaviourCloning(config.step).objective(), cpl.objective()
    options, comparing = _phases(config, cloning_steps, total_steps)
    if not cpl.reference:
        options["reference"] = "none"
    per_step = config.comparisons_per_step
    offline = OfflineRun(config, run, tokenizer, data, per_step, "comparisons", callbacks, **options)
    offline.prepare(
        lambda row: group(row, data.value),
        {"preference": lambda groups, logprobs: heldout_metrics(groups, logprobs, cpl)},
        reference=cpl.reference and cloning_steps == 0,
    )
    learner, session = offline.learner, offline.session
    if cloning_steps:
        run.note(f"The first {cloning_steps} steps clone behaviour, the other {total_steps - cloning_steps} compare.")
        if cpl.reference:
            offline.keep_reference()
    for step in session.steps():
        if step == cloning_steps > 0:
            learner.restart(**comparing)
            if cpl.reference:
                with session.before_updates():
                    offline.take_reference(range(step, total_steps))
        metrics = learner.update(offline.groups(step), cloning if step < cloning_steps else objective)
        session.record(metrics)
        if step - cloning_steps == (MOVED_BY if cpl.reference else 1) - 1:
            _warn_if_saturated(metrics.get("cpl/logit_abs", 0.0), cpl, run.note)
        if step == cloning_steps - 1:  # what was cloned is kept before the reference is taken from it
            session.save_after_this_step()
    session.finish()


def _phases(config: CPLConfig, cloning_steps: int, total_steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """LearnerOptions that the run begins with, and those of the comparisons after cloning."""
    steps = total_steps - cloning_steps
    comparing = {
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": config.schedule_numbers,
        "warmup_steps": math.ceil(config.warmup_ratio * steps),
        "total_steps": steps,
    }
    if not cloning_steps:
        return {}, comparing
    constant = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
    return {"learning_rate": config.cloning_rate, **constant, "reference": "precomputed"}, comparing


def group(row: dict[str, Any], value: str) -> "Group":
    """A comparison (`llmrl.data.comparisons`) as a group: the segments' pieces, what is known of each in its first."""
    import numpy as np

    from llmrl.data.segments import CONTEXT
    from llmrl.learner.sequences import TokenSequence

    pieces = []
    for segment, known in zip(row["segments"], row["values"], strict=True):
        for number, piece in enumerate(segment):
            turns = np.asarray(piece.turns, np.int64)
            ids, scored = np.asarray(piece.token_ids, np.int64), turns != CONTEXT
            pieces.append(TokenSequence(ids, scored, turns, values={value: known}, continues=number > 0))
    return tuple(pieces)


def heldout_metrics(groups: "list[Group]", logprobs: "list[list[Floats]]", cpl: "CPL") -> dict[str, float]:
    """As `preference_metrics`. While a policy that will be the reference is still being cloned, it is compared with
    itself: every score is 0, and half of the comparisons count as right."""
    from llmrl.evaluation.preferences import preference_metrics
    from llmrl.trainers.offline.run import with_reference

    if cpl.reference and any(s.reference_logprobs is None for g in groups for s in g):
        groups = [with_reference(g, known) for g, known in zip(groups, logprobs, strict=True)]
    return preference_metrics(groups, logprobs, cpl.objective())


def _data(
    config: CPLConfig, say: Callable[[str], None], dataset: Any = None
) -> "tuple[PreTrainedTokenizerBase, ComparisonData]":
    from llmrl.data.comparisons import prepare_comparisons
    from llmrl.trainers.offline.run import prepared

    return prepared(config, prepare_comparisons, say, dataset, mode=config.comparisons)


def _objective(config: CPLConfig, data: "ComparisonData") -> "CPL":
    """The variant with what is configured over it, for the comparisons that the data holds."""
    from llmrl.objectives.cpl import CPL, VARIANTS

    given = {name: value for name in ("alpha", "lam", "bc_coef") if (value := getattr(config, name)) is not None}
    same = {name: getattr(config, name) for name in ("gamma", "step", "mean_per_step", "bc_on")}
    comparisons = "dense" if data.value == "score" else "pairs"
    try:
        return CPL(**{**VARIANTS[config.variant], **given, **same, "comparisons": comparisons})
    except ValueError as error:
        raise RefusedError(f"{error}. Use comparisons sparse, or bc_on all") from None


def _warn_if_saturated(logit: float, cpl: "CPL", say: Callable[[str], None]) -> None:
    if logit > SATURATED:
        when = f"after {MOVED_BY} steps of comparisons" if cpl.reference else "in the mean of the first comparisons"
        say(
            f"warning: |A(preferred) - lam A(other)| is {logit:.1f} {when}: the loss is saturated, pairs that are "
            f"right hardly teach any more. alpha {cpl.alpha:g} is too large for segments of this length; about "
            f"{cpl.alpha / logit:.2g} would make it 1"
        )
