"""Rollouts as the learner takes them."""

import numpy as np

from llmrl.learner.sequences import Group, TokenSequence
from llmrl.rollout.trajectory import Rollout


def token_sequences(rollout: Rollout, values: dict[str, float]) -> Group:
    """The rollout as the learner takes it: one sequence, in as many pieces as it has; pieces without a sampled token
    are left out. `values` are the whole rollout's."""
    found: list[TokenSequence] = []
    for number, ids in enumerate(rollout.pieces):
        turns = [(index, turn) for index, turn in enumerate(rollout.turns) if turn.piece == number]
        if not any(turn.end > turn.start for _, turn in turns):
            continue
        end = max(turn.end for _, turn in turns)
        scored, turn_index = np.zeros(end, np.bool_), np.zeros(end, np.int64)
        for index, turn in turns:
            scored[turn.start : turn.end] = True
            turn_index[turn.start : turn.end] = index
        found.append(
            TokenSequence(
                token_ids=np.asarray(ids[:end], np.int64),
                scored=scored,
                turn_index=turn_index,
                behaviour_logprobs=np.asarray([p for _, turn in turns for p in turn.logprobs], np.float32),
                values=values,
                continues=bool(found),
            )
        )
    return tuple(found)
