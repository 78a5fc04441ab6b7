"""What the learner is fed: token sequences in groups, and the micro-batches that groups are put into.

A group is what must be seen together (the chosen and rejected answer to one prompt, the n samples of one prompt); its
sequences usually share their beginning. Groups are never split over micro-batches or ranks.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.objectives.scored import Totals

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TokenSequence:
    """One whole sequence with the tokens of it that are scored.

    token_ids: [L]. scored: [L] bool, which tokens the objective sees; the first token cannot be scored.
    turn_index: [L] or None (one turn). reference_logprobs, behaviour_logprobs: one number per *scored* token, or None.
    token_values: further named numbers, one per scored token. values: named numbers of the whole sequence, such as a
    reward. weight: how many times the sequence counts.
    continues: this is a further piece of the sequence before it in the group, for objectives one sequence with it: a
    rollout whose chat template rewrote what had been said goes on in a new piece. `values` and `weight` are those of
    the first piece.
    """

    token_ids: Ints
    scored: NDArray[np.bool_]
    turn_index: Ints | None = None
    reference_logprobs: Floats | None = None
    behaviour_logprobs: Floats | None = None
    token_values: dict[str, Floats] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    continues: bool = False

    def __post_init__(self) -> None:
        if len(self.token_ids) == 0 or self.scored.shape != self.token_ids.shape:
            raise ValueError(f"{len(self.token_ids)} token ids and a mask of {len(self.scored)}")
        if self.scored[0]:
            raise ValueError("the first token of a sequence has no context and cannot be scored")
        for name, numbers in self.token_values.items():
            if len(numbers) != self.num_scored:
                raise ValueError(f"{len(numbers)} {name} for {self.num_scored} scored tokens")

    @property
    def num_scored(self) -> int:
        return int(self.scored.sum())


Group = tuple[TokenSequence, ...]
_DTYPES = {
    "token_ids": np.int64, "turn_index": np.int64, "reference_logprobs": np.float32, "behaviour_logprobs": np.float32,
}  # fmt: skip


def stored(sequence: TokenSequence) -> dict[str, Any]:
    """Every field as JSON and checkpoints have it; of `scored` the [start, end) of each run."""
    kept = {each.name: getattr(sequence, each.name) for each in fields(sequence)}
    edges = np.flatnonzero(np.diff(sequence.scored.astype(np.int8), prepend=0, append=0))
    return {
        **{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in kept.items()},
        "scored": edges.reshape(-1, 2).tolist(),
        "token_values": {name: numbers.tolist() for name, numbers in sequence.token_values.items()},
    }


def restored(kept: dict[str, Any]) -> TokenSequence:
    """What `stored` gave. Raises KeyError or TypeError where it was not that."""
    scored = np.zeros(len(kept["token_ids"]), np.bool_)
    for start, end in kept["scored"]:
        scored[start:end] = True
    arrays = {name: None if kept[name] is None else np.asarray(kept[name], kind) for name, kind in _DTYPES.items()}
    numbers = {name: np.asarray(values, np.float32) for name, values in kept["token_values"].items()}
    return TokenSequence(**{**kept, **arrays, "scored": scored, "token_values": numbers})


def totals(groups: Seq[Group]) -> Totals:
    """What objectives divide by: the counts of a whole optimizer step."""
    tokens = sequences = 0.0
    for group in groups:
        weight = 1.0
        for piece in group:
            if not piece.continues:
                weight = piece.weight
                sequences += weight
            tokens += weight * piece.num_scored
    return Totals(tokens, sequences, len(groups))


def completion(prompt_ids: Seq[int] | Ints, completion_ids: Seq[int] | Ints) -> TokenSequence:
    """A prompt (not scored) followed by a completion (scored)."""
    ids = np.concatenate([np.asarray(prompt_ids, np.int64), np.asarray(completion_ids, np.int64)])
    return TokenSequence(ids, np.arange(len(ids)) >= len(prompt_ids))


def per_sequence(values_N: Floats, groups: Seq[Group]) -> list[list[Floats]]:
    """What one forward pass says of the scored tokens of these groups, for each group sequence by sequence."""
    counts = [sequence.num_scored for group in groups for sequence in group]
    parts = iter(np.split(values_N, np.cumsum(counts)[:-1]))
    return [[next(parts) for _ in group] for group in groups]


def split_into_microbatches(sizes: Seq[int], budget: int) -> list[list[int]]:
    """Indices of groups, put together so that each micro-batch holds at most `budget` tokens.

    `sizes` are the groups' token counts as they will be computed. Best-fit on sizes from large to small: few, evenly
    filled micro-batches; a group larger than the budget gets one of its own. The result depends on `sizes` alone.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [b for b in range(len(bins)) if loads[b] + sizes[i] <= budget]
        if fitting:
            best = max(fitting, key=lambda b: loads[b])
            bins[best].append(i)
            loads[best] += sizes[i]
        else:
            bins.append([i])
            loads.append(sizes[i])
    return [sorted(members) for members in bins]


def split_over_ranks(sizes: Seq[int], num_ranks: int) -> list[list[int]]:
    """Indices of groups for each rank, with token counts as equal as a greedy assignment makes them."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = min(range(num_ranks), key=lambda r: (loads[r], len(ranks[r])))
        ranks[lightest].append(i)
        loads[lightest] += sizes[i]
    return [sorted(members) for members in ranks]
