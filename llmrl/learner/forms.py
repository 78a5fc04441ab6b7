"""Which form of forward pass a model gets: the prefix tree, or padded rows where its attention cannot take a tree.

The choice is made by what is known of the model and then checked once, on random tokens, against the model's own
forward: a wrong mask, or an unknown step between hidden states and logits, fails in silence; the loss still goes down.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from llmrl.errors import RefusedError
from llmrl.learner.batches import ModelInputs, padded_inputs, tree_inputs
from llmrl.learner.policy import Policy, base_model, can_take_tree
from llmrl.learner.prefix_tree import num_unique_tokens
from llmrl.learner.reference import scoring
from llmrl.learner.sequences import Group, completion

Form = Literal["tree", "padded"]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest difference in log-probability between two right forwards of the probe, by precision computed in. A wrong
mask is off by whole units on a trained model. float32 on a GPU may multiply in TF32 and gets float16's tolerance."""


def choose(policy: Policy, asked: str, say: Callable[[str], None]) -> Form:
    """Settle on a form before the model is sharded. `auto` takes the tree where it can and says when it cannot."""
    if asked not in ("auto", *get_args(Form)):
        raise ValueError(f"form {asked!r} is none of auto, {', '.join(get_args(Form))}")
    if asked == "padded":
        return "padded"
    reason = can_take_tree(policy.causal_lm)
    if reason is None:
        return "tree"
    name = type(base_model(policy.causal_lm)).__name__
    if asked == "tree":
        raise RefusedError(f"form: tree was asked for, but {name} cannot take it: {reason}. Use form: auto.")
    say(f"{name} gets the padded forward pass, slower than the prefix tree: {reason}.")
    return "padded"


def inputs(form: Form, groups: list[Group], device: torch.device) -> ModelInputs:
    """Groups as the tensors of one forward pass."""
    return tree_inputs(groups, device) if form == "tree" else padded_inputs(groups, device)


def size(form: Form, group: Group) -> int:
    """How many token slots the group costs; for padded rows those of its own longest sequence."""
    if form == "tree":
        return num_unique_tokens(group)
    return len(group) * max(len(s.token_ids) for s in group)


def dummy_group() -> Group:
    """The smallest thing that can be forwarded."""
    return (completion([0], [0]),)


def probe_group(vocabulary: int) -> Group:
    """Three short sequences of random tokens, with beginnings that all and that some of them share."""
    draw = np.random.default_rng(0)
    prompt, middle = draw.integers(0, vocabulary, 12), draw.integers(0, vocabulary, 10)
    tails = [draw.integers(0, vocabulary, n) for n in (6, 3, 9)]
    return tuple(
        completion(prompt, np.concatenate([m, t])) for m, t in zip((middle, middle, middle[:0]), tails, strict=True)
    )


def probe(model: nn.Module, vocabulary: int, device: torch.device) -> Callable[[Form, bool], Tensor]:
    """What `check` asks for: `model`, a policy or what wraps one, scores the probe."""

    def score(form: Form, plain: bool) -> Tensor:
        with scoring(model):
            found: Tensor = model(inputs(form, [probe_group(vocabulary)], device), False, plain).logprobs_N
        return found.float()

    return score


def check(
    form: Form, score: Callable[[Form, bool], Tensor], precision: torch.dtype, on_cpu: bool, say: Callable[[str], None]
) -> Form:
    """Compare with the model's own forward on the probe; falls back to padded rows aloud, refuses if those differ too.

    score(form, plain) -> [N] log-probabilities of the probe.
    """
    tolerance = TOLERANCE[torch.float16 if precision == torch.float32 and not on_cpu else precision]
    truth = score("padded", True)
    if form == "tree":
        error = _difference(lambda: score("tree", False), truth)
        if error <= tolerance:
            return "tree"
        say(
            f"the prefix-tree forward differs from the model's own by {error:.2g} in log-probability: "
            "using padded rows, which are slower."
        )
    error = _difference(lambda: score("padded", False), truth)
    if error > tolerance:
        raise RefusedError(
            f"log-probabilities from this model's hidden states differ from its own logits by {error:.2g}: its "
            "forward does something between the two that llmrl does not know. Please report the model's name."
        )
    return "padded"


def _difference(score: Callable[[], Tensor], truth: Tensor) -> float:
    error = (score() - truth).abs().max()
    return float(error) if torch.isfinite(error) else float("inf")


def disable_dropout(model: nn.Module) -> None:
    """Policy and reference are functions of their weights: the model's own dropout is off (an adapter's is not)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_" not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def enable_gradient_checkpointing(policy: Policy) -> None:
    """Recompute activations in the backward. Non-reentrant: the reentrant kind breaks under DDP with two forwards."""
    base_model(policy.causal_lm).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
