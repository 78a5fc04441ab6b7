"""What online methods ask of the learner: pieces, weights, idle sequences, per-token data, a critic on the policy."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.groups import VOCABULARY
from support.models import make_tiny_model
from torch import Tensor

from llmrl.errors import RunFailedError
from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import Group, TokenSequence, totals
from llmrl.objectives.presets import preset
from llmrl.objectives.scored import Objective, Totals
from llmrl.objectives.value import ValueRegression

WHOLE = 100_000  # tokens: everything in one micro-batch
ALGORITHMS = ("loop", "loop_turn", "loop_trajectory", "gspo", "grpo", "ppo")


def build(critic: bool = False, **options: Any) -> Learner:
    given = {"reference": "precomputed", "tokens_per_microbatch": WHOLE, "value_head": critic, **options}
    learner = Learner(make_tiny_model(), LearnerOptions(**given), Accelerator(cpu=True), lambda text: None)
    if learner.policy.value_head is not None:  # it starts at zero, where nothing can flow through it
        torch.manual_seed(5)
        torch.nn.init.normal_(learner.policy.value_head.weight, std=0.5)
    return learner


def objective(algorithm: str) -> Objective:
    return preset(algorithm).policy_gradient(40, 12).objective()


def gradients(learner: Learner, groups: Sequence[Group], goal: Objective, counts: Totals | None = None) -> Any:
    """(metrics, gradients by name before clipping)."""
    apply, found = learner.backend.apply, {}

    def spied() -> float:
        found.update({n: p.grad.clone() for n, p in learner.policy.named_parameters() if p.grad is not None})
        return apply()

    learner.backend.apply = spied  # type: ignore[method-assign]
    return learner.update(list(groups), goal, counts), found


def assert_same(mine: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert mine.keys() == true.keys()
    assert max(float(gradient.abs().max()) for gradient in true.values()) > 1e-3
    for name, gradient in true.items():
        assert float((mine[name] - gradient).abs().max()) <= 2e-5 * max(float(gradient.abs().max()), 1e-6), name


def rollout(draw: np.random.Generator, prompt: np.ndarray, idle: bool = False) -> TokenSequence:
    """Two turns with the environment's words between them; every number that an objective may ask for."""
    parts = [prompt, *(draw.integers(0, VOCABULARY, draw.integers(1, 9)) for _ in range(3))]
    turn = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)])
    scored = (turn == 1) | (turn == 3)
    count = int(scored.sum())

    def numbers(mean: float, spread: float) -> np.ndarray:
        return draw.normal(mean, spread, count).astype(np.float32)

    advantage = 0.0 if idle else float(draw.normal())
    return TokenSequence(
        np.concatenate(parts),
        scored,
        turn_index=(turn == 3).astype(np.int64),
        reference_logprobs=numbers(-4, 1),
        behaviour_logprobs=numbers(-4, 1),
        token_values={
            "advantages": np.full(count, advantage, np.float32),
            "old_logprobs": numbers(-4, 1),
            "returns": numbers(0, 1),
            "old_values": numbers(0, 1),
        },
    )


def rollouts(draw: np.random.Generator, groups: int = 4, samples: int = 3) -> list[Group]:
    """Their old log-probabilities are near the policy's: far from it every ratio is clipped."""
    prompts = [draw.integers(0, VOCABULARY, draw.integers(2, 30)) for _ in range(groups)]
    made = [tuple(rollout(draw, prompt) for _ in range(samples)) for prompt in prompts]
    known = build().logprobs(made)
    return [
        tuple(
            replace(s, token_values=s.token_values | {"old_logprobs": near(draw, k)})
            for s, k in zip(g, ks, strict=True)
        )
        for g, ks in zip(made, known, strict=True)
    ]


def near(draw: np.random.Generator, logprobs: np.ndarray) -> np.ndarray:
    return (logprobs + draw.normal(0, 0.05, len(logprobs))).astype(np.float32)


def in_pieces(sequence: TokenSequence) -> Group:
    """The second turn in a piece of its own, which begins with all that the first was."""
    second = np.flatnonzero(sequence.scored & (sequence.turn_index == 1))[0]
    first = int(sequence.scored[:second].sum())
    assert sequence.turn_index is not None

    def piece(end: int, kept: np.ndarray, numbers: slice, continues: bool) -> TokenSequence:
        return replace(
            sequence,
            token_ids=sequence.token_ids[:end],
            scored=kept[:end],
            turn_index=sequence.turn_index[:end],  # type: ignore[index]
            reference_logprobs=sequence.reference_logprobs[numbers],  # type: ignore[index]
            behaviour_logprobs=sequence.behaviour_logprobs[numbers],  # type: ignore[index]
            token_values={name: values[numbers] for name, values in sequence.token_values.items()},
            continues=continues,
        )

    later = np.arange(len(sequence.token_ids)) >= second
    return (
        piece(int(second), sequence.scored, slice(first), False),
        piece(len(later), sequence.scored & later, slice(first, None), True),
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_neither_microbatches_nor_pieces_change_the_gradient(draw: np.random.Generator, algorithm: str) -> None:
    critic, goal = algorithm == "ppo", objective(algorithm)
    groups = rollouts(draw)
    cut = [tuple(piece for sequence in group for piece in in_pieces(sequence)) for group in groups]
    assert totals(cut) == totals(groups)
    metrics, whole = gradients(build(critic), groups, goal)
    others = {"one by one": (groups, 1), "in pieces": (cut, WHOLE), "pieces one by one": (cut, 1)}
    for name, (parts, budget) in others.items():
        found, mine = gradients(build(critic, tokens_per_microbatch=budget), parts, goal)
        assert_same(mine, whole)
        unlike = {key for key in metrics if found[key] != pytest.approx(metrics[key], rel=1e-4, abs=1e-6)}
        assert unlike <= {"num_tokens", "num_computed_tokens"}, name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_weight_of_three_is_three_copies(draw: np.random.Generator, algorithm: str) -> None:
    critic, goal, groups = algorithm == "ppo", objective(algorithm), rollouts(draw)
    weights = [draw.integers(1, 4, len(group)) for group in groups]
    weighed = [
        tuple(replace(piece, weight=float(w)) for s, w in zip(group, ws, strict=True) for piece in in_pieces(s))
        for group, ws in zip(groups, weights, strict=True)
    ]
    copied = [
        tuple(s for s, w in zip(group, ws, strict=True) for _ in range(w))
        for group, ws in zip(groups, weights, strict=True)
    ]
    assert totals(weighed) == totals(copied)
    by_weight, mine = gradients(build(critic, tokens_per_microbatch=60), weighed, goal)
    by_copies, true = gradients(build(critic), copied, goal)
    assert_same(mine, true)
    for name in ("loss", "policy_loss", *(["value_loss"] if critic else [])):
        assert by_weight[name] == pytest.approx(by_copies[name], rel=1e-5, abs=1e-7), name


def test_idle_sequences_left_out_change_nothing_where_the_denominators_are_kept(draw: np.random.Generator) -> None:
    groups = rollouts(draw)
    prompt = draw.integers(0, VOCABULARY, 10)
    mixed = [*groups, tuple(rollout(draw, prompt, idle=True) for _ in range(3))]
    mixed[0] = (*mixed[0], rollout(draw, mixed[0][0].token_ids[:2], idle=True))
    teaching = [tuple(s for s in group if s.token_values["advantages"].any()) for group in mixed]
    teaching = [group for group in teaching if group]
    assert [len(group) for group in teaching] == [3, 3, 3, 3]
    for algorithm in ("loop", "dr_grpo", "dapo_clip", "rloo", "cispo"):
        all_metrics, true = gradients(build(), mixed, objective(algorithm))
        metrics, mine = gradients(build(), teaching, objective(algorithm), totals(mixed))
        assert_same(mine, true)
        assert metrics["loss"] == pytest.approx(all_metrics["loss"], rel=1e-5)
        assert metrics["policy_loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert metrics["num_computed_tokens"] < all_metrics["num_computed_tokens"]
        if algorithm == "dapo_clip":  # and the counts do matter
            _, other = gradients(build(), teaching, objective(algorithm))
            with pytest.raises(AssertionError):
                assert_same(other, true)


def test_extremes_and_means_are_those_of_all_microbatches(draw: np.random.Generator) -> None:
    groups = rollouts(draw, groups=6)
    returns = np.concatenate([s.token_values["returns"] for group in groups for s in group])

    def shown(logprobs_N: Tensor, scored: Any) -> tuple[Tensor, dict[str, Tensor]]:
        values = scored.token_values_N["returns"]
        nothing = values[values > returns.max() - 1e-6]  # some micro-batches have no element of it
        return logprobs_N.sum() * 0.0, {"r/max": values, "r/min": values, "r/mean": values, "rare/min": nothing}

    for budget in (1, 60, WHOLE):
        metrics = build(tokens_per_microbatch=budget).update(groups, Objective(shown))
        assert metrics["r/max"] == returns.max()
        assert metrics["r/min"] == returns.min()
        assert metrics["r/mean"] == pytest.approx(returns.mean(), rel=1e-5)
        assert metrics["rare/min"] == returns.max()


def test_the_value_head_has_its_own_learning_rate(draw: np.random.Generator) -> None:
    """Adam's first step is as long as the learning rate, whatever the gradient."""
    learner = build(critic=True, learning_rate=1e-3, value_learning_rate=5e-2, lr_scheduler_type="constant")
    before = {name: parameter.detach().clone() for name, parameter in learner.policy.named_parameters()}
    learner.update(rollouts(draw), objective("ppo"))
    for name, parameter in learner.policy.named_parameters():
        longest = float((parameter.detach() - before[name]).abs().max())
        assert longest == pytest.approx(5e-2 if name.startswith("value_head") else 1e-3, rel=0.02), name


def test_without_value_gradient_the_critic_leaves_the_language_models_gradient_alone(draw: np.random.Generator) -> None:
    groups = rollouts(draw)
    policy_alone = preset("ppo").policy_gradient(40, 12, value_coef=0.0).objective()
    _, true = gradients(build(), groups, policy_alone)
    _, apart = gradients(build(critic=True, value_gradient=False), groups, objective("ppo"))
    assert float(apart.pop("value_head.weight").abs().max()) > 0
    assert float(apart.pop("value_head.bias").abs().max()) > 0
    assert_same(apart, true)
    _, together = gradients(build(critic=True, value_gradient=True), groups, objective("ppo"))
    with pytest.raises(AssertionError):
        assert_same({name: together[name] for name in true}, true)


def test_a_critic_alone_moves_nothing_but_its_head(draw: np.random.Generator) -> None:
    learner = build(critic=True, value_gradient=False, learning_rate=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in learner.policy.named_parameters()}
    learner.update(rollouts(draw), ValueRegression().objective())
    moved = {name for name, p in learner.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"value_head.weight", "value_head.bias"}


def test_scores_are_what_an_update_sees(draw: np.random.Generator) -> None:
    """What was asked beforehand is what the update computes, token for token."""
    learner, seen = build(critic=True), []
    groups = [tuple(piece for s in group for piece in in_pieces(s)) for group in rollouts(draw)]
    scored = learner.scores(groups)

    def spy(logprobs_N: Tensor, scored: Any) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((logprobs_N.detach(), scored.predicted_values_N.detach()))
        return logprobs_N.sum() * 0.0 + scored.predicted_values_N.sum() * 0.0, {}

    learner.update(groups, Objective(spy))
    logprobs, values = seen[0]
    np.testing.assert_allclose(np.concatenate([p.logprobs for g in scored for p in g]), logprobs.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.concatenate([p.values for g in scored for p in g]), values.numpy(), atol=1e-5)


def test_updates_that_are_not_finite_are_left_out_and_counted_until_there_are_too_many(
    draw: np.random.Generator,
) -> None:
    groups, sound = rollouts(draw), objective("loop")
    broken = Objective(lambda logprobs_N, scored: ((logprobs_N.sum() * 0).sqrt(), {}))
    learner = build(most_skipped=2)
    before = [parameter.detach().clone() for parameter in learner.policy.parameters()]
    for goal, skipped in ((broken, 1), (broken, 1)):
        metrics = learner.update(groups, goal)
        assert metrics["skipped_updates"] == skipped
        assert math.isnan(metrics["grad_norm"])
        assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))
    assert learner.update(groups, sound)["skipped_updates"] == 0  # which ends the row
    assert [learner.update(groups, broken)["skipped_updates"] for _ in range(2)] == [1, 1]
    with pytest.raises(RunFailedError, match="not finite, 3 updates in a row"):
        learner.update(groups, broken)


def test_updates_in_a_row_are_counted_on_after_a_checkpoint(draw: np.random.Generator, tmp_path: Path) -> None:
    groups = rollouts(draw)
    broken = Objective(lambda logprobs_N, scored: ((logprobs_N.sum() * 0).sqrt(), {}))
    first, second = build(most_skipped=2), build(most_skipped=2)
    for _ in range(2):
        first.update(groups, broken)
    first.save(tmp_path)
    second.load(tmp_path)
    with pytest.raises(RunFailedError, match="not finite, 3 updates in a row"):
        second.update(groups, broken)


def test_a_loss_that_is_not_finite_is_not_learned_from_although_its_gradient_is(draw: np.random.Generator) -> None:
    learner, infinite = build(most_skipped=1), Objective(lambda logprobs_N, scored: (logprobs_N.sum() + math.inf, {}))
    before = [parameter.detach().clone() for parameter in learner.policy.parameters()]
    metrics = learner.update(rollouts(draw), infinite)
    assert (metrics["skipped_updates"], metrics["loss"]) == (1, math.inf)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))
    with pytest.raises(RunFailedError, match="loss inf, gradient norm nan: not finite, 2 updates in a row"):
        learner.update(rollouts(draw), infinite)


@pytest.mark.parametrize("weights", [None, (3.0, 1.0, 2.0)])
@pytest.mark.parametrize("algorithm", ["cispo", "grpo", "pf_ppo"])
def test_the_terms_that_are_reported_add_up_to_the_loss(
    draw: np.random.Generator, algorithm: str, weights: tuple[float, ...] | None
) -> None:
    """With half the prompts left out as idle, with multiplicities, and over several micro-batches."""
    groups = rollouts(draw)
    if weights is not None:
        groups = [tuple(replace(s, weight=w) for s, w in zip(group, weights, strict=True)) for group in groups]
    settings = preset(algorithm).policy_gradient(40, 12, entropy_coef=0.2)
    learner = build(settings.value_coef > 0, tokens_per_microbatch=60)
    metrics = learner.update(groups[:2], settings.objective(), totals(groups))
    coefficients = {
        "policy_loss": 1.0, "kl_loss": settings.beta, "entropy_loss": 0.2, "value_loss": settings.value_coef,
    }  # fmt: skip
    terms = {name: coefficient * metrics[name] for name, coefficient in coefficients.items() if coefficient}
    assert all(abs(term) > 1e-4 for term in terms.values())
    assert metrics["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
