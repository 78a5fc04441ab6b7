"""Policy filtration against the page's numbers, enumeration of every draw, and its properties."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrl.objectives.advantages import whiten
from llmrl.objectives.filtration import (
    STRATEGIES,
    bootstrap_r_squared,
    filtration_metrics,
    multiplicities,
    rank_weights,
    ranking,
    reward_edges,
    reward_fit,
)

REWARDS, GROUP = torch.tensor([0.6, -0.2, 0.6, -0.9, 0.1]), torch.zeros(5, dtype=torch.long)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(found: Tensor, expected: list[float], tolerance: float = 1e-7) -> None:
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("none", [0.2] * 5),
        ("best", [1, 0, 0, 0, 0]),
        ("best_random", [0.5, 0.125, 0.125, 0.125, 0.125]),
        ("best_worst", [0.5, 0, 0, 0.5, 0]),
        ("power", [0.22784810, 0.025316456, 0.22784810, 0.51265823, 0.0063291139]),
    ],
)
def test_weights_golden(strategy: Any, expected: list[float]) -> None:
    near(rank_weights(REWARDS, GROUP, strategy), expected)


def test_ranks_are_within_a_prompt_and_power_over_the_whole_step() -> None:
    rewards, group = torch.tensor([0.9, 0.5, 0.1, -0.1, -0.5, -0.7]), torch.tensor([0, 0, 0, 1, 1, 1])
    near(rank_weights(rewards, group, "best_worst"), [0.5, 0, 0.5, 0.5, 0, 0.5])
    expected = [0.44505495, 0.13736264, 0.0054945055, 0.0054945055, 0.13736264, 0.26923077]
    near(rank_weights(rewards, group, "power"), expected)
    near(rank_weights(rewards + 1, group, "power")[:2], [0.43917275, 0.27372263])


@pytest.mark.parametrize(
    ("strategy", "responses", "expected"),
    [
        ("best", 5, [0.03125, 0.29643, 0.67232]),
        ("best_random", 5, [0.32421875, 0.29866125, 0.37712]),
        ("best_worst", 5, [0.5, 0.16368, 0.33632]),
        ("best_random", 2, [0.5, 0.3, 0.2]),
        ("best_worst", 2, [0.5, 0.3, 0.2]),
    ],
)
def test_the_filtered_policy_by_enumeration(strategy: Any, responses: int, expected: list[float]) -> None:
    policy, law = [0.5, 0.3, 0.2], torch.zeros(3, dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=responses):
        drawn = torch.tensor(draw)
        weights = rank_weights(drawn.double(), torch.zeros_like(drawn), strategy)
        law += math.prod(policy[i] for i in draw) * torch.zeros(3).double().index_add(0, drawn, weights)
    near(law, expected, 1e-9)


def test_ties_are_broken_at_random_but_repeatably() -> None:
    tied = torch.zeros(4)
    firsts = [int(ranking(tied, GROUP[:4], seeded(s)).best_S.nonzero()) for s in range(40)]
    assert set(firsts) == {0, 1, 2, 3}
    assert [int(ranking(tied, GROUP[:4], seeded(s)).best_S.nonzero()) for s in range(40)] == firsts
    assert {int(ranking(REWARDS, GROUP, seeded(s)).best_S.nonzero()) for s in range(20)} == {0, 2}
    assert {int(ranking(REWARDS, GROUP, seeded(s)).worst_S.nonzero()) for s in range(20)} == {3}


def test_the_pair_has_the_mean_composition_of_its_law() -> None:
    total = torch.zeros(5, dtype=torch.float64)
    for seed in range(2000):
        counts = multiplicities(REWARDS, GROUP, "best_random", seeded(seed))
        assert counts.sum() == 2
        assert counts[[0, 2]].sum() >= 1
        total += counts
    # One of the tied best rows is the best, the other one of four others.
    near(total / 2000 / 2, [0.3125, 0.125, 0.3125, 0.125, 0.125], 0.02)


def test_the_pair_of_best_and_worst() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(200) // 5
    rewards = torch.rand(200, generator=generator)
    counts = multiplicities(rewards, group, "best_worst", seeded())
    for g in range(40):
        mine = rewards[group == g]
        assert counts[group == g].nonzero()[:, 0].tolist() == sorted([int(mine.argmax()), int(mine.argmin())])
    best = multiplicities(rewards, group, "best", seeded())
    assert int(best.sum()) == 40
    assert bool((best <= counts).all())


@pytest.mark.parametrize("strategy", ["none", "best_worst", "best_random"])
def test_two_responses_are_no_filtering(strategy: Any) -> None:
    rewards, group = torch.tensor([1.0, 0.5, 0.3, 0.3, 2.0]), torch.tensor([0, 0, 1, 1, 2])
    assert multiplicities(rewards, group, strategy, seeded()).tolist() == [1] * 5
    near(rank_weights(rewards, group, strategy), [0.5, 0.5, 0.5, 0.5, 1])


def test_equal_rewards_give_two_different_rows() -> None:
    for strategy in ("best_worst", "best_random"):
        counts = multiplicities(torch.zeros(5), GROUP, strategy, seeded())
        assert sorted(counts.tolist()) == [0, 0, 0, 1, 1]


def test_power_draws_by_its_law() -> None:
    rewards, group = torch.tensor([1.0, 0.5, 0.0, -1.0] * 50), torch.arange(200) // 4
    counts = multiplicities(rewards, group, "power", seeded(), rows_per_group=40).double()
    assert counts.sum() == 2000
    assert counts[2::4].sum() == 0
    near(counts.view(50, 4).sum(0) / 2000, [1 / 2.25, 0.25 / 2.25, 0, 1 / 2.25], 0.04)
    assert multiplicities(torch.zeros(4), GROUP[:4], "power", seeded()).sum() == 2


def test_independent_draws_repeat_rows() -> None:
    """What the fixed pair avoids: ten draws over four equal rows leave 4 (1 - .75^10) = 3.7747459 distinct ones."""
    expected = 4 * (1 - 0.75**10)
    assert expected == pytest.approx(3.7747459)
    found = [
        int((multiplicities(torch.ones(4), GROUP[:4], "power", seeded(s), rows_per_group=10) > 0).sum())
        for s in range(1500)
    ]
    assert sum(found) / 1500 == pytest.approx(expected, abs=0.04)


def test_whitening_before_filtering_leaves_the_best_a_gradient() -> None:
    advantages = torch.tensor([1, 0.4, 0.1, -0.3, -1.2])
    best = rank_weights(advantages, GROUP, "best") > 0
    near(whiten(advantages, unbiased=False)[best], [1.3608276], 1e-6)
    assert whiten(advantages[best], unbiased=False).tolist() == [0]


# -- R^2: three prompts of three responses (R, s) --------------------------------------------------------------------

FIT_REWARDS = torch.tensor([0.8, 0.3, -0.6, 0.5, 0.1, -0.2, 0.9, 0.4, -0.9])
FIT_CORRECT = torch.tensor([1, 0, 0, 1, 1, 0.5, 0.5, 1, 0])
FIT_GROUP, EDGES = torch.arange(9) // 3, torch.tensor([-0.5, 0.2, 0.6])


@pytest.mark.parametrize(
    ("strategy", "grouped", "ungrouped"),
    [
        ("none", 0.70176224, 0.39691000),
        ("best_random", 0.71282051, 0.36940306),
        ("best_worst", 0.78641228, 0.68332365),
        ("power", 0.78336044, 0.63278053),
        ("best", 1.0, 0.48076923),
    ],
)
def test_r_squared_golden(strategy: Any, grouped: float, ungrouped: float) -> None:
    weights = rank_weights(FIT_REWARDS, FIT_GROUP, strategy)
    binned = reward_fit(FIT_REWARDS, FIT_CORRECT, weights, EDGES)
    assert binned.r_squared == pytest.approx(grouped, abs=1e-6)
    assert reward_fit(FIT_REWARDS, FIT_CORRECT, weights).r_squared == pytest.approx(ungrouped, abs=1e-6)
    assert binned.points == (2 if strategy == "best" else 4)


def test_a_perfect_r_squared_with_the_wrong_sign() -> None:
    weights = rank_weights(FIT_REWARDS, FIT_GROUP, "best")
    fit = reward_fit(FIT_REWARDS, FIT_CORRECT, weights, EDGES)
    assert fit.slope is not None
    assert fit.slope < 0
    assert reward_fit(FIT_REWARDS, FIT_CORRECT, weights).slope == pytest.approx(-0.96153846, abs=1e-6)


def test_r_squared_is_not_defined_for_one_point_or_equal_scores() -> None:
    assert reward_fit(FIT_REWARDS, FIT_CORRECT, edges=torch.tensor([5.0])).r_squared is None
    flat = reward_fit(FIT_REWARDS, torch.ones(9))
    assert (flat.r_squared, flat.slope) == (None, 0.0)
    assert reward_fit(torch.ones(9), FIT_CORRECT).slope is None


def test_edges_hold_every_reward() -> None:
    edges = reward_edges(FIT_REWARDS, intervals=20)
    assert len(edges) == 19
    assert set(torch.bucketize(FIT_REWARDS.double(), edges)[[6, 8]].tolist()) == {0, 19}


def test_bootstrap_interval_holds_the_estimate() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(300, generator=generator)
    correct = (torch.rand(300, generator=generator) < rewards).double()
    group, edges = torch.arange(300) // 5, reward_edges(rewards, 8)
    weights = rank_weights(rewards, group, "best_worst")
    estimate = reward_fit(rewards, correct, weights, edges).r_squared
    interval = bootstrap_r_squared(rewards, correct, weights, group, edges, seeded())
    assert interval is not None
    assert estimate is not None
    assert interval[0] < estimate < interval[1]
    edges = torch.tensor([0.5])
    assert bootstrap_r_squared(torch.ones(4), torch.ones(4), torch.ones(4), GROUP[:4], edges, seeded()) is None


def test_metrics_tell_the_policy_from_what_was_kept() -> None:
    rewards, group = torch.tensor([1.0, 0, 0.5, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    metrics = filtration_metrics(rewards, group, torch.tensor([1, 1, 0, 2, 0, 0]))
    assert filtration_metrics(rewards, 3 * group + 1, torch.tensor([1, 1, 0, 2, 0, 0])) == metrics  # some are absent
    assert metrics == {
        "filtration/rows_mean": 2,
        "filtration/distinct_rows_mean": 1.5,
        "filtration/frac_groups_equal": 0.5,
        "filtration/reward": 1.25,
    }


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "power"])
def test_laws_sum_to_one_over_each_group(strategy: Any) -> None:
    group = torch.repeat_interleave(torch.arange(5), torch.tensor([1, 2, 3, 5, 8]))
    rewards = torch.randn(19, generator=seeded())
    sums = torch.zeros(5, dtype=torch.float64).index_add(0, group, rank_weights(rewards, group, strategy, seeded()))
    near(sums, [1] * 5, 1e-12)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        ranking(torch.tensor([1.0, math.nan]), GROUP[:2])
    with pytest.raises(ValueError, match="best_worst"):
        rank_weights(REWARDS, GROUP, "bw")  # type: ignore[arg-type]
