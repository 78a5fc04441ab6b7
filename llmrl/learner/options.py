"""How a learner trains."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LearnerOptions:
    """How the learner trains. Learning rates are per optimizer step; `tokens_per_microbatch` bounds what one forward
    pass computes on one rank (unique tokens). `value_learning_rate` is the value head's own (None: the same).
    `most_skipped`: updates in a row that are left out because their loss or gradient is not finite, before that is an
    error; on every backend."""

    learning_rate: float = 1e-6
    value_learning_rate: float | None = None
    most_skipped: int = 0
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    total_steps: int = 1
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    tokens_per_microbatch: int = 4096
    reference: str = "auto"
    form: str = "auto"
    temperature: float = 1.0
    value_head: bool = False
    value_gradient: bool = True
    gradient_checkpointing: bool = False
