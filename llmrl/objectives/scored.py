"""What an objective sees of a batch: the scored tokens, which sequence and group each belongs to, and global counts.

Invariants
- A sequence is whatever the method compares or weighs as one: a completion, or a whole rollout of several turns.
- N scored tokens, S sequences, G groups of this *micro-batch*; sequences are numbered 0..S-1 and groups 0..G-1 locally,
  the sequences of a group stand next to each other, and a group is never split over micro-batches or ranks.
- `totals` counts the whole optimizer step, over all micro-batches and ranks. A loss is a sum over what is here divided
  by a count from `totals`; then packing, accumulation and sharding cannot change the gradient.
"""

from collections.abc import Callable
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
    entropies_N: Tensor | None = None
    predicted_values_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weights_S.numel() == 0:
            ones = torch.ones(self.num_sequences, dtype=torch.float32, device=self.group_index_S.device)
            object.__setattr__(self, "weights_S", ones)

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
        zeros_S = torch.zeros(self.num_sequences, dtype=torch.float32, device=values_N.device)
        return zeros_S.index_add(0, self.sequence_index_N, values_N.float())

    def lengths_S(self) -> Tensor:
        """[S] float32: how many scored tokens each sequence has."""
        return self.sum_per_sequence(torch.ones_like(self.sequence_index_N, dtype=torch.float32))


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
