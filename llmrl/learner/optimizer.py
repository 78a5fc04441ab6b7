"""AdamW for a policy: no decay for biases and norms, the value head at a rate of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmrl.errors import RefusedError
from llmrl.learner.policy import Policy

if TYPE_CHECKING:
    from llmrl.learner.learner import LearnerOptions


def adamw(policy: Policy, options: "LearnerOptions") -> torch.optim.AdamW:
    """Of what can be trained. Raises RefusedError where that is nothing."""
    return torch.optim.AdamW(
        _parameter_groups(policy, options),
        lr=options.learning_rate,
        betas=options.adam_betas,
        eps=options.adam_epsilon,
        fused=True,
    )


@contextmanager
def only_value_head(policy: Policy, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The language model's learning rate is 0, with which AdamW neither moves nor decays it."""
    head = {id(p) for p in policy.value_head.parameters()} if policy.value_head is not None else set()
    groups = [g for g in optimizer.param_groups if not any(id(p) in head for p in g["params"])]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _parameter_groups(policy: Policy, options: "LearnerOptions") -> list[dict[str, Any]]:
    """Weight decay for matrices only, not for biases and norms; the value head may have its own learning rate."""
    language = [p for p in policy.causal_lm.parameters() if p.requires_grad]
    if not language:
        raise RefusedError(
            "the model has no trainable parameter, so training would change nothing. An adapter loaded for inference "
            "needs is_trainable=True; a frozen model needs use_peft: true."
        )
    head = [] if policy.value_head is None else list(policy.value_head.parameters())
    rates = ((language, options.learning_rate), (head, options.value_learning_rate or options.learning_rate))
    groups = []
    for parameters, rate in rates:
        groups += [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay, "lr": rate},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr": rate},
        ]
    return [g for g in groups if g["params"]]
