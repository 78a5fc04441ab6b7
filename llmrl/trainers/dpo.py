"""Direct Preference Optimization on a fixed set of preference pairs.

Rafailov et al., arXiv 2305.18290. The loss is `llmrl.objectives.dpo`; this file is its configuration and its loop.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config import DataKeys, Housekeeping, ModelKeys, OptimizationKeys, RunKeys, TaskEvaluationKeys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from llmrl.data.preferences import PreferenceData
    from llmrl.learner.learner import Learner
    from llmrl.learner.sequences import Group
    from llmrl.runs import Run


class DPOConfig(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
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
    pairs_per_step: Annotated[int, Field(ge=1)] = 16
    """Pairs in one optimizer step, over all processes together."""
    reference: Literal["auto", "adapter_off", "precomputed", "frozen"] = "auto"
    """Where the reference's log-probabilities come from; auto: adapter_off with use_peft, else precomputed at first."""
    form: Literal["auto", "tree", "padded"] = "auto"
    """Forward pass: prefix trees (a pair's prompt is computed once) or padded rows; auto: the tree where it works."""
    faulty_rows: Literal["error", "drop"] = "error"
    """What happens to a row that is no pair (an empty answer, two equal ones); dropped rows are counted and printed."""
    task_evaluation: Annotated[TaskEvaluationKeys | None, Housekeeping()] = None
    """Greedy accuracy on problems with known answers, beside the preference accuracy."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust", "sigmoid_norm"):
            raise ValueError(
                f"label_smoothing has no meaning with loss_type {self.loss_type}; use sigmoid or robust, or set it to 0"
            )
        if self.reference == "adapter_off" and not self.use_peft:
            raise ValueError("reference adapter_off needs use_peft: true; without an adapter use precomputed")
        if self.form == "tree" and self.attn_implementation != "auto":
            raise ValueError(
                "form tree brings its own attention, so attn_implementation must be auto; or use form padded"
            )
        return self


Config = DPOConfig


def describe(config: DPOConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    from llmrl.errors import RefusedError

    if config.pairs_per_step < world_size:
        raise RefusedError(
            f"pairs_per_step {config.pairs_per_step} over {world_size} processes leaves some without a pair; "
            f"set it to at least {world_size}"
        )
    steps = (
        str(config.max_steps)
        if config.max_steps > 0
        else f"{config.num_train_epochs:g} x pairs / {config.pairs_per_step}, rounded up"
    )
    seen = f", {config.max_steps * config.pairs_per_step} pairs" if config.max_steps > 0 else ""
    return {
        "processes": world_size,
        "optimizer steps": steps + seen,
        "pairs per step": f"{config.pairs_per_step} in all, about {config.pairs_per_step / world_size:g} a process",
        "sequences per step": 2 * config.pairs_per_step,
        "micro-batches": f"of {config.tokens_per_microbatch} tokens; they never change the gradient",
    }


def check(config: DPOConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers import checks
    from llmrl.trainers.setup import task_problems

    said: list[str] = []
    tokenizer, data = _data(config, said.append)
    task_problems(config.task_evaluation, config, tokenizer, said.append)
    steps = num_steps(config, len(data.train))
    said.append(f"{len(data.train)} pairs to train on, {len(data.heldout or [])} held out; {steps} optimizer steps")
    return said + checks.fits(config, config, config)


def train(config: DPOConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from llmrl.data.order import rows_for_step
    from llmrl.evaluation.preferences import preference_metrics
    from llmrl.evaluation.progress import Ticker
    from llmrl.objectives.dpo import DPO
    from llmrl.trainers.session import Session
    from llmrl.trainers.setup import build_learner, task_evaluation, task_problems

    tokenizer, data = _data(config, run.note, dataset)
    run.verify_dataset(data.fingerprint)
    problems = task_problems(config.task_evaluation, config, tokenizer, run.note)
    total_steps = num_steps(config, len(data.train))
    learner = build_learner(config, config, config, total_steps, run.note)
    objective = DPO(config.beta, config.loss_type, config.label_smoothing, config.rpo_alpha).objective()

    def rows_of(step: int) -> list[int]:
        return rows_for_step(step, config.pairs_per_step, len(data.train), config.seed)

    used = min(len(data.train), total_steps * config.pairs_per_step)
    reference = _precomputed(learner, data, (rows_of(s) for s in range(total_steps)), used, run)
    heldout = [_pair(row) for row in data.heldout or []]

    def score_heldout(whose: str) -> list[list[Any]]:
        return learner.logprobs(heldout, progress=Ticker(run.console.say, f"held-out pairs scored by the {whose}"))

    heldout = [_with_reference(g, r) for g, r in zip(heldout, score_heldout("reference"), strict=True)]
    answer_problems = task_evaluation(problems, learner.causal_lm, learner.accelerator, run)

    def evaluate() -> dict[str, dict[str, float]]:
        found = {"preference": preference_metrics(heldout, score_heldout("policy"), objective)} if heldout else {}
        return found | answer_problems()

    session = Session(run, learner, tokenizer, total_steps, data.fingerprint, evaluate, callbacks)
    for step in session.steps():
        pairs = [_with_reference(_pair(data.train[row]), reference.get(row)) for row in rows_of(step)]
        session.record(learner.update(pairs, objective))
    session.finish()


def num_steps(config: DPOConfig, num_pairs: int) -> int:
    """Optimizer steps: max_steps, or as many as the epochs need, the last one filled up from the next epoch."""
    return (
        config.max_steps
        if config.max_steps > 0
        else math.ceil(config.num_train_epochs * num_pairs / config.pairs_per_step)
    )


def _data(
    config: DPOConfig, say: Callable[[str], None], dataset: Any = None
) -> "tuple[PreTrainedTokenizerBase, PreferenceData]":
    from llmrl import models
    from llmrl.data.preferences import prepare_preferences
    from llmrl.data.tokenization import check_vocabulary
    from llmrl.learner.loading import load_config, load_tokenizer, stop_token_ids

    path = models.resolve(config.model_name_or_path)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, load_config(path))
    stops = stop_token_ids(path)
    return tokenizer, prepare_preferences(
        config, tokenizer, say, dataset=dataset, stop_token_ids=stops, faulty_rows=config.faulty_rows
    )


def _pair(row: dict[str, Any]) -> "Group":
    """A tokenised row -> the group (chosen, rejected)."""
    from llmrl.learner.sequences import completion

    return completion(row["prompt_ids"], row["chosen_ids"]), completion(row["prompt_ids"], row["rejected_ids"])


def _with_reference(group: "Group", logprobs: list[Any] | None) -> "Group":
    if logprobs is None:
        return group
    return tuple(dataclasses.replace(s, reference_logprobs=known) for s, known in zip(group, logprobs, strict=True))


def _precomputed(
    learner: "Learner", data: "PreferenceData", steps: Iterable[list[int]], used: int, run: "Run"
) -> dict[int, list[Any]]:
    """The reference's log-probabilities of the `used` pairs, by row; empty where they are made on the way.

    Taken from the policy before its first update, step by step, so that a pair is packed beside the same others as in
    training: the loss then starts at exactly ln 2. A resumed run computes them again, from the same initial weights.
    """
    from llmrl.evaluation.progress import Ticker

    known: dict[int, list[Any]] = {}
    ticker = Ticker(run.console.say, "training pairs scored by the reference")
    if learner.reference_kind != "precomputed":
        return known
    run.note("Computing the reference's log-probabilities with the initial weights.")
    for rows in steps:
        if len(known) == used:
            break
        if any(row not in known for row in rows):
            scored = learner.logprobs([_pair(data.train[row]) for row in rows])
            for row, logprobs in zip(rows, scored, strict=True):
                known.setdefault(row, logprobs)
            ticker(len(known), used)
    return known
