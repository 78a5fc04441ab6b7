"""From a configuration to a learner and an evaluator: what the loops that train a causal model have in common."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from llmrl import models
from llmrl.config import TaskEvaluationKeys
from llmrl.learner.learner import Learner, LearnerOptions
from llmrl.learner.loading import load_model, precision
from llmrl.learner.sharding import build_accelerator
from llmrl.runs import Run


class TrainableKeys(Protocol):
    """What `build_learner` reads: ModelKeys, OptimizationKeys, and the keys `reference` and `form`."""


def build_learner(
    config: "TrainableKeys", tokenizer: PreTrainedTokenizerBase, total_steps: int, say: Callable[[str], None]
) -> Learner:
    """The model of the configuration in a learner, on what was launched."""
    dtype, mixed_precision = precision(config, config.mixed_precision, say)
    accelerator = build_accelerator(mixed_precision)
    set_seed(config.seed)
    model = load_model(models.resolve(config.model_name_or_path), config, dtype, say)
    form = "padded" if config.form == "auto" and config.attn_implementation != "auto" else config.form
    if form != config.form:
        say(f"attn_implementation {config.attn_implementation} was asked for: padded rows instead of prefix trees.")
    options = LearnerOptions(
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=math.ceil(config.warmup_ratio * total_steps),
        total_steps=total_steps,
        weight_decay=config.weight_decay,
        adam_betas=(config.adam_beta1, config.adam_beta2),
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        tokens_per_microbatch=config.tokens_per_microbatch,
        reference=config.reference,
        form=form,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return Learner(model, options, accelerator, say)
