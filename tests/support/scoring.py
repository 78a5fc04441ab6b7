"""What objectives' tests share: scored tokens made by hand, and steps of a real learner cut in several ways."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from support.models import make_tiny_model
from torch import Tensor

from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import Group
from llmrl.objectives.scored import Objective, ScoredTokens, Totals

Loss = Callable[[Tensor, ScoredTokens], tuple[Tensor, dict[str, Tensor]]]


def scored_of(
    groups: list[list[int]],
    *,
    reference: list[float] | None = None,
    behaviour: list[float] | None = None,
    turns: list[int] | None = None,
    weights: list[float] | None = None,
    num_groups: int | None = None,
    values: dict[str, list[float]] | None = None,
    token_values: dict[str, list[float]] | None = None,
) -> ScoredTokens:
    """Groups of sequences of these lengths; data one number a token, or (`values`, `weights`) a sequence."""
    lengths = [length for group in groups for length in group]
    counts = weights or [1.0] * len(lengths)
    tokens = sum(w * n for w, n in zip(counts, lengths, strict=True))

    def known(numbers: list[float] | None) -> Tensor | None:
        return None if numbers is None else torch.tensor(numbers)

    sequence_index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return ScoredTokens(
        sequence_index_N=sequence_index,
        turn_index_N=torch.zeros_like(sequence_index) if turns is None else torch.tensor(turns),
        group_index_S=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g) for g in groups])),
        totals=Totals(tokens, sum(counts), num_groups or len(groups)),
        reference_logprobs_N=known(reference),
        behaviour_logprobs_N=known(behaviour),
        values_S={name: torch.tensor(numbers) for name, numbers in (values or {}).items()},
        token_values_N={name: torch.tensor(numbers) for name, numbers in (token_values or {}).items()},
        weights_S=torch.tensor(counts),
    )


def run(loss: Loss, logprobs: list[float], scored: ScoredTokens) -> tuple[float, list[float], dict[str, Tensor]]:
    """The loss, its gradient with respect to the log-probabilities, and the metrics."""
    logprobs_N = torch.tensor(logprobs, requires_grad=True)
    found, metrics = loss(logprobs_N, scored)
    found.backward()
    assert logprobs_N.grad is not None
    return found.item(), logprobs_N.grad.tolist(), metrics


def tiny_learner(tokens_per_microbatch: int = 4096, form: str = "auto", **options: Any) -> Learner:
    """A fresh learner, always with the same weights; its reference is a frozen copy of them."""
    options = {"reference": "frozen", **options}
    chosen = LearnerOptions(
        learning_rate=1e-3, max_grad_norm=1e9, tokens_per_microbatch=tokens_per_microbatch, form=form, **options
    )
    return Learner(make_tiny_model(scale=1.0), chosen, Accelerator(cpu=True), say=lambda _: None)


def step_of(
    learner: Learner, groups: list[Group], objective: Objective, counts: Totals | None = None
) -> tuple[dict[str, float], Tensor]:
    """The metrics of one update, and the whole gradient that it was made with, flat."""
    taken: list[Tensor] = []
    apply = learner.backend.apply

    def spy() -> float:
        parameters = [p for p in learner.policy.parameters() if p.requires_grad]
        taken.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        )
        return apply()

    learner.backend.apply = spy
    metrics = learner.update(groups, objective, counts)
    learner.backend.apply = apply
    return metrics, taken[0]


def assert_same_step(
    first: tuple[dict[str, float], Tensor], second: tuple[dict[str, float], Tensor], tolerance: float = 1e-5
) -> None:
    """Loss, every metric of the objective, and gradient are the same but for float32's rounding."""
    own = {"num_tokens", "num_computed_tokens", "learning_rate"}
    for name in first[0].keys() - own:
        expected = second[0][name]
        assert abs(first[0][name] - expected) <= tolerance * max(1.0, abs(expected)), (name, first[0][name], expected)
    assert first[1].norm() > 0
    assert (first[1] - second[1]).norm() <= 10 * tolerance * first[1].norm()
