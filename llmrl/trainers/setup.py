"""From a configuration to a learner and an evaluator: what the loops that train a causal model have in common."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from llmrl import models
from llmrl.config import ModelKeys, OptimizationKeys, TaskEvaluationKeys
from llmrl.errors import RefusedError
from llmrl.evaluation.samples import KeptSamples
from llmrl.evaluation.tasks import TaskEvaluation, samples_of
from llmrl.learner.learner import Learner
from llmrl.learner.loading import load_model, max_positions, precision
from llmrl.learner.options import LearnerOptions
from llmrl.learner.reference import FROZEN_UNDER_ZERO3
from llmrl.learner.sharding import build_accelerator, zero_stage
from llmrl.runs import Run, ranks

TASKS_UNDER_ZERO3 = (
    "task_evaluation generates with the whole model on each process, which ZeRO-3 does not have; leave the section "
    "out, or launch with ZeRO-2 or DDP"
)


class LearnerKeys(Protocol):
    """The keys of a method's own configuration that decide how its learner is built."""

    @property
    def reference(self) -> str: ...
    @property
    def form(self) -> Literal["auto", "tree", "padded"]: ...


def build_learner(
    model: ModelKeys,
    optimization: OptimizationKeys,
    own: LearnerKeys,
    total_steps: int,
    say: Callable[[str], None],
    **further: Any,
) -> Learner:
    """The configured model in a learner, on whatever was launched; the first three arguments may be the same object.

    `further`: LearnerOptions that the method sets. Raises RefusedError for what was launched otherwise than the keys
    need, before anything is loaded where the launcher tells.
    """
    if own.reference == "frozen" and ranks.zero_stage() == 3:
        raise RefusedError(FROZEN_UNDER_ZERO3)
    dtype, mixed_precision = precision(model, optimization.mixed_precision, say)
    accelerator = build_accelerator(mixed_precision)
    set_seed(optimization.seed)
    causal_lm = load_model(models.resolve(model.model_name_or_path), model, dtype, say)
    form = own.form
    if form == "auto" and model.attn_implementation != "auto":
        form = "padded"
        say(f"attn_implementation {model.attn_implementation} was asked for: padded rows instead of prefix trees.")
    options = LearnerOptions(
        learning_rate=optimization.learning_rate,
        lr_scheduler_type=optimization.lr_scheduler_type,
        lr_scheduler_kwargs=optimization.schedule_numbers,
        warmup_steps=math.ceil(optimization.warmup_ratio * total_steps),
        total_steps=total_steps,
        weight_decay=optimization.weight_decay,
        adam_betas=(optimization.adam_beta1, optimization.adam_beta2),
        adam_epsilon=optimization.adam_epsilon,
        max_grad_norm=optimization.max_grad_norm,
        tokens_per_microbatch=optimization.tokens_per_microbatch,
        reference=own.reference,
        form=form,
        gradient_checkpointing=model.gradient_checkpointing,
    )
    options = dataclasses.replace(options, **further)
    return Learner(causal_lm, options, accelerator, say)


def task_problems(
    keys: TaskEvaluationKeys | None, model: ModelKeys, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> TaskEvaluation | None:
    """The problems of a `task_evaluation` section, checked against the model that will answer them."""
    if keys is None:
        return None
    if ranks.zero_stage() == 3:
        raise RefusedError(TASKS_UNDER_ZERO3)
    return TaskEvaluation(keys, tokenizer, say, max_positions(models.resolve(model.model_name_or_path)))


def task_evaluation(
    task: TaskEvaluation | None, model: nn.Module, accelerator: Accelerator, run: Run
) -> Callable[[], dict[str, dict[str, float]]]:
    """Greedy accuracy of the model as it is, by name; nothing where none was asked for.

    The answers of the first and of the latest call are kept in samples.json.
    """
    if task is None:
        return dict
    if zero_stage(accelerator) == 3:
        raise RefusedError(TASKS_UNDER_ZERO3)
    samples = KeptSamples(run.directory / "samples.json", "task", begun=run.checkpoint is not None)

    def evaluate() -> dict[str, dict[str, float]]:
        with accelerator.autocast():  # answered in the precision that is trained in
            result = task(model, accelerator, run.console.say)
        if run.is_main:
            samples.keep(samples_of(result))
        return {"task": result.metrics}

    return evaluate
