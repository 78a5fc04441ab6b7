"""CPL against numbers worked out by hand, its variants, its invariances, and DPO as its limit."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.groups import random_pairs
from support.scoring import assert_same_step, run, scored_of, step_of, tiny_learner

from llmrl.learner.sequences import Group, TokenSequence
from llmrl.objectives.cpl import CPL, VARIANTS, BehaviourCloning, comparison_losses, step_ranks
from llmrl.objectives.dpo import DPO

# Worked out by hand: P is preferred, N is not.
P, N = [-1.0, -0.5, -2.0], [-0.8, -1.2, -3.0]
P_REF, N_REF = [-1.1, -0.9, -2.2], [-0.7, -1.0, -2.5]


# -- golden values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shift", "expected"),
    [
        ({"lam": 0.5}, 0.0, 0.74439666),
        ({"lam": 1.0}, 0.0, 0.62095705),
        ({"lam": 0.5, "gamma": 0.9}, 0.0, 0.739943),
        ({"lam": 0.5}, -1.0, 0.82593942),
        ({"lam": 1.0}, -1.0, 0.62095705),
    ],
)
def test_t1(settings: dict[str, Any], shift: float, expected: float) -> None:
    loss, _, metrics = run(CPL(alpha=0.1, **settings), [p + shift for p in P + N], scored_of([[3, 3]]))
    assert loss == pytest.approx(expected, abs=1e-6)
    assert metrics["cpl_loss"].item() == loss
    if "gamma" not in settings and not shift:
        assert metrics["rewards/chosen"].item() == pytest.approx(-0.35)
        assert metrics["rewards/rejected"].item() == pytest.approx(-0.5)
        assert metrics["rewards/accuracies"].item() == 1
        assert metrics["cpl/logit_abs"].item() == pytest.approx(abs(-0.35 + settings["lam"] * 0.5))


def test_t1_scores_with_a_discount() -> None:
    scores = CPL(alpha=0.1, gamma=0.9).scores(torch.tensor(P + N), scored_of([[3, 3]]))
    assert scores.tolist() == pytest.approx([-0.307, -0.431])


def test_t2_a_tie_averages_both_directions() -> None:
    loss, _, metrics = run(CPL(), P + N, scored_of([[3, 3]], values={"label": [0.5, 0.5]}))
    assert loss == pytest.approx(0.80659463, rel=1e-6)
    assert metrics["cpl/ties"].item() == 1
    assert metrics["rewards/accuracies"].numel() == 0


def test_t3_unequal_lengths() -> None:
    loss, _, metrics = run(CPL(), P + N[:2], scored_of([[3, 2]]))
    assert loss == pytest.approx(0.825939, abs=1e-6)
    assert metrics["cpl/logit_abs"].item() == pytest.approx(0.25)


def test_t4_dense_comparisons() -> None:
    """Three scored segments of one token: A = -0.35, -0.5, -0.2."""
    scored = scored_of([[1, 1, 1]], values={"score": [1.0, 0.0, 2.0]})
    loss, _, metrics = run(CPL(comparisons="dense"), [-3.5, -5.0, -2.0], scored)
    assert loss == pytest.approx(0.70619387, rel=1e-6)
    assert metrics["rewards/accuracies"].tolist() == [1, 1, 1]
    # In the order of indices: 0 over 1, 2 over 0, 2 over 1.
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.15, 0.15, 0.3])
    pairs = [((-0.35, -0.5), 0.74439666), ((-0.2, -0.5), 0.66845965), ((-0.2, -0.35), 0.70572530)]
    for (better, worse), expected in pairs:
        found = comparison_losses(torch.tensor([better]), torch.tensor([worse]), torch.ones(1), 0.5)
        assert found.item() == pytest.approx(expected, rel=1e-6)


def test_t5_against_a_reference() -> None:
    cpl = CPL(**VARIANTS["cpl_kl"])
    assert cpl.objective().needs_reference
    loss, _, metrics = run(cpl, P + N, scored_of([[3, 3]], reference=P_REF + N_REF))
    assert metrics["rewards/chosen"].item() == pytest.approx(0.14)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.16)
    assert loss == pytest.approx(0.57157349, rel=1e-6)


def test_t6_with_behaviour_cloning() -> None:
    cpl = CPL(**VARIANTS["cpl_bc"])
    assert not cpl.objective().needs_reference
    loss, _, metrics = run(cpl, P + N, scored_of([[3, 3]]))
    assert loss == pytest.approx(2.03762371, rel=1e-6)
    assert metrics["cpl_loss"].item() == pytest.approx(0.62095705, rel=1e-6)
    assert metrics["bc_loss"].item() == pytest.approx(1.41666667)
    alone, _, _ = run(BehaviourCloning(), P + N, scored_of([[3, 3]]))
    assert alone == pytest.approx(1.41666667)


def test_the_bare_name_is_the_published_default() -> None:
    assert CPL() == CPL(**VARIANTS["cpl"])


# -- limits and invariances --------------------------------------------------------------------------------------------


def test_against_a_reference_with_lambda_1_it_is_dpo() -> None:
    scored = scored_of([[3, 3], [2, 4]], reference=P_REF + N_REF + P_REF + N_REF)
    logprobs = P + N + N + P
    expected, found = run(DPO(beta=0.3), logprobs, scored), run(CPL(0.3, 1.0, reference=True), logprobs, scored)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert found[2][name].tolist() == pytest.approx(expected[2][name].tolist(), rel=1e-6)


def test_the_bias_scales_the_other_side_alone() -> None:
    _, gradient, _ = run(CPL(0.1, 0.5), P + N, scored_of([[3, 3]]))
    slope = -0.1 / (1 + math.exp(-0.10))  # the logit is -0.10
    assert gradient == pytest.approx([slope] * 3 + [-0.5 * slope] * 3, rel=1e-5)


def test_the_second_may_be_the_preferred_one() -> None:
    labelled = scored_of([[3, 3]], values={"label": [1.0, 1.0]})
    found, expected = run(CPL(), N + P, labelled), run(CPL(), P + N, scored_of([[3, 3]]))
    assert found[0] == expected[0]
    assert found[1] == expected[1][3:] + expected[1][:3]
    assert {k: v.tolist() for k, v in found[2].items()} == {k: v.tolist() for k, v in expected[2].items()}


def test_dense_comparisons_of_two_are_a_pair_and_equal_scores_a_tie() -> None:
    for scores, label in (([2.0, 1.0], 0.0), ([1.0, 2.0], 1.0), ([1.0, 1.0], 0.5)):
        dense = run(CPL(comparisons="dense"), P + N, scored_of([[3, 3]], values={"score": scores}))
        pair = run(CPL(), P + N, scored_of([[3, 3]], values={"label": [label, label]}))
        assert dense[:2] == pair[:2]


def test_groups_count_alike_whatever_their_number_of_pairs() -> None:
    scored = scored_of([[1, 1, 1], [1, 1]], values={"score": [1.0, 0.0, 2.0, 1.0, 0.0]})
    loss, _, _ = run(CPL(comparisons="dense"), [-3.5, -5.0, -2.0, -3.5, -5.0], scored)
    assert loss == pytest.approx((0.70619387 + 0.74439666) / 2, rel=1e-6)


def test_steps_are_counted_inside_a_segment() -> None:
    scored = scored_of([[3, 4]], turns=[2, 2, 5, 0, 1, 1, 3])
    tokens, turns = step_ranks(scored, "token"), step_ranks(scored, "turn")
    assert [part.tolist() for part in tokens] == [[0, 1, 2, 0, 1, 2, 3], [3, 4]]
    assert [part.tolist() for part in turns] == [[0, 0, 1, 0, 1, 1, 2], [2, 3]]


def test_turns_as_steps() -> None:
    """A turn's log-probability is the sum of its tokens'; the second turn is discounted once."""
    scored = scored_of([[3, 3]], turns=[0, 0, 1, 0, 1, 1])
    discounted = CPL(alpha=1.0, gamma=0.9, step="turn").scores(torch.tensor(P + N), scored)
    assert discounted.tolist() == pytest.approx([-1.5 - 1.8, -0.8 - 0.9 * 4.2])
    means = CPL(alpha=1.0, step="turn", mean_per_step=True).scores(torch.tensor(P + N), scored)
    assert means.tolist() == pytest.approx([-3.5 / 2, -5.0 / 2])
    assert run(CPL(step="turn"), P + N, scored)[:2] == run(CPL(step="token"), P + N, scored)[:2]


def test_a_mean_a_step_is_a_sum_with_a_smaller_alpha_where_lengths_are_equal() -> None:
    found = run(CPL(0.3, 0.7, mean_per_step=True), P + N, scored_of([[3, 3]]))
    expected = run(CPL(0.1, 0.7), P + N, scored_of([[3, 3]]))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize(
    ("label", "expected"), [(0.0, 3.5 / 3), (1.0, 5.0 / 3), (0.5, 8.5 / 6)], ids=["first", "second", "tie"]
)
def test_cloning_of_the_preferred_side(label: float, expected: float) -> None:
    cpl = CPL(lam=1.0, bc_coef=2.0, bc_on="preferred")
    loss, _, metrics = run(cpl, P + N, scored_of([[3, 3]], values={"label": [label, label]}))
    assert metrics["bc_loss"].item() == pytest.approx(expected)
    assert loss == pytest.approx(metrics["cpl_loss"].item() + 2 * expected)


def test_cloning_is_a_mean_over_steps_then_over_segments() -> None:
    scored = scored_of([[3, 1]], turns=[0, 0, 1, 0])
    assert run(BehaviourCloning(), [*P, -4.0], scored)[0] == pytest.approx((3.5 / 3 + 4) / 2)
    assert run(BehaviourCloning("turn"), [*P, -4.0], scored)[0] == pytest.approx((3.5 / 2 + 4) / 2)


def test_raising_both_likelihoods_lowers_the_loss_only_with_the_bias() -> None:
    for lam, falls in ((0.5, True), (1.0, False)):
        _, gradient, _ = run(CPL(0.1, lam), P + N, scored_of([[3, 3]]))
        assert (sum(gradient) < -1e-3) == falls
        assert falls or abs(sum(gradient)) < 1e-8


def test_gradients_by_finite_differences() -> None:
    scores = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([0.0, 0.5, 1.0, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: comparison_losses(a, b, labels, 0.6), scores)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"lam": 0.0},
        {"lam": 1.5},
        {"gamma": 1.1},
        {"gamma": math.nan},
        {"bc_coef": -1.0},
        {"step": "word"},
        {"bc_on": "chosen"},
        {"comparisons": "all"},
        {"bc_on": "preferred", "comparisons": "dense"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CPL(**settings)


def test_groups_of_another_kind_and_missing_scores_are_named() -> None:
    with pytest.raises(ValueError, match="group 1 has 3"):
        run(CPL(), [-1.0] * 5, scored_of([[1, 1], [1, 1, 1]]))
    with pytest.raises(ValueError, match="group 0 has 1"):
        run(CPL(comparisons="dense"), [-1.0], scored_of([[1]], values={"score": [1.0]}))
    with pytest.raises(ValueError, match="score"):
        run(CPL(comparisons="dense"), P, scored_of([[1, 1, 1]]))


# -- through a model ---------------------------------------------------------------------------------------------------


def segments(draw: np.random.Generator, dense: bool) -> list[Group]:
    """Segments that start in the middle of different dialogues, of several turns with observations between them."""

    def segment(values: dict[str, float]) -> TokenSequence:
        length = int(draw.integers(12, 30))
        scored = draw.random(length) < 0.6
        scored[: int(draw.integers(1, 6))] = False
        scored[-1] = True
        turn = np.cumsum(np.r_[True, np.diff(scored.astype(int)) == 1]) - 1
        return TokenSequence(draw.integers(0, 97, length), scored, turn_index=turn, values=values)

    if dense:
        return [tuple(segment({"score": float(draw.integers(0, 3))}) for _ in range(n)) for n in (2, 4, 3)]
    return [(segment({"label": y}), segment({"label": y})) for y in (0.0, 1.0, 0.5, 0.0, 1.0)]


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"gamma": 0.9, "step": "turn", "bc_coef": 0.5, "bc_on": "preferred"}, False),
        ({"reference": True, "lam": 0.75, "mean_per_step": True, "bc_coef": 0.5}, False),
        ({"comparisons": "dense", "alpha": 0.05}, True),
    ],
    ids=["turns", "reference", "dense"],
)
def test_micro_batches_and_the_form_of_the_forward_change_nothing(
    settings: dict[str, Any], dense: bool, draw: np.random.Generator
) -> None:
    objective = CPL(**settings).objective()
    groups = segments(draw, dense)
    whole = step_of(tiny_learner(), groups, objective)
    for learner in (tiny_learner(tokens_per_microbatch=60), tiny_learner(form="padded")):
        assert_same_step(step_of(learner, groups, objective), whole)


def test_ordinary_pairs_need_no_labels(draw: np.random.Generator) -> None:
    pairs = random_pairs(draw, 3)
    labelled = [tuple(replace(s, values={"label": 0.0}) for s in pair) for pair in pairs]
    objective = CPL(alpha=0.01).objective()
    assert_same_step(step_of(tiny_learner(), pairs, objective), step_of(tiny_learner(), labelled, objective))
