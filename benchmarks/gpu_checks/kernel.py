"""The tree attention's kernel alone: does it compile, and how fast is it beside the dense mask and padded rows."""

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_checks.material import random_group
from gpu_checks.report import DEVICE, GPU, Report, measured, patched, synchronize
from llmrl.learner import attention, block_attention
from llmrl.learner.prefix_tree import TreeLayout, pack
from llmrl.learner.sequences import Group


def compile_section(report: Report, small: bool) -> None:
    """The trial of a kind of attention: does it compile, how far is it from the dense mask, how long does it take."""
    kinds = [("bf16 12/2 x 128", (torch.bfloat16, 12, 2, 128, False, 128**-0.5, None))]

    def trial(values: tuple[Any, ...]) -> dict[str, Any]:
        return {"error_of_largest": block_attention._trial_error(block_attention.Kind(DEVICE, *values))}

    for name, values in kinds if GPU else []:
        report.case("compile", name, partial(trial, values))
        report.case("compile", f"{name}, again", partial(trial, values))


def attention_section(report: Report, small: bool) -> None:
    """Attention alone, forward and backward, bf16, 12 heads over 2 of 128: kernel, dense mask, causal padded rows."""
    draw = np.random.default_rng(0)
    for length in (512,) if small else (4096, 16_384, 32_768):
        many = [(512, [64] * 8)] * (length // 1024) if not small else [(128, [16] * 8)]
        for label, shapes in (
            ("N x (512 + 8x64)", many),
            ("1 x (T/2, 8 answers)", [(length // 2, [length // 16] * 8)]),
        ):
            groups = [random_group(draw, 1000, prompt, answers) for prompt, answers in shapes]
            for way in ("kernel", "kernel, unknown length", "dense", "padded"):
                report.case(
                    "attention",
                    f"{way}, T {length}, {label}",
                    partial(attention_case, way, groups),
                )


def attention_case(way: str, groups: list[Group]) -> dict[str, Any]:
    layout = pack(groups, DEVICE).layout
    lengths = [len(s.token_ids) for group in groups for s in group]
    batch, tokens = (len(lengths), max(lengths)) if way == "padded" else (1, len(layout.positions))
    dtype = torch.bfloat16 if GPU else torch.float32
    query, key, value = (
        torch.randn(batch, tokens, n, 128, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (12, 2, 2)
    )
    upstream = torch.randn_like(query)
    begin, found = time.perf_counter(), {}
    if way.startswith("kernel") and GPU:
        mask = block_attention.block_mask(layout)
        synchronize()
        found = {"mask_ms": (time.perf_counter() - begin) * 1e3, "blocks_skipped_percent": float(mask.sparsity())}

    def once() -> None:
        torch.autograd.grad(attended(way, query, key, value, layout), (query, key, value), upstream)

    options = {} if way.endswith("unknown length") else block_attention.KERNEL_OPTIONS
    with patched(block_attention, KERNEL_OPTIONS=options):
        return found | {"slots": batch * tokens, **measured(once, repeats=10 if GPU else 1)}


def attended(way: str, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout) -> Tensor:
    if way == "padded":
        key, value = attention._repeated(query, key, value)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    if way == "dense" or not GPU:
        return attention._ungrouped(query, *attention._repeated(query, key, value), layout, 128**-0.5, None, None)
    out = block_attention.block_attention(query, key, value, layout, 128**-0.5)
    if out is None:
        raise RuntimeError("no kernel")
    return out
