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
    sequences = [s for group in groups for s in group]
    counts = [s.num_scored for s in sequences]
    turns = [
        np.zeros(n, np.int64) if s.turn_index is None else s.turn_index[s.scored]
        for s, n in zip(sequences, counts, strict=True)
    ]

    def known(name: str) -> Tensor | None:
        parts: list[Floats | None] = [getattr(s, name) for s in sequences]
        if any(part is None for part in parts):
            return None
        return torch.from_numpy(np.concatenate([p for p in parts if p is not None])).float().to(device)

    names = sequences[0].values.keys()
    return ScoredTokens(
        sequence_index_N=torch.from_numpy(np.repeat(np.arange(len(sequences)), counts)).to(device),
        turn_index_N=torch.from_numpy(np.concatenate(turns)).to(device),
        group_index_S=torch.from_numpy(np.repeat(np.arange(len(groups)), [len(g) for g in groups])).to(device),
        totals=totals,
        reference_logprobs_N=known("reference_logprobs"),
        behaviour_logprobs_N=known("behaviour_logprobs"),
        values_S={
            name: torch.tensor([s.values[name] for s in sequences], dtype=torch.float32, device=device)
            for name in names
        },
    )
