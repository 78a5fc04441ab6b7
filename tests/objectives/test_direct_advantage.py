"""Direct Advantage against numbers worked out by hand, its exact minimiser, and REINFORCE as its beginning."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.scoring import assert_same_step, run, scored_of, step_of, tiny_learner
from torch import Tensor

from llmrl.learner.sequences import Group, TokenSequence
from llmrl.objectives.direct_advantage import (
    Bin,
    DirectAdvantage,
    SuccessRateCritic,
    reliability,
    spread,
    step_advantages,
    step_losses,
)
from llmrl.objectives.policy_gradient import PolicyGradient

# The page's T2: three actions of one state, the first with three tokens.
ADVANTAGES, LOG_RATIOS = [0.25, -0.05, -0.45], [0.5, -0.1, -0.3]
LOGPROBS, REFERENCE = [-0.2, -1.0, -0.1, -1.1, -1.3], [-0.3, -1.4, -0.1, -1.0, -1.0]


def state(advantages: list[float] | None = None) -> Any:
    return scored_of([[3, 1, 1]], reference=REFERENCE, values={"advantage": advantages or ADVANTAGES})


# -- golden values -----------------------------------------------------------------------------------------------------


def test_t1_advantages_with_a_duplicate() -> None:
    found = step_advantages([0.8, 0.8, 0.5, 0.1], ["a", "a", "b", "c"])
    assert found == pytest.approx({"a": 0.25, "b": -0.05, "c": -0.45})
    assert spread(found) == pytest.approx(0.7)
    assert list(found) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("beta", "rows", "mean"), [(0.1, [2.0, 0.08, 8.82], 3.63333333), (0.01, [300.125, 12.005, 999.045], 437.05833333)]
)
def test_t2_loss_and_gradient(beta: float, rows: list[float], mean: float) -> None:
    losses = step_losses(torch.tensor(LOG_RATIOS), torch.tensor(ADVANTAGES), beta)
    assert losses.tolist() == pytest.approx(rows, rel=1e-5)
    loss, gradient, metrics = run(DirectAdvantage(beta), LOGPROBS, state())
    assert metrics["step/log_ratio"].tolist() == pytest.approx(LOG_RATIOS, abs=1e-6)
    assert loss == pytest.approx(mean, rel=1e-5)
    slopes = [-(a / beta - u) / 3 for a, u in zip(ADVANTAGES, LOG_RATIOS, strict=True)]
    assert gradient == pytest.approx([slopes[0]] * 3 + slopes[1:], rel=1e-5)
    assert metrics["step/agreement"].tolist() == [1, 1, 1]
    assert metrics["step/target_abs"].tolist() == pytest.approx([abs(a) / beta for a in ADVANTAGES], rel=1e-5)


@pytest.mark.parametrize(
    ("logit", "expected"),
    [
        (math.log(0.75 / 0.25), 0.56233514),
        (0.0, 0.69314718),
        (math.log(0.9 / 0.1), 0.65466666),
        (0.4, 0.61301525),
    ],
)
def test_t3_critic(logit: float, expected: float) -> None:
    scored = scored_of([[1]], token_values={"success_rate": [12 / 16]})
    values = torch.tensor([logit], requires_grad=True)
    loss, metrics = SuccessRateCritic()(torch.tensor([-1.0], requires_grad=True), scored.with_scores(None, values))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert values.grad is not None
    v = 1 / (1 + math.exp(-logit))
    assert values.grad.item() == pytest.approx(v - 0.75, abs=1e-6)
    assert metrics["critic/brier"].item() == pytest.approx((v - 0.75) ** 2, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "policy", "tolerance"),
    [(1.0, [0.57875, 0.27860, 0.14265], 1e-5), (0.1, [0.8153, 0.1750, 0.0097], 5e-5)],
)
def test_t4_exact_minimiser(beta: float, policy: list[float], tolerance: float) -> None:
    """Three actions with advantages .3, 0, -.3 and uniform nu: targets are not hit, pi is no softmax tilt."""
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    advantages = torch.tensor([0.3, 0.0, -0.3], dtype=torch.float64)
    logits = reference.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = step_losses(logits.log_softmax(0) - reference.log(), advantages, beta).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = logits.detach().softmax(0)
    assert found.tolist() == pytest.approx(policy, abs=tolerance)
    if beta == 1:
        u = (found / reference).log()
        assert u.tolist() == pytest.approx([0.14626, -0.07401, -0.33790], abs=1e-5)
        assert closure().item() == pytest.approx(0.00509170, abs=1e-8)
        # One multiplier for the state: u = A / beta - lambda pi / nu.
        multipliers = (advantages / beta - u) / (found * 3)
        assert multipliers.tolist() == pytest.approx([0.08855] * 3, abs=1e-5)
    else:
        assert (found * advantages).sum().item() == pytest.approx(0.2417, abs=1e-4)


# -- limits and choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["state", "action"])
def test_at_the_reference_its_gradient_is_reinforce_with_a_over_beta(average: Any) -> None:
    _, gradient, _ = run(DirectAdvantage(0.05, average), REFERENCE, state())
    reinforce = PolicyGradient(ratio="none", clip="none", aggregation="sequence_mean_token_sum")
    expected = run(reinforce, REFERENCE, state([a / 0.05 for a in ADVANTAGES]))[1]
    assert gradient == pytest.approx(expected, rel=1e-5)


def test_what_counts_alike() -> None:
    """A state with one action and one with three, all u = 0, A / beta = 1 and 2."""
    scored = scored_of([[1], [1, 1, 1]], reference=[0.0] * 4, values={"advantage": [0.1, 0.2, 0.2, 0.2]})
    assert run(DirectAdvantage(0.1, "state"), [0.0] * 4, scored)[0] == pytest.approx((0.5 + 2.0) / 2)
    assert run(DirectAdvantage(0.1, "action"), [0.0] * 4, scored)[0] == pytest.approx((0.5 + 3 * 2.0) / 4)


def test_a_row_of_weight_two_is_that_row_twice() -> None:
    for average in ("state", "action"):
        actor = DirectAdvantage(0.1, average)
        weighted = scored_of([[1, 1]], reference=[0.0, 0.0], values={"advantage": [0.1, 0.3]}, weights=[2.0, 1.0])
        twice = scored_of([[1, 1, 1]], reference=[0.0] * 3, values={"advantage": [0.1, 0.1, 0.3]})
        assert run(actor, [-0.5, 0.0], weighted)[0] == pytest.approx(run(actor, [-0.5, -0.5, 0.0], twice)[0])


def test_the_sum_over_the_step_is_squared_not_each_token() -> None:
    loss, gradient, _ = run(
        DirectAdvantage(1.0), [-1.0, -1.0], scored_of([[2]], reference=[-2.0, -0.5], values={"advantage": [0.5]})
    )
    assert loss == 0
    assert gradient == [0, 0]


def test_equal_actions_with_different_outcomes_count_as_their_mean() -> None:
    found = step_advantages([1.0, 0.0, 0.5], [(5, 2), (5, 2), (6,)])
    assert found == pytest.approx({(5, 2): 0.0, (6,): 0.0})
    with pytest.raises(ValueError, match="2 values for 1"):
        step_advantages([1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="0 values"):
        step_advantages([], [])


def test_reliability() -> None:
    found = reliability([0.1, 0.3, 0.9, 1.0], [0.0, 0.5, 1.0, 0.5], num_bins=2)
    assert found.bins == [Bin(2, pytest.approx(0.2), 0.25), Bin(2, pytest.approx(0.95), 0.75)]
    assert found.error == pytest.approx((0.05 + 0.20) / 2)
    assert found.brier == pytest.approx((0.01 + 0.04 + 0.01 + 0.25) / 4)
    assert found.brier_of_mean == pytest.approx((0.25 + 0 + 0.25 + 0) / 4)
    with pytest.raises(ValueError, match="1 predictions for 0"):
        reliability([0.5], [])


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    log_ratios, advantages, logits = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(3))
    assert torch.autograd.gradcheck(lambda u: step_losses(u, advantages, 0.05), log_ratios.requires_grad_())

    rates = [0.0, 0.25, 0.75, 1.0]
    scored = scored_of([[2], [1, 1]], token_values={"success_rate": rates}, weights=[2.0, 1.0, 3.0])

    def critic(values_N: Tensor) -> Tensor:
        return SuccessRateCritic()(torch.zeros(4), scored.with_scores(None, values_N))[0]

    values = logits.float().requires_grad_()
    critic(values).backward()
    assert values.grad is not None
    for found, step in zip(values.grad, 1e-2 * torch.eye(4), strict=True):  # in single precision, as the critic is
        slope = (critic(values + step) - critic(values - step)) / 2e-2
        assert found.item() == pytest.approx(slope.item(), abs=1e-4)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": math.nan}, {"average": "token"}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DirectAdvantage(**settings)


def test_missing_data_are_named() -> None:
    with pytest.raises(ValueError, match="advantage"):
        run(DirectAdvantage(), [0.0], scored_of([[1]], reference=[0.0]))
    with pytest.raises(ValueError, match="value head"):
        run(SuccessRateCritic(), [0.0], scored_of([[1]], token_values={"success_rate": [1.0]}))
    with pytest.raises(ValueError, match="success_rate"):
        run(SuccessRateCritic(), [0.0], scored_of([[1]]).with_scores(None, torch.zeros(1)))


# -- through a model ---------------------------------------------------------------------------------------------------


def states(draw: np.random.Generator) -> list[Group]:
    """States of several lengths, each with its actions; only an action's tokens are scored."""
    groups = []
    for count in (3, 1, 4, 2):
        prefix, rows = draw.integers(0, 97, draw.integers(8, 25)), []
        for _ in range(count):
            step = draw.integers(0, 97, draw.integers(1, 8))
            ids = np.concatenate([prefix, step])
            rows.append(
                TokenSequence(ids, np.arange(len(ids)) >= len(prefix), values={"advantage": float(draw.normal()) / 4})
            )
        groups.append(tuple(rows))
    return groups


@pytest.mark.parametrize("average", ["state", "action"])
def test_micro_batches_and_the_form_of_the_forward_change_nothing(average: Any, draw: np.random.Generator) -> None:
    objective = DirectAdvantage(0.1, average).objective()
    groups = states(draw)
    whole = step_of(tiny_learner(), groups, objective)
    for learner in (tiny_learner(tokens_per_microbatch=40), tiny_learner(form="padded")):
        assert_same_step(step_of(learner, groups, objective), whole)


def test_advantages_are_learned(draw: np.random.Generator) -> None:
    objective, groups = DirectAdvantage(0.5).objective(), states(draw)
    learner = tiny_learner(lr_scheduler_type="constant")
    found = [learner.update(groups, objective) for _ in range(30)]
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    assert found[-1]["step/agreement"] > 0.8


def critic_rows(draw: np.random.Generator) -> tuple[list[Group], list[Group]]:
    """The same states twice: all of an answer in one sequence, and each by itself with one more token behind it."""
    together: list[Group] = []
    apart: list[Group] = []
    for _ in range(3):
        ids = draw.integers(0, 97, 30)
        ends = np.sort(draw.choice(np.arange(5, 30), 3, replace=False))
        rates = (draw.integers(0, 17, 3) / 16).astype(np.float32)
        scored = np.isin(np.arange(30), ends)
        together.append((TokenSequence(ids, scored, token_values={"success_rate": rates}),))
        for end, rate in zip(ends, rates, strict=True):
            last = np.arange(end + 1) == end
            closed = np.concatenate([ids[:end], [2]])
            apart.append((TokenSequence(closed, last, token_values={"success_rate": np.array([rate], np.float32)}),))
    return together, apart


def test_a_critic_speaks_at_a_states_last_token_however_it_is_packed(draw: np.random.Generator) -> None:
    """What stands behind the state is not seen; the head must have moved for that to show."""
    objective = SuccessRateCritic().objective()
    together, apart = critic_rows(draw)

    def moved(**options: Any) -> Any:
        learner = tiny_learner(value_head=True, **options)
        with torch.no_grad():
            learner.policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        return learner

    whole = step_of(moved(), together, objective)
    for learner, groups in (
        (moved(tokens_per_microbatch=40), together),
        (moved(form="padded"), together),
        (moved(), apart),
        (moved(tokens_per_microbatch=25), apart),
    ):
        assert_same_step(step_of(learner, groups, objective), whole)


def test_a_critic_learns_rates(draw: np.random.Generator) -> None:
    together, _ = critic_rows(draw)
    learner = tiny_learner(value_head=True, lr_scheduler_type="constant", value_learning_rate=1e-2)
    found = [learner.update(together, SuccessRateCritic().objective()) for _ in range(30)]
    assert found[0]["critic_loss"] == pytest.approx(math.log(2))
    assert found[-1]["critic/brier"] < 0.3 * found[0]["critic/brier"]


def test_rows_may_come_in_any_groups_when_rows_count_alike(draw: np.random.Generator) -> None:
    groups = states(draw)
    objective = DirectAdvantage(0.1, "action").objective()
    alone: list[Group] = [(replace(row),) for group in groups for row in group]
    assert_same_step(step_of(tiny_learner(), alone, objective), step_of(tiny_learner(), groups, objective))
