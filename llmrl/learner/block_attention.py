"""Attention over a packed row of prefix trees on a GPU: torch's flex_attention, which skips the blocks no token sees.

Invariants
- Token i attends to token j exactly if j <= i < subtree_end[j]: in the depth-first order of the row, what lies between
  a token and the end of its node's subtree is what comes after it in its node, and the node's descendants. A window
  adds that j's depth is among the last `window` up to i's.
- The row is a multiple of `BLOCK` tokens and at least two blocks long (`pack` fills it up on a GPU), so one compiled
  kernel serves every length: none of its shapes is 1, for which torch would compile a second time.
- A kernel is used only after a trial of its forward and backward against the dense mask, once per process and kind of
  attention. Where it cannot be compiled or is wrong, the dense mask is used, and that is said.
"""

import functools
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llmrl.learner.prefix_tree import BLOCK, Node, TreeLayout

MOST_KERNELS = 64
"""Kinds of attention (heads, precision, window, with or without gradients) that one process may compile; torch's own
limit of 8 is soon reached by a policy and a reward model of different sizes."""
KERNEL_OPTIONS: Any = {"IS_DIVISIBLE": True}
"""The length is a multiple of the kernel's blocks, which the compiler cannot know of a length that varies."""
TRIAL_TOLERANCE = 0.02
"""Largest difference of output or gradient in the trial, relative to the largest element; a wrong mask is far above."""


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_window: bool
    scaling: float
    softcap: float | None


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor | None:
    """query [1, heads, T, D], key, value [1, kv_heads, T, D] -> [1, heads, T, D]; None where this is not to be had."""
    kind = Kind(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1], window is not None, scaling, softcap
    )
    if not layout.whole_blocks or value.shape[-1] != query.shape[-1] or not _works(kind):
        return None
    return _attend(query, key, value, block_mask(layout, window), scaling, softcap)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float, softcap: float | None
) -> Tensor:
    """One compiled kernel for all lengths. Without `specialize_float` torch would make tensors of the numbers that have
    to be constants in the kernel; autocast has been applied before and would only be one more kind to compile for."""
    settings = {"specialize_float": True, "recompile_limit": MOST_KERNELS}
    with torch._dynamo.config.patch(settings), torch.autocast(query.device.type, enabled=False):
        return _compiled()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _soft_capped(softcap),
            block_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=KERNEL_OPTIONS,
        )


@functools.cache
def _compiled() -> Any:
    """`fullgraph`, so that torch raises where it would else compute [heads, T, T] scores one operation at a time."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@functools.cache
def _soft_capped(softcap: float) -> Any:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


# -- masks -----------------------------------------------------------------------------------------------------------


def block_mask(layout: TreeLayout, window: int | None = None) -> BlockMask:
    """The layout's mask in blocks of BLOCK x BLOCK, on the device of its positions; made once per layout."""
    return layout.once(("blocks", window), lambda: _block_mask(layout, window))


def _block_mask(layout: TreeLayout, window: int | None) -> BlockMask:
    seen, whole = block_occupancy(layout, window)
    mask = BlockMask.from_kv_blocks(
        *_ordered(seen & ~whole), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=_mask_mod(layout, window)
    )
    return mask.to(layout.positions.device)


def _mask_mod(layout: TreeLayout, window: int | None) -> Any:
    """Which token sees which, in blocks seen in part. Made of tensors: numbers would be compiled in."""
    device = layout.positions.device
    subtree_end = torch.from_numpy(layout.subtree_ends).int().to(device)

    def tree(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < subtree_end[column])

    if window is None:
        return tree
    position = layout.positions.int()
    oldest = position - (window - 1)

    def windowed(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < subtree_end[column]) & (position[column] >= oldest[row])

    return windowed


def block_occupancy(layout: TreeLayout, window: int | None = None) -> tuple[Tensor, Tensor]:
    """[T / BLOCK, T / BLOCK] bool twice: blocks that may hold a pair that sees, and blocks in which all pairs do.

    From the largest and smallest subtree end and position of each block, without looking at pairs: T^2 / BLOCK^2 work.
    Exact without a window; with one, some blocks count as seen though no pair in them is (the mask in them says so).
    """
    ends = layout.subtree_ends.reshape(-1, BLOCK)
    number = np.arange(len(ends))
    below = number[:, None] > number[None, :]
    seen = below & (ends.max(1)[None, :] > BLOCK * number[:, None])
    whole = below & (ends.min(1)[None, :] >= BLOCK * (number[:, None] + 1))
    if window is not None:
        positions = layout.positions.cpu().numpy().reshape(-1, BLOCK)
        first, last = positions.min(1), positions.max(1)
        seen &= first[:, None] - last[None, :] < window
        whole &= last[:, None] - first[None, :] < window
    seen |= np.eye(len(ends), dtype=bool)
    return torch.from_numpy(seen), torch.from_numpy(whole)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C] bool -> per row how many [1, 1, R] and which, these first [1, 1, R, C], as flex_attention wants them."""
    which = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], which.int()[None, None]


# -- trial -----------------------------------------------------------------------------------------------------------


@functools.cache
def _works(kind: Kind) -> bool:
    """Whether the kernel compiles for this kind and computes what the dense mask gives; says so if not."""
    try:
        error = _trial_error(kind)
        reason = None if error <= TRIAL_TOLERANCE else f"it is off by {error:.2g} of the largest element"
    except Exception as failure:  # compilers fail in too many ways to name: torch's, Triton's, ptxas', the C compiler's
        text = " ".join(str(failure).split())
        reason = f"{type(failure).__name__}: {text[:400]}"
    if reason is not None:
        warnings.warn(
            f"block-sparse attention cannot be used for {kind.num_heads} heads of {kind.head_dim} in {kind.dtype} "
            f"({reason}): prefix trees get a dense mask instead, slower and quadratic in memory.",
            stacklevel=2,
        )
    return reason is None


def _trial_error(kind: Kind) -> float:
    """Largest relative error over output and gradients, on random numbers. Leaves the global random state alone."""
    layout, window = _trial_layout(kind.device), 150 if kind.has_window else None
    generator = torch.Generator(kind.device).manual_seed(0)
    length = len(layout.positions)

    def draw(heads: int) -> Tensor:
        # In memory [T, heads, D], as models have it: another order would be compiled for a second time.
        numbers = torch.randn(1, length, heads, kind.head_dim, generator=generator, device=kind.device)
        return numbers.to(kind.dtype).transpose(1, 2)

    inputs = [draw(heads) for heads in (kind.num_heads, kind.num_kv_heads, kind.num_kv_heads)]
    upstream = draw(kind.num_heads)
    mask = block_mask(layout, window)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)

    def results(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [one.detach().to(dtype).requires_grad_() for one in inputs]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend(query, key, value, mask, kind.scaling, kind.softcap)

    with torch.no_grad():
        scored = attend(*inputs)
    # The trial may fall into a checkpointed forward, which would count its tensors among those to recompute.
    with torch.enable_grad(), keep, torch.autocast(kind.device.type, enabled=False):
        ours = results(attend, kind.dtype)
        truth = results(lambda q, k, v: _dense(q, k, v, layout.mask(window), kind), torch.float32)
    pairs = zip([scored, *ours], [truth[0], *truth], strict=True)
    errors = [float((one.float() - true).abs().max() / true.abs().max()) for one, true in pairs]
    return max(errors) if np.isfinite(errors).all() else float("inf")


def _trial_layout(device: torch.device) -> TreeLayout:
    """Two trees, one branching twice: of its blocks some are unseen, some whole, some in part."""
    nodes = [Node(0, 300, 500), Node(300, 340, 420), Node(340, 420, 420), Node(420, 500, 500), Node(500, 640, 640)]
    depths = [(0, 300), (300, 340), (340, 420), (300, 380), (0, 140)]
    positions = torch.cat([torch.arange(*depth) for depth in depths])
    return TreeLayout(nodes, positions.to(device), whole_blocks=True)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, kind: Kind) -> Tensor:
    groups = kind.num_heads // kind.num_kv_heads
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * kind.scaling
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
