"""A reward model from preference pairs, with TRL's RewardTrainer: Bradley-Terry, -log sigmoid(r_chosen - r_rejected).

This file is the configuration and what goes in and out; the optimization itself is TRL's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config import Housekeeping, TrainingKeys
from llmrl.trainers.offline.config import PairKeys
from llmrl.trainers.with_trl.supervised import step_parts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

    from llmrl.runs import Run


class RewardConfig(PairKeys, TrainingKeys):
    """Reward model: what is learned from."""

    method: Literal["reward"] = "reward"
    """The method that this file configures."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW. About 1e-5 for all weights, 1e-4 for a LoRA adapter."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them around zero (arXiv 2312.09244 uses 0.01)."""
    merge_adapter: Annotated[bool, Housekeeping()] = False
    """With use_peft: write the adapter merged into its base to final/, a plain model."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.merge_adapter and not self.use_peft:
            raise ValueError("merge_adapter has no meaning without use_peft: true")
        return self


Config = RewardConfig


def describe(config: RewardConfig, world_size: int) -> dict[str, str | int | float]:
    """The derived batch arithmetic, from the configuration alone."""
    rows, passes = _parts(config, world_size)
    per_step = config.pairs_per_step
    steps = (
        f"{config.max_steps}, {config.max_steps * per_step} pairs"
        if config.max_steps > 0
        else f"{config.num_train_epochs:g} x pairs / {per_step}, each pass over the data rounded up"
    )
    return {
        "processes": world_size,
        "optimizer steps": steps,
        "pairs per step": f"{per_step} = {world_size} processes x {passes} forward passes x {rows} pairs",
        "tokens per forward pass": f"at most {2 * rows * config.max_length} ({rows} pairs x 2 x {config.max_length})",
    }


def check(config: RewardConfig) -> list[str]:
    """Every mistake that can be found without training; returns lines to print, raises RefusedError."""
    from llmrl.data.preferences import prepare_preferences
    from llmrl.trainers import checks
    from llmrl.trainers.offline.run import prepared

    said: list[str] = []
    _, data = prepared(config, prepare_preferences, said.append)
    said.append(f"{len(data.train)} pairs to train on, {len(data.heldout or [])} held out")
    return said + checks.fits(config)


def train(
    config: RewardConfig, run: "Run", *, dataset: Any = None, callbacks: "Sequence[TrainerCallback]" = ()
) -> None:
    """Train as configured. `dataset` replaces `dataset_name` by a `datasets` object."""
    from transformers import set_seed

    from llmrl import models
    from llmrl.data.preferences import prepare_preferences
    from llmrl.evaluation.reward_models import pair_metrics
    from llmrl.learner.loading import precision
    from llmrl.rewards.model import load_reward_model, separate_padding
    from llmrl.runs import ranks
    from llmrl.trainers.offline.run import prepared
    from llmrl.trainers.with_trl import bridge as trl_bridge
    from llmrl.trainers.with_trl.session import Metrics, check_export, export, fit, scratch_of

    trl_bridge.quieten()
    tokenizer, data = prepared(config, prepare_preferences, run.note, dataset)
    separate_padding(tokenizer, run.note)
    dtype, mixed_precision = precision(config, config.mixed_precision, run.note)
    set_seed(config.seed)
    model = load_reward_model(models.resolve(config.model_name_or_path, run.note), config, dtype, run.note)
    model.config.pad_token_id = tokenizer.pad_token_id
    rows, passes = _parts(config, ranks.world_size())
    arguments = trl_bridge.training_arguments(config, scratch_of(run), mixed_precision, rows, passes)
    arguments |= {
        "max_length": config.max_length,
        "center_rewards_coefficient": config.center_rewards_coefficient or None,
    }
    trainer = trl_bridge.reward_trainer(model, tokenizer, _whole_sequences(data.train), arguments)
    heldout = list(_whole_sequences(data.heldout)) if data.heldout else []

    def evaluate() -> dict[str, Metrics]:
        if not heldout:
            return {}
        return {"heldout": pair_metrics(trainer.model, heldout, tokenizer.pad_token_id, 2 * rows, run.console.say)}

    check_export(trainer, config.merge_adapter)
    fit(trainer, run, data.fingerprint, evaluate, callbacks)
    export(run, trainer, config.merge_adapter)


def _parts(config: RewardConfig, world_size: int) -> tuple[int, int]:
    pairs_that_fit = config.tokens_per_microbatch // (2 * config.max_length)
    return step_parts("pairs_per_step", config.pairs_per_step, world_size, pairs_that_fit)


def _whole_sequences(pairs: "Dataset") -> "Dataset":
    """Prompt and completion together, in the columns that RewardTrainer takes as tokenised already."""

    def join(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        names = ("chosen_ids", "rejected_ids")
        return {name: [p + c for p, c in zip(batch["prompt_ids"], batch[name], strict=True)] for name in names}

    return pairs.map(join, batched=True, remove_columns=pairs.column_names)
