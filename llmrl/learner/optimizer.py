"""AdamW for a policy: no decay for biases and norms, the value head at a rate of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmrl.errors import RefusedError
from llmrl.learner.options import LearnerOptions
from llmrl.learner.policy import Policy

LANGUAGE, VALUE_HEAD = "language model", "value head"
"""The part of a parameter group: by name, for ZeRO puts flat tensors of its own in the parameters' place."""


def adamw(policy: Policy, options: LearnerOptions) -> torch.optim.AdamW:
    """Of what can be trained. Raises RefusedError where that is nothing."""
    return torch.optim.AdamW(
        _parameter_groups(policy, options),
        lr=options.learning_rate,
        betas=options.adam_betas,
        eps=options.adam_epsilon,
        fused=True,
    )


def forget(optimizer: torch.optim.Optimizer, options: LearnerOptions) -> None:
    """Steps and moments are 0, as in a new optimizer, and learning rates those of `options`.

    In place: ZeRO has handed on references to the moments, which it keeps flat and split over ranks.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[name] = 0
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = _rate(group["part"], options)


@contextmanager
def only_value_head(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The language model's learning rate is 0, with which AdamW neither moves nor decays it."""
    groups = [group for group in optimizer.param_groups if group["part"] == LANGUAGE]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _parameter_groups(policy: Policy, options: LearnerOptions) -> list[dict[str, Any]]:
    """Weight decay for matrices only, not for biases and norms; the value head may have its own learning rate."""
    language = [p for p in policy.causal_lm.parameters() if p.requires_grad]
    if not language:
        raise RefusedError(
            "the model has no trainable parameter, so training would change nothing. An adapter loaded for inference "
            "needs is_trainable=True; a frozen model needs use_peft: true."
        )
    head = [] if policy.value_head is None else list(policy.value_head.parameters())
    groups = []
    for part, parameters in ((LANGUAGE, language), (VALUE_HEAD, head)):
        own = {"lr": _rate(part, options), "part": part}
        groups += [
            {"params": [p for p in parameters if _is_matrix(p)], "weight_decay": options.weight_decay, **own},
            {"params": [p for p in parameters if not _is_matrix(p)], "weight_decay": 0.0, **own},
        ]
    return [g for g in groups if g["params"]]


def _rate(part: str, options: LearnerOptions) -> float:
    own = options.value_learning_rate if part == VALUE_HEAD else None
    return own or options.learning_rate


def _is_matrix(parameter: torch.nn.Parameter) -> bool:
    """By the whole parameter's shape: what ZeRO-3 leaves of it on a rank is empty and flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1
