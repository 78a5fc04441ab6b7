"""BRAIn against numbers worked out by hand, its two passes, its limits, and the variance that its baseline saves."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.groups import branching_group
from support.scoring import assert_same_step, run, scored_of, step_of, tiny_learner
from torch import Tensor

from llmrl.learner.sequences import Group, completion, totals
from llmrl.objectives.brain import BRAIn, WeightedLikelihood, divergences, log_weights, target_scores
from llmrl.objectives.dpo import DPO
from llmrl.objectives.policy_gradient import PolicyGradient
from llmrl.objectives.scored import ScoredTokens, sums

# The page's T1: one prompt, four samples of one token.
PRIOR, PROPOSAL, POLICY = [-10.0, -12, -11, -9], [-9.5, -12.5, -11, -9.2], [-9.0, -13, -10.5, -9.4]
REWARDS = [1.0, 0.5, 2.0, -1.0]
NAN = math.nan


def scored(proposal: list[float] | None = None, rewards: list[float] | None = None) -> ScoredTokens:
    return scored_of(
        [[1] * 4],
        reference=PRIOR,
        values={"reward": rewards or REWARDS},
        token_values={"old_logprobs": proposal or PROPOSAL},
    )


def weights(proposal: list[float], policy: list[float], beta: float) -> tuple[list[float], list[float]]:
    """alpha and b of the page's prompt."""
    prior, drawn, now, rewards = (torch.tensor(x) for x in (PRIOR, proposal, policy, REWARDS))
    group = torch.zeros(4, dtype=torch.long)
    alpha = log_weights(target_scores(prior - drawn, rewards, beta), group).exp()
    return alpha.tolist(), log_weights(now - drawn, group).exp().tolist()


def coefficients(
    policy_S: Tensor, prior_S: Tensor, rewards_S: Tensor, group_S: Tensor, beta: float, estimator: str
) -> Tensor:
    """log q - log q', log p - log q' and rewards [S] -> what multiplies grad log q(y_i) in the ascent direction.

    self_normalised   alpha_i - b_i, the method's
    no_baseline       alpha_i: likelihood weighted by the posterior
    gdc               (e^u_i - e^v_i) / n, GDC++'s baseline; e^u must be a normalised density over q'
    dpg               e^u_i / n, likewise
    """

    def divided(numbers_S: Tensor) -> Tensor:
        return numbers_S / sums(numbers_S, group_S, int(group_S[-1]) + 1)[group_S]

    wanted_S, drawn_S = (prior_S + rewards_S / beta).exp(), policy_S.exp()
    share_S = divided(torch.ones_like(wanted_S))
    return {
        "self_normalised": lambda: divided(wanted_S) - divided(drawn_S),
        "no_baseline": lambda: divided(wanted_S),
        "gdc": lambda: share_S * (wanted_S - drawn_S),
        "dpg": lambda: share_S * wanted_S,
    }[estimator]()


# -- golden values -----------------------------------------------------------------------------------------------------


def test_t1() -> None:
    loss, gradient, metrics = run(BRAIn(), POLICY, scored())
    alpha, b = weights(PROPOSAL, POLICY, 1.0)
    assert alpha == pytest.approx([0.13508143, 0.22271162, 0.60539296, 0.03681398], rel=1e-5)
    assert b == pytest.approx([0.34910536, 0.12842869, 0.34910536, 0.17336059], rel=1e-5)
    assert loss == pytest.approx(0.27057249, rel=1e-5)
    assert metrics["brain/kl"].tolist() == pytest.approx([0.27057249], rel=1e-5)
    assert metrics["brain/ess"].item() == pytest.approx(2.29513947, rel=1e-5)
    assert gradient == pytest.approx([0.21402393, -0.09428294, -0.25628760, 0.13654661], rel=1e-5)
    assert -sum(a * math.log(w) for a, w in zip(alpha, b, strict=True)) == pytest.approx(1.30086292, rel=1e-5)


def test_t1_a_lower_temperature() -> None:
    loss, _, metrics = run(BRAIn(beta=0.5), POLICY, scored())
    assert weights(PROPOSAL, POLICY, 0.5)[0] == pytest.approx([0.07032657, 0.07032657, 0.856753, 0.00259387], rel=1e-5)
    assert loss == pytest.approx(0.60324089, rel=1e-5)
    assert metrics["brain/ess"].item() == pytest.approx(1.34422319, rel=1e-5)


def test_t1_samples_of_the_prior() -> None:
    alpha, b = weights(PRIOR, POLICY, 1.0)
    assert alpha == pytest.approx([0.22420782, 0.13598892, 0.60946004, 0.03034323], rel=1e-5)
    assert b == pytest.approx([0.50290101, 0.06806025, 0.30502488, 0.12401386], rel=1e-5)
    for brain in (BRAIn(proposal="prior"), BRAIn(proposal="old")):
        assert run(brain, POLICY, scored(PRIOR))[0] == pytest.approx(0.29214753, rel=1e-5)
    said = replace(scored(), behaviour_logprobs_N=torch.tensor(PRIOR))
    assert run(BRAIn(proposal="behaviour"), POLICY, said)[0] == pytest.approx(0.29214753, rel=1e-5)


def test_t1_on_policy_it_is_reinforce_with_a_softmax_advantage() -> None:
    _, gradient, _ = run(BRAIn(), POLICY, scored(POLICY))
    alpha, b = weights(POLICY, POLICY, 1.0)
    assert alpha == pytest.approx([0.09512766, 0.42633259, 0.42633259, 0.05220717], rel=1e-5)
    assert b == pytest.approx([0.25] * 4)
    assert gradient == pytest.approx([0.15487234, -0.17633259, -0.17633259, 0.19779283], rel=1e-5)
    advantages = scored_of([[1] * 4], values={"advantage": [4 * (a - 0.25) for a in alpha]})
    reinforce = PolicyGradient(ratio="none", clip="none", aggregation="sequence_mean_token_sum")
    assert run(reinforce, POLICY, advantages)[1] == pytest.approx(gradient, rel=1e-5)


def test_t2_two_samples_of_the_prior_and_a_sure_target_are_dpo_with_beta_1() -> None:
    pair = scored_of([[1, 1]], reference=[-10.0, -12.0], values={"reward": [1.0, 0.0]})
    found = run(BRAIn(beta=1e-3, proposal="prior"), [-9.0, -13.0], pair)
    expected = run(DPO(beta=1.0), [-9.0, -13.0], pair)
    assert found[0] == pytest.approx(0.12692801, rel=1e-5)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


def test_t3_without_a_preference_the_prior_stays_whatever_the_proposal() -> None:
    loss, gradient, metrics = run(BRAIn(), PRIOR, scored(rewards=[0.7] * 4))
    assert loss == pytest.approx(0, abs=1e-6)
    assert gradient == pytest.approx([0] * 4, abs=1e-6)
    assert metrics["brain/prior_log_ratio"].tolist() == [0] * 4
    # A policy that has moved is pulled back.
    assert run(BRAIn(), POLICY, scored(rewards=[0.7] * 4))[0] > 0.1


@pytest.mark.parametrize(
    ("mean", "dpg", "gdc", "brain", "pull"),
    [(0.0, 0.1250, 0.5546, 0.173, -0.77), (0.5, 0.3966, 0.3539, 0.193, -0.85), (1.0, 1.5739, 1.1989, 0.173, -0.77)],
)
def test_t4_variance_of_the_estimators(mean: float, dpg: float, gdc: float, brain: float, pull: float) -> None:
    """Target N(0, 1), policy N(1, 1), proposal N(mean, 1), eight samples; the true gradient is -1."""
    repeats = 20_000
    y = torch.randn(repeats, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).flatten() + mean
    group = torch.arange(repeats).repeat_interleave(8)
    target, policy, proposal = (-((y - m) ** 2) / 2 for m in (0.0, 1.0, mean))

    def gradients(estimator: str) -> Tensor:
        weights_S = coefficients(policy - proposal, target - proposal, torch.zeros_like(y), group, 1.0, estimator)
        return (weights_S * (y - 1)).view(repeats, 8).sum(1)

    assert gradients("self_normalised").var().item() == pytest.approx(brain, rel=0.05)
    assert gradients("self_normalised").mean().item() == pytest.approx(pull, abs=0.01)
    # What is not normalised is scattered by single huge weights where the proposal is far from the target.
    assert gradients("dpg").var().item() == pytest.approx(dpg, rel=0.4 if mean == 1 else 0.05)
    assert gradients("gdc").var().item() == pytest.approx(gdc, rel=0.05 if mean == 0.5 else 0.4)
    assert gradients("dpg").mean().item() == pytest.approx(-1, abs=0.03)
    assert gradients("gdc").mean().item() == pytest.approx(-1, abs=0.03)


# -- limits and choices ------------------------------------------------------------------------------------------------


def test_coefficients_are_the_gradient() -> None:
    policy, prior, proposal, rewards = (torch.tensor(x) for x in (POLICY, PRIOR, PROPOSAL, REWARDS))
    group = torch.zeros(4, dtype=torch.long)
    for baseline, estimator in ((True, "self_normalised"), (False, "no_baseline")):
        _, gradient, _ = run(BRAIn(beta=0.5, baseline=baseline), POLICY, scored())
        found = coefficients(policy - proposal, prior - proposal, rewards, group, 0.5, estimator)
        assert gradient == pytest.approx((-found).tolist(), rel=1e-5)


def test_without_the_baseline_likelihood_is_weighted_by_the_target() -> None:
    loss, gradient, metrics = run(BRAIn(baseline=False), POLICY, scored())
    alpha, _ = weights(PROPOSAL, POLICY, 1.0)
    assert loss == pytest.approx(-sum(a * q for a, q in zip(alpha, POLICY, strict=True)), rel=1e-5)
    assert gradient == pytest.approx([-a for a in alpha], rel=1e-5)
    assert metrics["brain/kl"].item() == pytest.approx(0.27057249, rel=1e-5)


def test_answers_are_summed_and_prompts_averaged() -> None:
    """Two prompts of two samples with two and one tokens: each a softmax of its own."""
    batch = scored_of(
        [[2, 1], [1, 2]],
        reference=[-1.0, -1, -2, -2, -1, -1],
        values={"reward": [math.log(3), 0.0, 0.0, 0.0]},
        num_groups=4,
    )
    loss, gradient, metrics = run(BRAIn(proposal="prior"), [-1.0, -1, -2, -2, -1, -1], batch)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert metrics["brain/kl"].tolist() == pytest.approx([expected, 0], abs=1e-6)
    assert loss == pytest.approx(expected / 4, rel=1e-5)
    assert gradient == pytest.approx([-0.0625, -0.0625, 0.0625, 0, 0, 0], abs=1e-6)
    assert metrics["brain/ess"].tolist() == pytest.approx([1 / (0.75**2 + 0.25**2), 2], rel=1e-5)


def test_a_sample_of_weight_two_is_that_sample_twice() -> None:
    def step(samples: list[int], counts: list[float] | None) -> tuple[float, list[float]]:
        def of(numbers: list[float]) -> list[float]:
            return [numbers[i] for i in samples]

        data = scored_of(
            [[1] * len(samples)],
            reference=of(PRIOR),
            values={"reward": of(REWARDS)},
            token_values={"old_logprobs": of(PROPOSAL)},
            weights=counts,
        )
        return run(BRAIn(), of(POLICY), data)[:2]

    loss, gradient = step([0, 1, 2, 3], [1, 2, 1, 1])
    twice, of_each = step([0, 1, 1, 2, 3], None)
    assert loss == pytest.approx(twice, rel=1e-5)
    assert gradient == pytest.approx([of_each[0], of_each[1] + of_each[2], *of_each[3:]], rel=1e-5)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, -14.1, -9.9])
@pytest.mark.parametrize("baseline", [True, False])
def test_a_sample_that_is_left_out_is_in_neither_softmax(bad: float, baseline: bool) -> None:
    brain = BRAIn(most_prior_gap=2.0, baseline=baseline)
    loss, gradient, metrics = run(brain, POLICY, scored(proposal=[-9.5, bad, -11, -9.2]))
    assert gradient[1] == 0
    assert metrics["brain/left_out"].tolist() == [0, 1, 0, 0]
    three = [0, 2, 3]
    rest = scored_of(
        [[1] * 3],
        reference=[PRIOR[i] for i in three],
        values={"reward": [REWARDS[i] for i in three]},
        token_values={"old_logprobs": [PROPOSAL[i] for i in three]},
    )
    expected = run(brain, [POLICY[i] for i in three], rest)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert [gradient[i] for i in three] == pytest.approx(expected[1], rel=1e-5)
    assert all(torch.isfinite(values).all() for values in metrics.values())


def test_a_prompt_without_usable_samples_teaches_nothing() -> None:
    for kept in ([], [-9.5]):
        proposal = [*kept, *[NAN] * (4 - len(kept))]
        loss, gradient, metrics = run(BRAIn(), POLICY, scored(proposal=proposal))
        assert (loss, gradient) == (0, [0] * 4)
        assert metrics["brain/ess"].tolist() == [1.0] * len(kept)


def test_without_the_baseline_a_single_sample_that_is_left_is_learned_by_likelihood() -> None:
    proposal = [-9.5, NAN, NAN, NAN]
    loss, gradient, metrics = run(BRAIn(baseline=False), POLICY, scored(proposal=proposal))
    assert loss == pytest.approx(-POLICY[0])
    assert gradient == [-1, 0, 0, 0]
    assert metrics["brain/ess"].tolist() == [1]


def test_weights_far_apart_stay_numbers() -> None:
    loss, gradient, _ = run(BRAIn(beta=1e-3), [-900.0, -1, -400, -1], scored(rewards=[1.0, 0, 0, 0]))
    assert math.isfinite(loss)
    assert all(math.isfinite(g) for g in gradient)


def test_gradients_by_finite_differences() -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    kept = torch.tensor([True, True, True, True, True, True, False, True])
    generator = torch.Generator().manual_seed(3)
    target = log_weights(torch.randn(8, dtype=torch.float64, generator=generator), group, kept)
    policy = torch.randn(8, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: divergences(target, log_weights(v, group, kept), group), policy)
    # The target is a constant, whatever it was made of.
    other = (target + 0.0).requires_grad_()
    assert divergences(other, target, group).requires_grad is False


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"beta": NAN},
        {"proposal": "sft"},
        {"most_prior_gap": 0.0},
        {"most_prior_gap": 5.0, "proposal": "prior"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        BRAIn(**settings)


def test_missing_data_and_single_samples_are_named() -> None:
    bare = scored_of([[1, 1]], reference=[-1.0, -1.0], values={"reward": [1.0, 0.0]})
    with pytest.raises(ValueError, match="old_logprobs"):
        run(BRAIn(), [-1.0, -1.0], bare)
    with pytest.raises(ValueError, match="behaviour_logprobs"):
        run(BRAIn(proposal="behaviour"), [-1.0, -1.0], bare)
    with pytest.raises(ValueError, match="reward"):
        run(BRAIn(proposal="prior"), [-1.0, -1.0], replace(bare, values_S={}))
    alone = scored_of([[1, 1], [1]], reference=[-1.0] * 3, values={"reward": [1.0] * 3})
    with pytest.raises(ValueError, match="group 1 has 1"):
        run(BRAIn(proposal="prior"), [-1.0] * 3, alone)
    with pytest.raises(ValueError, match="coefficient"):
        run(WeightedLikelihood(), [-1.0] * 2, bare)


# -- through a model ---------------------------------------------------------------------------------------------------


def sampled(draw: np.random.Generator) -> list[Group]:
    """Three prompts with samples, what the proposal said of them, and rewards."""
    groups: list[Group] = [branching_group(draw)[:4]]
    for count in (2, 3):
        prompt = draw.integers(0, 97, 12)
        groups.append(tuple(completion(prompt, draw.integers(0, 97, draw.integers(1, 15))) for _ in range(count)))
    learner = tiny_learner()
    return [
        tuple(
            replace(
                sample,
                values={"reward": float(draw.normal())},
                token_values={"old_logprobs": (p + 0.2 * draw.normal(size=len(p))).astype(np.float32)},
            )
            for sample, p in zip(group, parts, strict=True)
        )
        for group, parts in zip(groups, learner.logprobs(groups), strict=True)
    ]


@pytest.mark.parametrize("baseline", [True, False])
def test_micro_batches_and_the_form_of_the_forward_change_nothing(baseline: bool, draw: np.random.Generator) -> None:
    objective = BRAIn(beta=0.5, baseline=baseline).objective()
    groups = sampled(draw)
    whole = step_of(tiny_learner(), groups, objective)
    for learner in (tiny_learner(tokens_per_microbatch=40), tiny_learner(form="padded")):
        assert_same_step(step_of(learner, groups, objective), whole)


def test_two_passes_over_divided_prompts_make_the_same_gradient(draw: np.random.Generator) -> None:
    groups = sampled(draw)
    _, expected = step_of(tiny_learner(), groups, BRAIn(beta=0.5).objective())

    learner = tiny_learner(tokens_per_microbatch=30)
    samples = [(sample,) for group in groups for sample in group]
    policy, prior = (
        torch.tensor(
            [
                float((part[0] - sample.token_values["old_logprobs"]).sum())
                for (sample,), part in zip(samples, learner.logprobs(samples, of_reference=whose), strict=True)
            ]
        )
        for whose in (False, True)
    )
    rewards = torch.tensor([s.values["reward"] for (s,) in samples])
    prompt = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    found = coefficients(policy, prior, rewards, prompt, 0.5, "self_normalised")
    weighted: list[Group] = [
        (replace(s, values={"coefficient": float(c)}),) for (s,), c in zip(samples, found, strict=True)
    ]
    _, gradient = step_of(learner, weighted, WeightedLikelihood().objective(), totals(groups))
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
