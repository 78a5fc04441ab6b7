"""From a configuration to a learner and an evaluator: what the loops that train a causal model have in common."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from llmrl import models
from llmrl.config import ModelKeys, TaskEvaluationKeys, TrainingKeys
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


def build_learner(
    config: TrainingKeys,
    total_steps: int,
    say: Callable[[str], None],
    *,
    reference: str,
    form: Literal["auto", "tree", "padded"],
    **further: Any,
) -> Learner:
    """The configured model in a learner, on whatever was launched.

    `further`: LearnerOptions that the method sets. Raises RefusedError for what was launched otherwise than the keys
    need, before anything is loaded where the launcher tells.
    """
    if reference == "frozen" and ranks.zero_stage() == 3:
        raise RefusedError(FROZEN_UNDER_ZERO3)
    dtype, mixed_precision = precision(config, config.mixed_precision, say)
    accelerator = build_accelerator(mixed_precision)
    set_seed(config.seed)
    causal_lm = load_model(models.resolve(config.model_name_or_path), config, dtype, say)
    if form == "auto" and config.attn_implementation != "auto":
        form = "padded"
        say(f"attn_implementation {config.attn_implementation} was asked for: padded rows instead of prefix trees.")
    options = LearnerOptions(
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=config.schedule_numbers,
        warmup_steps=math.ceil(config.warmup_ratio * total_steps),
        total_steps=total_steps,
        weight_decay=config.weight_decay,
        adam_betas=(config.adam_beta1, config.adam_beta2),
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        tokens_per_microbatch=config.tokens_per_microbatch,
        reference=reference,
        form=form,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return Learner(causal_lm, dataclasses.replace(options, **further), accelerator, say)


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
