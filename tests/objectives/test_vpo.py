"""VPO against numbers worked out by hand, its identity with the value, its direction, and DPO as its limit."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.groups import random_pairs
from support.scoring import assert_same_step, run, scored_of, step_of, tiny_learner
from torch import Tensor

from llmrl.learner.sequences import Group, completion
from llmrl.objectives.dpo import DPO
from llmrl.objectives.scored import ScoredTokens
from llmrl.objectives.vpo import VPO, alpha_of_round, calibration_terms

# Worked out by hand, one token a sequence: chosen, rejected and a calibration answer of two prompts.
LOGPROBS, REFERENCE = [-10.0, -9, -20, -12, -15, -25], [-11, -8.5, -21, -12.5, -12, -24.5]
PAIRS, PAIRS_REFERENCE = [-10.0, -9, -12, -15], [-11, -8.5, -12.5, -12]


def with_samples() -> ScoredTokens:
    return scored_of([[1, 1, 1], [1, 1, 1]], reference=REFERENCE)


def pairs() -> ScoredTokens:
    return scored_of([[1, 1], [1, 1]], reference=PAIRS_REFERENCE)


# -- golden values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("incentive", "expected"), [("optimism", 0.58966960), ("pessimism", 0.56466960)])
def test_t1_with_samples_of_a_calibration_distribution(incentive: Any, expected: float) -> None:
    vpo = VPO(beta=0.1, alpha=0.5, incentive=incentive, calibration="samples")
    loss, _, metrics = run(vpo, LOGPROBS, with_samples())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["preference_loss"].item() == pytest.approx(0.57716960, rel=1e-6)
    assert (metrics["preference_loss"] + metrics["calibration_loss"]).item() == pytest.approx(loss)
    assert metrics["calibration/log_ratio"].tolist() == pytest.approx([1.0, -0.5])
    assert metrics["rewards/chosen"].tolist() == pytest.approx([0.1, 0.05])
    assert metrics["rewards/rejected"].tolist() == pytest.approx([-0.05, -0.3])


def test_t1_as_a_sum_over_pairs() -> None:
    loss, _, _ = run(VPO(0.1, 0.5 / 2, "optimism", "samples"), LOGPROBS, with_samples())
    assert 2 * loss == pytest.approx(1.16683920, rel=1e-6)


def test_t1_chosen_answers_calibrate() -> None:
    loss, gradient, _ = run(VPO(0.1, 0.5, "pessimism", "chosen"), PAIRS, pairs())
    assert loss == pytest.approx(0.53966960, rel=1e-6)
    assert [gradient[0], gradient[2]] == pytest.approx([-0.04812851, -0.04566912], rel=1e-5)


def test_t2_the_calibration_term_is_the_value_of_the_optimal_policy() -> None:
    """J*(r) = -beta E_cal R for the policy that is optimal for a calibrated r; its samples stand in for pi_cal."""
    reference, r0, beta = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 0.0, -0.5]), 0.5
    for cal, value in ([(2, 3, 5), 0.75158851], [(5, 3, 2), 0.30158851]):
        shares = torch.tensor(cal) / 10
        r = r0 - (shares * r0).sum()
        policy = torch.softmax(reference.log() + r / beta, 0)
        assert value == pytest.approx(
            ((policy * r).sum() - beta * (policy * (policy / reference).log()).sum()).item(), rel=1e-6
        )
        drawn = [0, 1, *(a for a, count in enumerate(cal) for _ in range(count))]
        scored = scored_of([[1] * 12], reference=reference.log()[drawn].tolist())
        _, _, metrics = run(VPO(beta, 2.0, "optimism", "samples"), policy.log()[drawn].tolist(), scored)
        assert metrics["calibration_loss"].item() == pytest.approx(-2.0 * value, rel=1e-5)
    assert policy.tolist() == pytest.approx([0.90816953, 0.07374443, 0.01808604], rel=1e-5)
    assert beta * (reference * (reference / policy).log()).sum().item() == pytest.approx(0.30158851, rel=1e-5)


def descend(alpha: float, incentive: Any, calibration: tuple[int, ...], steps: int, size: float) -> list[float]:
    """Three actions, uniform start and reference, y0 beats y1 three times out of four."""
    groups = [(0, 1, *calibration)] * 3 + [(1, 0, *calibration)]
    actions = torch.tensor([a for group in groups for a in group])
    scored = scored_of([[1] * len(g) for g in groups], reference=[-math.log(3)] * len(actions))
    vpo = VPO(1.0, alpha, incentive, "samples")
    logits = torch.zeros(3, requires_grad=True)
    for _ in range(steps):
        loss, _ = vpo(logits.log_softmax(0)[actions], scored)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - size * gradient).detach().requires_grad_()
    return logits.softmax(0).tolist()


def test_t3_pessimism_stays_inside_and_optimism_runs_away() -> None:
    # The ends do not depend on the way: few steps, and larger ones where there is far to go.
    assert descend(0.0, "optimism", (2,), 60, 1) == pytest.approx([0.5234, 0.1745, 0.3022], abs=1e-4)
    assert descend(0.05, "pessimism", (0, 1, 2, 2), 300, 2) == pytest.approx([0.372, 0.128, 0.5], abs=1e-3)
    assert descend(0.5, "pessimism", (0, 1, 2, 2), 60, 1) == pytest.approx([0.35, 0.15, 0.5], abs=1e-3)
    assert descend(0.05, "optimism", (0, 1, 2, 2), 500, 2) == pytest.approx([0.763, 0.237, 0.0], abs=1e-3)
    assert descend(0.1, "optimism", (0, 1), 300, 2)[2] > 0.99  # the action that nobody has tried


# -- limits, signs, guards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["chosen", "pair"])
def test_without_an_incentive_it_is_dpo(calibration: Any) -> None:
    expected = run(DPO(beta=0.1), PAIRS, pairs())
    found = run(VPO(0.1, 0.0, "optimism", calibration), PAIRS, pairs())
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert found[2][name].tolist() == expected[2][name].tolist()


def test_pessimism_on_chosen_answers_is_rpo_on_whole_answers() -> None:
    """`rpo_alpha` is of a token's mean: with one token an answer, alpha beta of R but for the reference's constant."""
    expected = run(DPO(beta=0.1, rpo_alpha=0.05), PAIRS, pairs())
    found = run(VPO(0.1, 0.5, "pessimism", "chosen"), PAIRS, pairs())
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize(("incentive", "sign"), [("optimism", 1), ("pessimism", -1)])
def test_a_step_on_the_calibration_term_moves_it_the_right_way(incentive: Any, sign: int) -> None:
    _, gradient, _ = run(VPO(0.1, 0.5, incentive, "samples"), LOGPROBS, with_samples())
    assert [gradient[2], gradient[5]] == pytest.approx([sign * 0.5 * 0.1 / 2] * 2)


def test_prompts_count_alike_whatever_their_number_of_calibration_answers() -> None:
    scored = scored_of([[1, 1, 2], [1, 1, 1, 1]], reference=[0.0] * 8)
    logprobs = [0.0, 0, -1, -2, 0, 0, -1, -5]
    loss, gradient, metrics = run(VPO(0.5, 1.0, "optimism", "samples"), logprobs, scored)
    assert loss - math.log(2) == pytest.approx(0.5 * (-3 - 3) / 2)
    assert gradient[2:4] + gradient[6:] == pytest.approx([0.25, 0.25, 0.125, 0.125])
    assert metrics["calibration/log_ratio_min"].min().item() == -5


def test_both_answers_of_the_pair_calibrate() -> None:
    _, _, metrics = run(VPO(0.1, 0.5, "optimism", "pair"), PAIRS, pairs())
    assert metrics["calibration/log_ratio"].tolist() == pytest.approx([0.25, -1.25])


def test_an_answer_below_the_floor_no_longer_pulls() -> None:
    vpo = VPO(0.1, 0.5, "optimism", "samples", calibration_floor=-0.4)
    loss, gradient, metrics = run(vpo, LOGPROBS, with_samples())
    assert loss == pytest.approx(0.57716960 + 0.05 * (1 - 0.4) / 2, rel=1e-6)
    assert gradient[5] == 0
    assert gradient[2] == pytest.approx(0.025)
    assert metrics["calibration/floored"].tolist() == [0, 1]
    assert metrics["calibration/log_ratio"].tolist() == pytest.approx([1.0, -0.5])  # reported as it is


def test_gradients_by_finite_differences() -> None:
    index, ratios = torch.tensor([0, 0, 1, 2, 2, 2]), torch.randn(6, dtype=torch.float64, requires_grad=True)

    def terms(ratios_C: Tensor) -> Tensor:
        return calibration_terms(ratios_C, index, 3, "pessimism")

    assert torch.autograd.gradcheck(terms, ratios)


def test_alpha_falls_with_the_rounds() -> None:
    assert [alpha_of_round(0.5, k) for k in (1, 4)] == [0.5, 0.5]
    assert [alpha_of_round(0.5, k, "inverse_sqrt") for k in (1, 4)] == [0.5, 0.25]
    with pytest.raises(ValueError, match="from 1"):
        alpha_of_round(0.5, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"alpha": -0.1},
        {"alpha": math.nan},
        {"incentive": "optimist"},
        {"calibration": "rejected"},
        {"calibration_floor": 1.0, "incentive": "optimism"},
        {"calibration_floor": -20.0},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        VPO(**settings)


@pytest.mark.parametrize(("calibration", "sizes"), [("samples", [3, 2]), ("chosen", [2, 3]), ("pair", [2, 1])])
def test_groups_of_another_kind_are_named(calibration: Any, sizes: list[int]) -> None:
    scored = scored_of([[1] * size for size in sizes], reference=[0.0] * sum(sizes))
    with pytest.raises(ValueError, match=f"group 1 has {sizes[1]}"):
        VPO(calibration=calibration)(torch.zeros(sum(sizes)), scored)


# -- through a model ---------------------------------------------------------------------------------------------------


def groups_with_samples(draw: np.random.Generator) -> list[Group]:
    """Pairs with 1, 2, ... calibration answers to the same prompts."""
    groups = []
    for number, (chosen, rejected) in enumerate(random_pairs(draw, 4), 1):
        prompt = chosen.token_ids[~chosen.scored]
        samples = [completion(prompt, draw.integers(0, 97, draw.integers(1, 9))) for _ in range(number)]
        groups.append((chosen, rejected, *samples))
    return groups


@pytest.mark.parametrize("incentive", ["optimism", "pessimism"])
def test_micro_batches_and_the_form_of_the_forward_change_nothing(incentive: Any, draw: np.random.Generator) -> None:
    objective = VPO(0.5, 0.5, incentive, "samples").objective()
    groups = groups_with_samples(draw)
    whole = step_of(tiny_learner(), groups, objective)
    assert whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for learner in (tiny_learner(tokens_per_microbatch=60), tiny_learner(form="padded")):
        assert_same_step(step_of(learner, groups, objective), whole)


def test_a_floor_that_is_not_reached_and_a_reference_known_before_change_nothing(draw: np.random.Generator) -> None:
    groups = groups_with_samples(draw)
    learner = tiny_learner(reference="precomputed")
    known = [
        tuple(replace(s, reference_logprobs=p) for s, p in zip(group, parts, strict=True))
        for group, parts in zip(groups, learner.logprobs(groups), strict=True)
    ]
    found = step_of(learner, known, VPO(0.5, 0.5, "optimism", "samples", calibration_floor=-20).objective())
    expected = step_of(tiny_learner(), groups, VPO(0.5, 0.5, "optimism", "samples").objective())
    assert found[0].pop("calibration/floored") == 0
    assert_same_step(found, expected)
