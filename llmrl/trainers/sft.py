"""Supervised fine-tuning, with TRL's SFTTrainer: cross-entropy on given answers.

This file is the configuration and what goes in and out; the optimization itself is TRL's.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config import DataKeys, Housekeeping, TaskEvaluationKeys, TrainingKeys
from llmrl.errors import RefusedError
from llmrl.trainers.with_trl.supervised import step_parts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from llmrl.runs import Run


class SFTConfig(DataKeys, TrainingKeys):
    """SFT: what is learned from."""

    method: Literal["sft"] = "sft"
    """The method that this file configures."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW. About 2e-5 for all weights, 1e-4 to 3e-4 for a LoRA adapter."""
    sequences_per_step: Annotated[int, Field(ge=1)] = 16
    """Sequences in one optimizer step, over all processes together."""
    assistant_only_loss: bool = False
    """Learn only the assistant's messages of a dialogue (`messages`); a `completion` is always learned alone."""
    packing: bool = False
    """Pack several sequences into one row of max_length; needs a flash attention kernel, which keeps them apart."""
    merge_adapter: Annotated[bool, Housekeeping()] = False
    """With use_peft: write the adapter merged into its base to final/, a plain model that other runs can start from."""
    task_evaluation: Annotated[TaskEvaluationKeys | None, Housekeeping()] = None
    """Greedy accuracy on problems with known answers, beside the held-out loss."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.packing and not self.attn_implementation.startswith("flash_attention"):
            raise ValueError(
                "packing needs attn_implementation flash_attention_2 or flash_attention_3: with other kernels the "
                "sequences of a row would read each other"
            )
        if self.merge_adapter and not self.use_peft:
            raise ValueError("merge_adapter has no meaning without use_peft: true")
        return self


Config = SFTConfig


def describe(config: SFTConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    rows, passes = _parts(config, world_size)
    per_step = config.sequences_per_step
    steps = (
        f"{config.max_steps}, {config.max_steps * per_step} sequences"
        if config.max_steps > 0
        else f"{config.num_train_epochs:g} x sequences / {per_step}, each pass over the data rounded up"
    )
    return {
        "processes": world_size,
        "optimizer steps": steps,
        "sequences per step": f"{per_step} = {world_size} processes x {passes} forward passes x {rows} sequences",
        "tokens per forward pass": f"at most {rows * config.max_length} ({rows} x max_length {config.max_length})",
    }


def check(config: SFTConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.trainers import checks
    from llmrl.trainers.setup import task_problems

    said: list[str] = []
    tokenizer, train_rows, heldout = _data(config, said.append)
    task_problems(config.task_evaluation, config, tokenizer, said.append)
    said.append(f"{len(train_rows)} sequences to train on, {len(heldout or [])} held out")
    return said + checks.fits(config)


def train(config: SFTConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from transformers import set_seed

    from llmrl import models
    from llmrl.learner.loading import load_model, precision
    from llmrl.runs import ranks
    from llmrl.trainers.setup import task_evaluation, task_problems
    from llmrl.trainers.with_trl import bridge as trl_bridge
    from llmrl.trainers.with_trl.session import Metrics, check_export, export, fit, scratch_of

    trl_bridge.quieten()
    tokenizer, train_rows, heldout = _data(config, run.note, dataset)
    problems = task_problems(config.task_evaluation, config, tokenizer, run.note)
    dtype, mixed_precision = precision(config, config.mixed_precision, run.note)
    set_seed(config.seed)
    model = load_model(models.resolve(config.model_name_or_path, run.note), config, dtype, run.note)
    rows, passes = _parts(config, ranks.world_size())
    arguments = trl_bridge.training_arguments(config, scratch_of(run), mixed_precision, rows, passes)
    arguments |= {
        "max_length": config.max_length,
        "truncation_mode": "keep_end" if config.truncation_mode == "keep_end" else "keep_start",
        "assistant_only_loss": config.assistant_only_loss,
        "packing": config.packing,
    }
    trainer = trl_bridge.sft_trainer(model, tokenizer, train_rows, heldout, arguments)
    check_export(trainer, config.merge_adapter)
    answer_problems = task_evaluation(problems, trainer.model, trainer.accelerator, run)
    if not config.packing:
        _count_lost(config, len(train_rows), len(trainer.train_dataset), run.note)

    def evaluate() -> dict[str, Metrics]:
        heldout_loss = {} if heldout is None else {"heldout": trl_bridge.evaluation_metrics(trainer.evaluate())}
        return heldout_loss | answer_problems()

    fit(trainer, run, trl_bridge.fingerprint(trainer.train_dataset, ("input_ids", "labels")), evaluate, callbacks)
    export(run, trainer, config.merge_adapter)


def _parts(config: SFTConfig, world_size: int) -> tuple[int, int]:
    rows_that_fit = config.tokens_per_microbatch // config.max_length
    return step_parts("sequences_per_step", config.sequences_per_step, world_size, rows_that_fit)


def _data(
    config: SFTConfig, say: Callable[[str], None], dataset: Any = None
) -> "tuple[PreTrainedTokenizerBase, Dataset, Dataset | None]":
    from llmrl import models
    from llmrl.data.supervised import prepare_supervised
    from llmrl.data.tokenization import check_vocabulary
    from llmrl.learner.loading import load_config, load_tokenizer

    path = models.resolve(config.model_name_or_path, say)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, load_config(path))
    train_rows, heldout = prepare_supervised(config, say, dataset, tokenizer)
    if config.assistant_only_loss and "messages" not in train_rows.column_names:
        raise RefusedError(
            f"assistant_only_loss needs dialogues in a column `messages`; {config.dataset_name} has "
            f"{', '.join(f'`{name}`' for name in train_rows.column_names)}. Set it to false"
        )
    return tokenizer, train_rows, heldout


def _count_lost(config: SFTConfig, before: int, after: int, say: Callable[[str], None]) -> None:
    """Rows of which truncation leaves nothing to learn: TRL drops them without a word."""
    lost = before - after
    if not lost:
        return
    if config.overlong_prompts == "error" or after == 0:
        raise RefusedError(
            f"{lost} of {before} rows have prompts that leave no room for an answer within max_length "
            f"{config.max_length}. Raise max_length, or set overlong_prompts to drop"
        )
    say(f"data: {lost} of {before} rows dropped: their prompts leave no room within max_length {config.max_length}")
