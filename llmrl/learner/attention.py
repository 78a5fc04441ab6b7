"""Attention over a packed row of prefix trees, registered with transformers under the name `llmrl_tree`.

A causal mask of the packed row's size would pay T x T whatever its sparsity. Here each node attends causally to itself
and everything below a node attends to it without a mask; the parts of a token are merged by their log-sum-exp, and the
backward pass hands the merged output and log-sum-exp to the kernel's own backward, part by part, which is exact. That
is the way on a CPU; a GPU would starve on so many small calls and gets one kernel that skips blocks (block_attention).
Where neither can be had, a dense mask is used: on a CPU with windows or a soft-cap, on a GPU where the kernel fails.
Without a `layout` (generation, padded batches) the name means transformers' ordinary sdpa.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmrl.learner.block_attention import block_attention
from llmrl.learner.prefix_tree import TreeLayout

NAME = "llmrl_tree"

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: TreeLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, heads, T, D], key, value [1, kv_heads, T, D] -> [1, T, heads, D]."""
    if layout is None and softcap is not None:
        return soft_capped_attention(query, key, value, attention_mask, scaling, softcap), None
    if layout is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _in_one_dtype(query, key, value)
    window = _binding_window(layout, sliding_window)
    out = block_attention(query, key, value, layout, scaling, window, softcap)
    if out is None:
        out = _ungrouped(query, *_repeated(query, key, value), layout, scaling, window, softcap)
    return out.transpose(1, 2).contiguous(), None


def _ungrouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """query, key, value [1, heads, T, D] -> [1, heads, T, D]."""
    if softcap is not None:
        return _softcapped(query, key, value, layout.mask(window), scaling, softcap)
    if window is None and query.device.type == "cpu":
        return _TreeAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), layout, scaling)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=layout.mask(window), scale=scaling
    )


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does before torch's own attention: rotary embeddings are float32, values are not."""
    kind = tensors[0].device.type
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors) if torch.is_autocast_enabled(kind) else tensors


def _binding_window(layout: TreeLayout, window: int | None) -> int | None:
    """A window that no sequence outgrows is no window."""
    return window if window is not None and layout.longest > window else None


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value once per query head."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def soft_capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Of padded rows, [B, heads, Q, D] with keys of length L -> [B, Q, heads, D]; no mask means causal.

    transformers' own sdpa leaves the soft-cap out in silence, and the model is then another one.
    """
    query, key, value = _in_one_dtype(query, key, value)
    queries, length = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(queries, length, dtype=torch.bool, device=query.device).tril(length - queries)
    key, value = _repeated(query, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _softcapped(query, key, value, mask[..., :length], scaling, softcap).transpose(1, 2).contiguous()


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap)) * softcap
    # The lowest number rather than -inf: a padded row sees nothing, and its gradient would not be a number.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


class _TreeAttention(torch.autograd.Function):
    """query, key, value [1, heads, T, D] -> [1, heads, T, D], with torch's flash kernel for CPUs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scaling: float) -> Tensor:
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.float32)
        for node in layout.nodes:
            own = slice(node.start, node.end)
            q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
            own_out, own_lse = _forward_kernel(q, k, v, 0.0, True, scale=scaling)
            out[:, :, own], lse[:, :, own] = own_out, own_lse
        for node in layout.nodes:
            if node.subtree_end > node.end:
                own, below = slice(node.start, node.end), slice(node.end, node.subtree_end)
                part = _forward_kernel(query[:, :, below], key[:, :, own], value[:, :, own], 0.0, False, scale=scaling)
                _merge(out[:, :, below], lse[:, :, below], *part)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = tuple(torch.zeros_like(t) for t in (query, key, value))
        for node in ctx.layout.nodes:
            own, below = slice(node.start, node.end), slice(node.end, node.subtree_end)
            for rows, causal in ((own, True), (below, False)):
                if rows.stop > rows.start:
                    part = _backward_kernel(
                        grad_out[:, :, rows].contiguous(),
                        query[:, :, rows].contiguous(),
                        key[:, :, own].contiguous(),
                        value[:, :, own].contiguous(),
                        out[:, :, rows].contiguous(),
                        lse[:, :, rows].contiguous(),
                        0.0,
                        causal,
                        scale=ctx.scaling,
                    )
                    for grad, part_grad, where in zip(grads, part, (rows, own, own), strict=True):
                        grad[:, :, where] += part_grad
        return (*grads, None, None)


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Fold a further part of the softmax into out [1, heads, rows, D] and lse [1, heads, rows], in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - total)[..., None].to(out.dtype)).add_(
        part_out * torch.exp(part_lse - total)[..., None].to(out.dtype)
    )
    lse.copy_(total)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
