"""Groups of sequences as the tensors of one forward pass, in a packed tree or in padded rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrl.learner.prefix_tree import TreeLayout, pack
from llmrl.learner.sequences import Floats, Group, TokenSequence
from llmrl.objectives.scored import ScoredTokens, Totals


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass over T slots: rows [R, L] of tokens, and which slots predict which scored token.

    source_M: int64 slot (of the R*L, row by row) whose hidden state predicts; target_M: int64 the predicted token.
    scored_row_N: for each of the N scored tokens its entry in `source_M`, for siblings may score the same token once.
    layout: the prefix trees of the single row, or None for padded rows with `attention_mask` [R, L].
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    layout: TreeLayout | None
    source_M: Tensor
    target_M: Tensor
    scored_row_N: Tensor


def tree_inputs(groups: list[Group], device: torch.device | str) -> ModelInputs:
    """Groups packed into one row in which shared beginnings stand once."""
    packed = pack(groups, device)
    sequences = [s for group in groups for s in group]
    sources = [place[np.flatnonzero(s.scored) - 1] for s, place in zip(sequences, packed.places, strict=True)]
    return _inputs(
        packed.token_ids[None], packed.layout.positions[None], None, packed.layout, sources, sequences, device
    )


def padded_inputs(groups: list[Group], device: torch.device | str, pad_id: int = 0) -> ModelInputs:
    """One row a sequence, padded on the right: for models whose attention cannot take a tree."""
    sequences = [s for group in groups for s in group]
    width = max(len(s.token_ids) for s in sequences)
    ids = np.full((len(sequences), width), pad_id, np.int64)
    mask = np.zeros((len(sequences), width), np.int64)
    for row, s in enumerate(sequences):
        ids[row, : len(s.token_ids)] = s.token_ids
        mask[row, : len(s.token_ids)] = 1
    sources = [row * width + np.flatnonzero(s.scored) - 1 for row, s in enumerate(sequences)]
    return _inputs(ids, None, torch.from_numpy(mask).to(device), None, sources, sequences, device)


def _inputs(
    ids: np.ndarray,
    positions: Tensor | None,
    mask: Tensor | None,
    layout: TreeLayout | None,
    sources: list[np.ndarray],
    sequences: list[TokenSequence],
    device: torch.device | str,
) -> ModelInputs:
    targets = [s.token_ids[s.scored] for s in sequences]
    entries = np.stack([np.concatenate(sources), np.concatenate(targets)], axis=1)
    unique, scored_row = np.unique(entries, axis=0, return_inverse=True)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return ModelInputs(
        tensor(ids), positions, mask, layout, tensor(unique[:, 0]), tensor(unique[:, 1]), tensor(scored_row.reshape(-1))
    )


def scored_tokens(groups: list[Group], totals: Totals, device: torch.device | str) -> ScoredTokens:
    """The index vectors of a micro-batch's scored tokens, in the order of groups, sequences and tokens."""
    pieces = [piece for group in groups for piece in group]
    counts = [piece.num_scored for piece in pieces]
    firsts = [piece for piece in pieces if not piece.continues]
    sequence_of_piece = np.cumsum([not piece.continues for piece in pieces]) - 1
    turns = [
        np.zeros(n, np.int64) if piece.turn_index is None else piece.turn_index[piece.scored]
        for piece, n in zip(pieces, counts, strict=True)
    ]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    def joined(parts: list[Floats]) -> Tensor:
        return tensor(np.concatenate(parts)).float()

    def known(parts: list[Floats | None]) -> Tensor | None:
        found = [part for part in parts if part is not None]
        return joined(found) if len(found) == len(parts) else None

    def per_sequence(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=device)

    group_sizes = [sum(not piece.continues for piece in group) for group in groups]
    token_names = sorted({name for piece in pieces for name in piece.token_values})
    return ScoredTokens(
        sequence_index_N=tensor(np.repeat(sequence_of_piece, counts)),
        turn_index_N=tensor(np.concatenate(turns)),
        group_index_S=tensor(np.repeat(np.arange(len(groups)), group_sizes)),
        totals=totals,
        reference_logprobs_N=known([piece.reference_logprobs for piece in pieces]),
        behaviour_logprobs_N=known([piece.behaviour_logprobs for piece in pieces]),
        values_S={name: per_sequence([first.values[name] for first in firsts]) for name in firsts[0].values},
        token_values_N={name: joined([piece.token_values[name] for piece in pieces]) for name in token_names},
        weights_S=per_sequence([first.weight for first in firsts]),
        group_sizes=tuple(group_sizes),
    )
