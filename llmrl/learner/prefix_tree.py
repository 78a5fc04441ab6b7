"""Groups of sequences as prefix trees in one packed row: a shared beginning stands, and is computed, once.

Invariants
- The packed row is the depth-first, parent-first order of the nodes: a node's tokens are contiguous, and so are all its
  descendants, right behind it.
- A token attends to itself, to earlier tokens of its node, and to every token of the node's ancestors; its position is
  its depth in the tree, so it sees exactly what it would see in its own unpadded sequence.
- On a GPU the row is filled up to whole blocks with sequences of one token that nothing sees and nobody scores: one
  long one could have positions that the model does not.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl.learner.sequences import Group, Ints

MIN_SHARED = 8
"""Shared runs shorter than this stay unshared: a further attention call costs more than recomputing so few tokens."""
BLOCK = 128
"""Tokens that block-sparse attention on a GPU treats alike, along rows and columns."""


@dataclass(frozen=True)
class Node:
    """Packed tokens [start, end); everything below the node lies in [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int


@dataclass
class TreeLayout:
    """The nodes of a packed row of T tokens and each token's position (depth) [T].

    whole_blocks: T is a multiple of BLOCK and at least two of them, as block-sparse attention needs it.
    """

    nodes: list[Node]
    positions: Tensor
    whole_blocks: bool = False
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made when first asked for and kept under `name` for as long as the layout lives."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence; on the host, fetched once per layout."""
        return int(self.positions.max()) + 1

    @cached_property
    def subtree_ends(self) -> Ints:
        """[T]: for each token where the subtree of its node ends."""
        return np.repeat([n.subtree_end for n in self.nodes], [n.end - n.start for n in self.nodes])

    def mask(self, window: int | None = None) -> Tensor:
        """[T, T] bool, True = row attends to column; with `window`, only to the last `window` positions, its own too.

        For attention that cannot take the tree piece by piece. Quadratic in T, made once per layout.
        """
        return self.once(("mask", window), lambda: self._mask(window))

    def _mask(self, window: int | None) -> Tensor:
        length = len(self.positions)
        mask = torch.zeros(length, length, dtype=torch.bool, device=self.positions.device)
        for node in self.nodes:
            size = node.end - node.start
            mask[node.start : node.end, node.start : node.end] = torch.ones(size, size, dtype=torch.bool).tril()
            mask[node.end : node.subtree_end, node.start : node.end] = True
        if window is not None:
            mask &= self.positions[:, None] - self.positions[None, :] < window
        return mask


@dataclass(frozen=True)
class PackedTree:
    """One packed row: `token_ids` [T], its layout, and for every sequence the packed place of each of its tokens."""

    token_ids: Ints
    layout: TreeLayout
    places: list[Ints]


class _Builder:
    def __init__(self) -> None:
        self.ids: list[Ints] = []
        self.depths: list[Ints] = []
        self.nodes: list[Node] = []
        self.length = 0

    def add_group(self, sequences: list[Ints]) -> list[Ints]:
        """Append a group's tree; returns the packed places of each sequence's tokens."""
        places: list[list[Ints]] = [[] for _ in sequences]
        self._grow(list(range(len(sequences))), 0, sequences, places)
        return [np.concatenate(parts) for parts in places]

    def _grow(self, members: list[int], depth: int, sequences: list[Ints], places: list[list[Ints]]) -> None:
        """Pack what `members`, which agree up to `depth`, hold from there on."""
        members = [m for m in members if len(sequences[m]) > depth]
        for branch in _branches(members, depth, sequences):
            shared = _common_length([sequences[m] for m in branch], depth)
            index, start = len(self.nodes), self.length
            self.ids.append(sequences[branch[0]][depth : depth + shared])
            self.depths.append(np.arange(depth, depth + shared))
            self.length += shared
            place = np.arange(start, self.length)
            for m in branch:
                places[m].append(place)
            self.nodes.append(Node(start, self.length, self.length))
            if len(branch) > 1:
                self._grow(branch, depth + shared, sequences, places)
                self.nodes[index] = Node(start, start + shared, self.length)


def _branches(members: list[int], depth: int, sequences: list[Ints]) -> list[list[int]]:
    """Members that go on together for long enough share a branch; the others get one each. Order of first member."""
    by_next: dict[int, list[int]] = {}
    for m in members:
        by_next.setdefault(int(sequences[m][depth]), []).append(m)
    branches = []
    for together in by_next.values():
        worth_it = len(together) > 1 and _common_length([sequences[m] for m in together], depth) >= MIN_SHARED
        branches += [together] if worth_it else [[m] for m in together]
    return sorted(branches)


def _common_length(sequences: list[Ints], depth: int) -> int:
    """How many tokens from `depth` on all the sequences have in common."""
    length = min(len(s) for s in sequences) - depth
    first = sequences[0][depth : depth + length]
    for other in sequences[1:]:
        differs = np.flatnonzero(first != other[depth : depth + len(first)])
        first = first[: differs[0]] if len(differs) else first
    return len(first)


def pack(groups: list[Group], device: torch.device | str = "cpu", whole_blocks: bool | None = None) -> PackedTree:
    """Groups -> one packed row. The order of sequences is that of the groups.

    `whole_blocks`: fill the row up to a multiple of BLOCK tokens, two blocks at least (None: on a GPU).
    """
    builder = _Builder()
    places = [place for group in groups for place in builder.add_group([s.token_ids for s in group])]
    whole_blocks = torch.device(device).type == "cuda" if whole_blocks is None else whole_blocks
    if whole_blocks:
        filled = max(-(-builder.length // BLOCK), 2) * BLOCK
        builder.add_group([np.zeros(1, np.int64)] * (filled - builder.length))
    positions = torch.from_numpy(np.concatenate(builder.depths)).to(device)
    return PackedTree(np.concatenate(builder.ids), TreeLayout(builder.nodes, positions, whole_blocks), places)


def num_unique_tokens(group: Group) -> int:
    """How many tokens of the group are computed: each shared beginning once."""
    builder = _Builder()
    builder.add_group([s.token_ids for s in group])
    return builder.length


def within_budget(rollouts: list[Group], budget: int | None) -> list[Group]:
    """The rollouts of a prompt as groups of at most `budget` different tokens; a rollout is never divided."""
    groups: list[Group] = []
    for pieces in rollouts:
        together = (*groups[-1], *pieces) if groups else pieces
        if groups and (budget is None or _fits(together, budget)):
            groups[-1] = together
        else:
            groups.append(pieces)
    return groups


def _fits(group: Group, budget: int) -> bool:
    """Whether the group is computed within the budget; the tree is only built where the plain sum leaves a doubt."""
    return sum(len(piece.token_ids) for piece in group) <= budget or num_unique_tokens(group) <= budget
