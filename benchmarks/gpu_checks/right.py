"""Log-probabilities and gradients of trees against the model's own forward over padded rows."""

import contextlib
import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_checks.material import branching_groups, learner_for, random_model, without_kernel
from gpu_checks.report import DEVICE, Report
from llmrl.learner import attention, forms
from llmrl.learner.sequences import Group
from llmrl.objectives.scored import Objective

RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("mistral", {"sliding_window": 100}),
    (
        "gemma2",
        {
            "sliding_window": 100,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
        },
    ),
]
SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


def scores_and_gradient(model: Any, form: str, groups: list[Group], cast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities by Learner.logprobs [N], and a weighted sum's gradient by all parameters, as one vector."""
    said: list[str] = []
    learner = learner_for(copy.deepcopy(model), said, form=form, tokens_per_microbatch=8192)
    if learner.form != form:
        raise RuntimeError(f"got {learner.form}: {said}")
    autocast = contextlib.nullcontext() if cast is None else torch.autocast(DEVICE.type, cast)
    inputs = forms.inputs(form, groups, DEVICE)
    with autocast:
        logprobs = np.concatenate([part for group in learner.logprobs(groups) for part in group])
        again = learner.policy(inputs).logprobs_N
    weights = torch.linspace(-1, 1, len(again), device=DEVICE)
    (again.float() * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten().float() for p in learner.policy.parameters() if p.grad is not None])
    return torch.from_numpy(logprobs), gradient


def right_case(kind: str, settings: dict[str, Any], dtype: torch.dtype, cast: torch.dtype | None) -> dict[str, Any]:
    """Errors of the tree's two ways and of padded rows against padded rows in float32 with transformers' eager code."""
    groups = branching_groups(np.random.default_rng(0), SHAPE["vocab_size"], scale=120)
    model = random_model(kind, dtype, scale=3.0, **SHAPE, **settings)
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    true_logprobs, true_gradient = scores_and_gradient(exact, "padded", groups, None)
    del exact
    if kind == "gemma2":  # the padded form must not be transformers' sdpa, which drops the soft-cap
        model.set_attn_implementation(attention.NAME)
    found: dict[str, Any] = {}
    for way in ("tree", "dense", "padded"):
        with without_kernel() if way == "dense" else contextlib.nullcontext():
            logprobs, gradient = scores_and_gradient(model, "padded" if way == "padded" else "tree", groups, cast)
        found[f"{way}_logprob"] = float((logprobs - true_logprobs).abs().max())
        found[f"{way}_gradient"] = float((gradient - true_gradient).norm() / true_gradient.norm())
    return found


def checkpointing_case() -> dict[str, Any]:
    """One update with and without gradient checkpointing: the same gradient norm."""
    groups = branching_groups(np.random.default_rng(0), SHAPE["vocab_size"], scale=120)
    objective = Objective(lambda logprobs, scored: (-logprobs.sum() / scored.totals.tokens, {}))
    norms = []
    for spares in (False, True):
        model = random_model("llama", torch.bfloat16, scale=3.0, **SHAPE)
        learner = learner_for(model, [], gradient_checkpointing=spares, form="tree")
        norms.append(learner.update(groups, objective)["grad_norm"])
    return {"grad_norm": norms[0], "grad_norm_checkpointed": norms[1]}


def right_section(report: Report, small: bool, more: bool = False) -> None:
    """Learner.logprobs and gradients against the model's own forward. `more`: the rarer precisions and models."""
    name = "more" if more else "right"
    wanted = [
        *((kind, settings, torch.bfloat16, None, False) for kind, settings in RIGHT[1:]),
        (*RIGHT[0], torch.float32, None, False),
        (*RIGHT[0], torch.bfloat16, None, False),
        (*RIGHT[0], torch.float32, torch.bfloat16, True),
        *((kind, settings, torch.float32, None, True) for kind, settings in RIGHT[2:]),
        (*RIGHT[0], torch.float32, torch.float16, True),
        (*RIGHT[1], torch.float32, None, True),
    ]
    for kind, settings, dtype, cast, is_more in wanted:
        if is_more == more:
            label = f"{kind} {str(dtype)[6:]}" + (f" autocast {str(cast)[6:]}" if cast else "")
            report.case(name, label, partial(right_case, kind, settings, dtype, cast))
    if not more:
        report.case(name, "gradient checkpointing", checkpointing_case)
