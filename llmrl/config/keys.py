"""The keys that recipes share, in groups that a method's configuration inherits together.

Invariants: keys lie flat at the top level (only sections such as `task_evaluation` nest); a name that TRL users know
means the same here; a key marked `Housekeeping` never changes the trained weights, so a run may be resumed with
another value of it. The docstring under a key is its text in `--help`.

A method combines the groups, `class MyConfig(ModelKeys, DataKeys, OptimizationKeys, RunKeys)`, names itself in
`method: Literal["mine"] = "mine"`, adds its own keys, and takes a section as
`task_evaluation: TaskEvaluationKeys | None = None`.
"""

import difflib
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


@dataclass(frozen=True)
class Housekeeping:
    """Marks a key that decides where things go or what is said, never which weights come out."""


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
SchedulerType = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]
SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr_rate", "min_lr", "num_cycles"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
}
"""Numbers that a schedule takes beside its length and warm-up."""


class Keys(BaseModel):
    """Base of every configuration: unknown keys fail, attribute docstrings describe, values never change after."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelKeys(Keys):
    """Model: what is trained and how it is held."""

    model_name_or_path: Text
    """The model to train: a hub id, a folder, `starter` or `smollm2`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the weights are held; `auto` is float32 on a CPU and what suits the method and device on a GPU."""
    attn_implementation: Text = "auto"
    """Attention kernel; `auto` picks the fastest exact one that the model and device can take."""
    gradient_checkpointing: Annotated[bool, Housekeeping()] = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same gradient."""
    use_peft: bool = False
    """Train a LoRA adapter instead of all weights."""
    lora_r: Positive = 16
    """Rank of the LoRA matrices (with use_peft)."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA scale; the update is multiplied by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the LoRA matrices."""
    lora_target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear`, or names such as q_proj,v_proj."""

    @model_validator(mode="after")
    def _trainable_dtype(self) -> Self:
        if self.dtype == "float16" and not self.use_peft:
            raise ValueError(
                "dtype float16 cannot hold weights that are trained: small updates round to nothing and the loss "
                "scaler refuses them. Use dtype float32 with mixed_precision fp16, dtype bfloat16, or use_peft"
            )
        if self.lora_target_modules in ("", []):
            raise ValueError("lora_target_modules is empty: nothing would be trained. Use `all-linear` or name modules")
        return self


class DataKeys(Keys):
    """Data: where rows come from and how long they may be."""

    dataset_name: Text
    """The data: a hub id, a folder, or a JSONL, JSON, Parquet or CSV file."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_train_split: Text = "train"
    """Split to train on."""
    dataset_test_split: Text = "test"
    """Split held out for evaluation; where the data has none, eval_rows of the train split are held out."""
    eval_rows: NonNegative = 64
    """Rows held out of the train split when there is no test split; 0 = no held-out data."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest sequence, prompt and completion together, in tokens."""
    truncation_mode: Literal["keep_start", "keep_end", "drop", "error"] = "keep_start"
    """What happens to a completion that is too long; whatever is cut or dropped is counted and printed."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What happens to a row whose prompt alone leaves no room; dropped rows are counted and printed."""


class OptimizationKeys(Keys):
    """Optimization: AdamW, its schedule, and the size of a forward pass."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    lr_scheduler_type: SchedulerType = "linear"
    """Shape of the learning rate over the steps."""
    lr_scheduler_kwargs: dict[str, float] = Field(default_factory=dict)
    """Numbers that the schedule takes, such as min_lr_rate of cosine_with_min_lr, the share of the peak that is left at
    the end (0.1 if not given)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the squared gradient's running mean."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the squared gradient's running mean."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients of a larger norm are scaled down to it; 0 = no clipping."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Steps of the method: an optimizer step each, but where the method samples one round of rollouts, of which it may
    make several optimizer steps. -1 = as many as num_train_epochs need; positive, it overrides num_train_epochs."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything that is drawn: order of the data, dropout, sampling, new weights."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Type of the matrix products; `auto` is bf16 on a GPU that has it, else none."""
    tokens_per_microbatch: Annotated[int, Field(ge=1), Housekeeping()] = 4096
    """Tokens in one forward pass: the knob for memory. It never changes the gradient."""

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: nothing would be trained. Give a positive number, or -1 for whole epochs")
        if self.lr_scheduler_type == "constant" and self.warmup_ratio > 0:
            raise ValueError(
                f"lr_scheduler_type constant has no warm-up, so warmup_ratio {self.warmup_ratio} would be ignored. "
                "Use constant_with_warmup, or warmup_ratio 0"
            )
        known = SCHEDULER_KWARGS.get(self.lr_scheduler_type, ())
        for name in self.lr_scheduler_kwargs:
            if name not in known:
                raise ValueError(
                    f"lr_scheduler_kwargs names `{name}`, which lr_scheduler_type {self.lr_scheduler_type} does not "
                    f"take; it takes {', '.join(known) or 'none'}"
                )
        return self

    @property
    def schedule_numbers(self) -> dict[str, float]:
        """lr_scheduler_kwargs, with the one number that its schedule cannot do without."""
        ends = self.lr_scheduler_type == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & {
            *self.lr_scheduler_kwargs
        }
        return {**({"min_lr_rate": 0.1} if ends else {}), **self.lr_scheduler_kwargs}


class RunKeys(Keys):
    """Run: where things go, how often, and how a run goes on."""

    output_dir: Annotated[Text, Housekeeping()]
    """Directory of this run: metrics, checkpoints, the trained model. It must not hold another run."""
    run_name: Annotated[str | None, Housekeeping()] = None
    """Name shown by trackers; the name of output_dir when not given."""
    logging_steps: Annotated[int, Field(ge=1), Housekeeping()] = 1
    """Steps between two lines of metrics."""
    eval_steps: Annotated[int, Field(ge=0), Housekeeping()] = 0
    """Steps between evaluations; 0 = only before and after training."""
    save_steps: Annotated[int, Field(ge=0), Housekeeping()] = 0
    """Steps between checkpoints; 0 = only at the end."""
    save_total_limit: Annotated[int | None, Field(ge=1), Housekeeping()] = 2
    """Checkpoints kept, the newest ones; null = all."""
    report_to: Annotated[list[str] | str, Housekeeping()] = "none"
    """Trackers: none, all (that are installed), or names such as tensorboard,trackio,wandb."""
    push_to_hub: Annotated[bool, Housekeeping()] = False
    """Upload the trained model at the end."""
    hub_model_id: Annotated[str | None, Housekeeping()] = None
    """Hub repository for push_to_hub; the name of output_dir in your own space when not given."""
    resume_from_checkpoint: Annotated[str | None, Housekeeping()] = None
    """`latest` (starts afresh where there is none) or the folder of a checkpoint."""

    @property
    def length_is_free(self) -> bool:
        """Whether no step depends on how many there are to be, so that a run may be resumed for more of them.

        Methods say so; where the learning rate follows a schedule it is never so.
        """
        return False

    @property
    def trackers(self) -> list[str]:
        """Names in report_to without `none`; `all` is still in it."""
        names = self.report_to.split(",") if isinstance(self.report_to, str) else self.report_to
        return [name for name in dict.fromkeys(name.strip() for name in names) if name not in ("none", "")]

    @model_validator(mode="after")
    def _known_trackers(self) -> Self:
        for name in self.trackers:
            if name not in (*TRACKERS, "all"):
                near = difflib.get_close_matches(name, TRACKERS, n=1)
                raise ValueError(
                    f"report_to names an unknown tracker `{name}`"
                    + (f"; did you mean `{near[0]}`?" if near else f"; known are none, all, {', '.join(TRACKERS)}")
                )
        return self


class TrainingKeys(ModelKeys, OptimizationKeys, RunKeys):
    """What every method that trains a model is configured with."""


class TaskEvaluationKeys(Keys):
    """A section: greedy accuracy on held-out problems with known answers, before, during and after training."""

    dataset_name: Text
    """The problems: a hub id, a folder, or a JSONL, JSON, Parquet or CSV file."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_test_split: Text = "test"
    """Split that holds the problems (a single file has only `train`)."""
    prompt_column: Text = "prompt"
    """Column with the problem: text or messages."""
    answer_column: Text = "answer"
    """Column with the right answer."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first so many problems; null = all."""
    max_new_tokens: Positive = 256
    """Longest answer in tokens."""
    batch_size: Positive = 32
    """Problems answered at once: a knob for memory and speed."""
