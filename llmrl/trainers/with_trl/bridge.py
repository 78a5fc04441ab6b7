"""The one place where TRL comes in: its SFTTrainer and RewardTrainer, built as they are, never subclassed.

Each symbol and field used here is held by a contract test (tests/trainers/test_trl_bridge.py). The trainers log, save
and evaluate only when our callback asks (`session`); they draw no progress bars and report to nobody.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars
from huggingface_hub import constants
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from transformers.utils import logging

from llmrl.config import TrainingKeys
from llmrl.learner.sharding import skip_shared_memory_op
from llmrl.runs import ranks

if TYPE_CHECKING:
    from transformers import Trainer


def training_arguments(
    config: TrainingKeys, scratch: str, mixed_precision: str, rows: int, parts: int
) -> dict[str, Any]:
    """Our keys as transformers' TrainingArguments. `rows` go through one forward pass, `parts` of them make a step.

    scratch: folder for what the trainer writes before it is published. `mixed_precision`: `no`, `bf16` or `fp16`.
    """
    skip_shared_memory_op()
    on_cpu = not torch.cuda.is_available()
    return {
        "output_dir": scratch,
        "seed": config.seed,
        "data_seed": config.seed,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": config.schedule_numbers,
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "max_grad_norm": config.max_grad_norm,
        "max_steps": config.max_steps,
        "num_train_epochs": config.num_train_epochs,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": parts,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": mixed_precision == "bf16",
        "fp16": mixed_precision == "fp16",
        # Under DeepSpeed accelerate would run plain DDP if told to use the CPU; the launch files hide the GPUs instead.
        "use_cpu": on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true",
        "ddp_backend": "gloo" if on_cpu and ranks.world_size() > 1 else None,  # one process alone must not name one
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is not a number is to be seen
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
    }


def sft_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    heldout: Dataset | None,
    arguments: dict[str, Any],
) -> "Trainer":
    """An SFTTrainer; `arguments` as of `training_arguments`, with SFTConfig's own."""
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model, args=SFTConfig(**arguments), train_dataset=train, eval_dataset=heldout, processing_class=tokenizer
    )
    return _without_printers(trainer)


def reward_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    arguments: dict[str, Any],
) -> "Trainer":
    """A RewardTrainer on tokenised pairs (columns `chosen_ids`, `rejected_ids`); held-out pairs are scored by us."""
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        model=model, args=RewardConfig(**arguments), train_dataset=train, processing_class=tokenizer
    )
    return _without_printers(trainer)


def quieten() -> None:
    """Before anything is loaded: no report to TRL's authors, progress bars of the data only where somebody watches."""
    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.disable_progress_bar()
    if not (ranks.is_main() and sys.stderr.isatty()):
        disable_progress_bars()


def _without_printers(trainer: "Trainer") -> "Trainer":
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def evaluation_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """A trainer's `eval_loss` and the like under their plain names, without its timings."""
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    timings = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "num_input_tokens_seen")
    return {name: value for name, value in plain.items() if name not in timings}


def fingerprint(dataset: Dataset, columns: tuple[str, ...]) -> str:
    """Of columns of token ids, in the order of the rows."""
    from llmrl.data.mapping import Fingerprint

    found = Fingerprint()
    for batch in dataset.select_columns(list(columns)).iter(1000):
        for name in columns:
            found.update(name, batch[name])
    return found.hexdigest()
