"""What an objective sees of a batch: the scored tokens, which sequence and group each belongs to, and global counts.

Ragged vectors have no padding: an index vector beside them says to what each element belongs (`sums`, `starts`).

Invariants
- A sequence is whatever the method compares or weighs as one: a completion, or a whole rollout of several turns.
- N scored tokens, S sequences, G groups of this *micro-batch*; sequences are numbered 0..S-1 and groups 0..G-1 locally,
  the sequences of a group stand next to each other, and a group is never split over micro-batches or ranks.
- `totals` counts the whole optimizer step, over all micro-batches and ranks. A loss is a sum over what is here divided
  by a count from `totals`; then packing, accumulation and sharding cannot change the gradient.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Counts over the whole optimizer step, every micro-batch of every rank; a sequence counts by its weight."""

    tokens: float
    sequences: float
    groups: int


@dataclass(frozen=True)
class ScoredTokens:
    """Index vectors and per-token data of the N scored tokens of one micro-batch.

    sequence_index_N: int64, the sequence of each token; turn_index_N: int64, the turn within its sequence.
    group_index_S: int64, the group of each sequence.
    reference_logprobs_N, behaviour_logprobs_N: float32, log pi_ref and the sampler's log-probabilities where known.
    values_S: named float32 vectors with one number per sequence (rewards, ...).
    token_values_N: named float32 vectors with one number per scored token (`old_logprobs`, `advantages`, ...).
    weights_S: float32, how many times each sequence counts; ones where not given.
    group_sizes: how many sequences each group has, known to the host; counted where not given.
    entropies_N, predicted_values_N: what the forward pass gives beside log-probabilities, differentiable; None where
    the objective did not ask, or the model has no value head.
    """

    sequence_index_N: Tensor
    turn_index_N: Tensor
    group_index_S: Tensor
    totals: Totals
    reference_logprobs_N: Tensor | None = None
    behaviour_logprobs_N: Tensor | None = None
    values_S: dict[str, Tensor] = field(default_factory=dict)
    token_values_N: dict[str, Tensor] = field(default_factory=dict)
    weights_S: Tensor = field(default_factory=lambda: torch.empty(0))
    group_sizes: tuple[int, ...] = ()
    entropies_N: Tensor | None = None
    predicted_values_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weights_S.numel() == 0:
            ones = torch.ones(self.num_sequences, dtype=torch.float32, device=self.group_index_S.device)
            object.__setattr__(self, "weights_S", ones)
        if not self.group_sizes:
            sizes_G = self.group_index_S.unique_consecutive(return_counts=True)[1]
            object.__setattr__(self, "group_sizes", tuple(sizes_G.tolist()))

    @property
    def num_sequences(self) -> int:
        return len(self.group_index_S)

    def with_reference(self, reference_logprobs_N: Tensor) -> "ScoredTokens":
        """The same tokens, with the reference's log-probabilities known."""
        return replace(self, reference_logprobs_N=reference_logprobs_N)

    def with_scores(self, entropies_N: Tensor | None, predicted_values_N: Tensor | None) -> "ScoredTokens":
        """The same tokens, with what the forward pass gave beside their log-probabilities."""
        return replace(self, entropies_N=entropies_N, predicted_values_N=predicted_values_N)

    def sum_per_sequence(self, values_N: Tensor) -> Tensor:
        """[N] -> [S]: the sum of a per-token quantity over each sequence's scored tokens, in float32."""
        return sums(values_N.float(), self.sequence_index_N, self.num_sequences)

    def lengths_S(self) -> Tensor:
        """[S] float32: how many scored tokens each sequence has."""
        return self.sum_per_sequence(torch.ones_like(self.sequence_index_N, dtype=torch.float32))

    def sum_per_group(self, values_S: Tensor) -> Tensor:
        """[S] -> [G]: the sum of a quantity of sequences over each group, in its dtype."""
        return sums(values_S, self.group_index_S, len(self.group_sizes))

    def check_groups(self, takes: str, least: int, most: int | None = None) -> None:
        """ValueError names the first group with fewer than `least` or more than `most` sequences, and what the
        objective `takes` in each."""
        for number, size in enumerate(self.group_sizes):
            if size < least or (most is not None and size > most):
                raise ValueError(f"{takes} in each group; group {number} has {size} sequences")


def num_indexed(index_N: Tensor) -> int:
    """How many things an index vector counts from 0: one more than its largest entry."""
    return int(index_N.max()) + 1 if len(index_N) else 0


def sums(values_N: Tensor, index_N: Tensor, num: int) -> Tensor:
    """[N] values of what `index_N` numbers 0..num-1 -> [num]: the sum of each, in the values' dtype."""
    return torch.zeros(num, dtype=values_N.dtype, device=values_N.device).index_add(0, index_N, values_N)


def starts(*indices_N: Tensor) -> Tensor:
    """[N], ... -> [N] bool: where a sequence begins; of several index vectors (its turns, too), where any changes."""
    starts_N = torch.ones_like(indices_N[0], dtype=torch.bool)
    starts_N[1:] = False
    for index_N in indices_N:
        starts_N[1:] |= index_N[1:] != index_N[:-1]
    return starts_N


def extreme(name: str) -> Callable[[Iterable[float]], float] | None:
    """Which element of a metric of this name is reported: the largest, the smallest, or none but their mean."""
    return max if name.endswith("max") else min if name.endswith("min") else None


def reduced(name: str, values: Tensor) -> float:
    """The one number that is reported of a metric's elements when all of them are here (see `Objective`); at least
    one."""
    how, values = extreme(name), values.detach().double()
    return float(values.mean() if how is None else values.max() if how is max else values.min())


class Objective(NamedTuple):
    """A loss together with what it needs to be handed: the reference's log-probabilities, the policy's entropies.

    `loss(logprobs_N, scored)` returns the scalar to differentiate (a sum over the micro-batch divided by a global
    count) and metrics: detached tensors, whose mean over all elements of all micro-batches and ranks is what gets
    reported; of a metric whose name ends in `max` or `min` it is the largest or smallest element. A tensor without
    dimensions is the micro-batch's share of a sum over the step, like the loss: shares are added.
    """

    loss: Callable[[Tensor, ScoredTokens], tuple[Tensor, dict[str, Tensor]]]
    needs_reference: bool = False
    needs_entropy: bool = False
