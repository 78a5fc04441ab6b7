"""How well a policy tells the preferred from the dispreferred answer on held-out pairs, against its reference."""

import numpy as np
import torch

from llmrl.evaluation.intervals import wilson_interval
from llmrl.learner.batches import scored_tokens
from llmrl.learner.sequences import Floats, Group, totals
from llmrl.objectives.scored import Objective, reduced


def preference_metrics(groups: list[Group], logprobs: list[list[Floats]], objective: Objective) -> dict[str, float]:
    """The objective's metrics of all pairs together, its loss, and a 95% interval of the accuracy.

    `groups` carry the reference's log-probabilities; `logprobs` are the policy's, per group and sequence.
    """
    flat_N = torch.from_numpy(np.concatenate([part for parts in logprobs for part in parts]))
    loss, metrics = objective.loss(flat_N, scored_tokens(groups, totals(groups), "cpu"))
    means = {name: reduced(name, values) for name, values in metrics.items() if values.numel()}
    # Ties have no right answer, and the pairs of one group are not independent.
    decided = min(len(groups), metrics["rewards/accuracies"].numel())
    if not decided:
        return {"loss": float(loss), "n": float(len(groups))}
    accuracy = means["rewards/accuracies"]
    low, high = wilson_interval(accuracy * decided, decided)
    return {
        "loss": float(loss),
        **means,
        "accuracy_interval_low": low,
        "accuracy_interval_high": high,
        "n": float(len(groups)),
    }
