"""BRAIn's optimizer steps, whatever the size of a prompt's samples; what is measured of them; when they rest on one.

Invariants
- A group is all samples of one prompt, each with `values["reward"]` and what the proposal needs.
- Two passes (log q of all samples without a gradient, then likelihood weighted by constants) are taken where some
  prompt's samples together exceed what one forward pass may compute; loss, metrics and gradient are those of one pass.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from llmrl.learner import forms
from llmrl.learner.batches import scored_tokens
from llmrl.learner.learner import Learner
from llmrl.learner.prefix_tree import within_budget
from llmrl.learner.sequences import Floats, Group, totals
from llmrl.objectives.brain import BRAIn, WeightedLikelihood
from llmrl.objectives.scored import reduced

COLLAPSED, STEPS_COLLAPSED = 1.2, 5
"""Effective samples of a prompt, on average, under which it is said that the target rests on one; after so many steps
in a row."""


class Measured(NamedTuple):
    """The loss on some groups, the means of its metrics (of `min` the smallest), and for each sample of each group the
    c_i with which -sum c_i log q(y_i) / groups has the same gradient."""

    loss: float
    metrics: dict[str, float]
    coefficients: list[list[float]]


def measured(brain: BRAIn, groups: list[Group], logprobs: list[list[Floats]]) -> Measured:
    """What the objective says of groups that carry the prior's log-probabilities. `logprobs` are the policy's."""
    scored = scored_tokens(groups, totals(groups), "cpu")
    flat = np.concatenate([part for parts in logprobs for part in parts])
    logprobs_N = torch.from_numpy(flat).requires_grad_()
    loss, metrics = brain(logprobs_N, scored)
    loss.backward()
    assert logprobs_N.grad is not None
    # log q of a sample is a sum over its tokens, so that each of them has the sample's own gradient.
    gradient_S = scored.sum_per_sequence(logprobs_N.grad) / scored.lengths_S()
    coefficients = iter((-len(groups) * gradient_S).tolist())
    means = {name: reduced(name, values) for name, values in metrics.items() if values.numel()}
    return Measured(
        loss.item(),
        means,
        [[next(coefficients) for piece in group if not piece.continues] for group in groups],
    )


def heldout_metrics(groups: list[Group], logprobs: list[list[Floats]], brain: BRAIn) -> dict[str, float]:
    """As `measured`, of held-out prompts; and `expected_reward`, the policy's mean reward as the samples tell it,
    sum b_i r_i: an estimate by self-normalised importance sampling, on which no sampling of its own is spent."""
    target, difference = (measured(replace(brain, baseline=b), groups, logprobs) for b in (False, True))
    found = difference if brain.baseline else target
    rewards = [[piece.values["reward"] for piece in group if not piece.continues] for group in groups]
    expected = []
    for alpha, less, reward in zip(target.coefficients, difference.coefficients, rewards, strict=True):
        weights = np.subtract(alpha, less)  # alpha - (alpha - b)
        if weights.any():  # else most_prior_gap has left nothing
            expected.append(float(weights @ np.array(reward)))
    known = {"expected_reward": float(np.mean(expected))} if expected else {}
    return {"loss": found.loss, **found.metrics, **known, "n": float(len(groups))}


def improve(learner: Learner, brain: BRAIn, groups: list[Group], *, advance_schedule: bool = True) -> dict[str, float]:
    """One optimizer step on whole prompts; the metrics of `Learner.update`."""
    budget = learner.options.tokens_per_microbatch
    if all(forms.size(learner.form, group) <= budget for group in groups):
        return learner.update(groups, brain.objective(), advance_schedule=advance_schedule)
    parts = [within_budget(_samples(group), budget) for group in groups]
    known = _with_prior(learner, groups, parts)
    found = measured(brain, known, _together(parts, learner.logprobs(_flat(parts))))
    weighed = [_weighed(group, c) for group, c in zip(known, found.coefficients, strict=True)]
    likelihood = WeightedLikelihood().objective()
    again = _flat([within_budget(_samples(group), budget) for group in weighed])
    done = learner.update(again, likelihood, totals(groups), advance_schedule=advance_schedule)
    done = {name: value for name, value in done.items() if not name.startswith("coefficient")}
    return {**done, **found.metrics, "loss": found.loss}


class SampleSizeWatch:
    """Says, once, when the target rests on about one sample of each prompt for several steps in a row, and when a step
    has no sample left."""

    def __init__(self, say: Callable[[str], None], remedy: str) -> None:
        self.say, self.remedy = say, remedy
        self._steps, self._said, self._said_empty = 0, False, False

    def __call__(self, metrics: dict[str, float]) -> None:
        if metrics.get("brain/left_out") == 1 and not self._said_empty:
            self._said_empty = True
            self.say(
                "warning: most_prior_gap leaves out every sample of this step, which teaches nothing: proposal and "
                "prior are further apart. Raise it, or take samples of a model nearer to the prior (said once)"
            )
        size = metrics.get("brain/ess")
        if size is None:
            return
        self._steps = self._steps + 1 if size < COLLAPSED else 0
        if self._steps == STEPS_COLLAPSED and not self._said:
            self._said = True
            self.say(
                f"the effective sample size of a prompt is {size:.2f}, below {COLLAPSED} for {STEPS_COLLAPSED} steps "
                f"in a row: the target is about one sample, whatever the others are worth. {self.remedy} (said once)"
            )


def _samples(group: Group) -> list[Group]:
    """Each sample of a group with all its pieces."""
    samples: list[Group] = []
    for piece in group:
        if piece.continues:
            samples[-1] = (*samples[-1], piece)
        else:
            samples.append((piece,))
    return samples


def _with_prior(learner: Learner, groups: list[Group], parts: list[list[Group]]) -> list[Group]:
    """The groups with the prior's log-probabilities, asked for where they do not carry them."""
    if all(piece.reference_logprobs is not None for group in groups for piece in group):
        return groups
    scored = _together(parts, learner.logprobs(_flat(parts), of_reference=True))
    return [
        tuple(replace(piece, reference_logprobs=known) for piece, known in zip(group, found, strict=True))
        for group, found in zip(groups, scored, strict=True)
    ]


def _weighed(group: Group, coefficients: list[float]) -> Group:
    numbers = iter(coefficients)
    return tuple(piece if piece.continues else replace(piece, values={"coefficient": next(numbers)}) for piece in group)


def _flat(parts: list[list[Group]]) -> list[Group]:
    return [part for divided in parts for part in divided]


def _together(parts: list[list[Group]], logprobs: list[list[Floats]]) -> list[list[Floats]]:
    """Log-probabilities of the parts as those of the groups that they are of."""
    scored = iter(logprobs)
    return [[piece for _ in divided for piece in next(scored)] for divided in parts]
