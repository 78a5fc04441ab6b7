"""The reference policy: what the trained model was when training started, in memory, never re-read from disk.

With adapters the reference is the same model with them switched off. Without, its log-probabilities are computed before
the first update when the data is fixed (`precomputed`), or one frozen copy is kept (`frozen`). A method that compares
with nothing has none (`none`).
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from peft import PeftModel

from llmrl.errors import RefusedError
from llmrl.learner.policy import Policy

ReferenceKind = Literal["adapter_off", "frozen", "precomputed", "none"]
IN_MEMORY: tuple[ReferenceKind, ...] = ("adapter_off", "frozen")
"""Kinds that can be asked at any time."""
FROZEN_UNDER_ZERO3 = (
    "reference: frozen keeps a whole copy on each rank, which ZeRO-3 is there to avoid; use use_peft: true (the "
    "reference is then the policy without its adapter), for pairs reference: precomputed, or for the methods that "
    "sample beta: 0"
)


def choose(kind: str, has_adapter: bool) -> ReferenceKind:
    """`auto` -> adapters off where there are adapters, else precomputed. Refuses what cannot be."""
    if kind == "auto":
        return "adapter_off" if has_adapter else "precomputed"
    if kind == "adapter_off" and not has_adapter:
        raise RefusedError(
            "reference: adapter_off needs an adapter to switch off; set use_peft: true or reference: precomputed"
        )
    if kind not in get_args(ReferenceKind):
        raise ValueError(f"reference {kind!r} is none of auto, {', '.join(get_args(ReferenceKind))}")
    return kind  # type: ignore[return-value]


def why_not_asked(kind: ReferenceKind) -> str:
    """What is wrong where a reference of this kind, which is not in memory, is asked."""
    if kind == "none":
        return "this learner was built without a reference (needs_reference, or reference: none)"
    return "the reference is precomputed: its log-probabilities come with the sequences, and these do not carry them"


def frozen_copy(policy: Policy) -> Policy:
    """A second copy of the weights as they are now, without gradients."""
    return copy.deepcopy(policy).eval().requires_grad_(False)


@contextlib.contextmanager
def adapters_off(policy: Policy) -> Iterator[None]:
    """The base model alone, for the time of the context; without adapters nothing changes."""
    if isinstance(policy.causal_lm, PeftModel):
        with policy.causal_lm.disable_adapter():
            yield
    else:
        yield


@contextlib.contextmanager
def scoring(policy: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients."""
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.train(was_training)
