"""The policy-gradient family against numbers worked out by hand, finite differences, and what must not matter."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.models import make_tiny_model
from torch import Tensor

from llmrl.learner.learner import Learner
from llmrl.learner.options import LearnerOptions
from llmrl.learner.sequences import TokenSequence, completion
from llmrl.objectives.policy_gradient import PolicyGradient, kl_estimates
from llmrl.objectives.presets import PRESETS, preset
from llmrl.objectives.scored import ScoredTokens, Totals
from llmrl.objectives.value import ValueRegression, value_losses

NAN, INF = math.nan, math.inf


def scored_of(
    lengths: list[int],
    turns: list[int] | None = None,
    weights: list[float] | None = None,
    dtype: torch.dtype = torch.float32,
    **data: Any,
) -> ScoredTokens:
    """Sequences of these lengths in one group; `data` by name, one number a token or a sequence."""
    sequence_index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    counts = weights or [1.0] * len(lengths)
    named = {name: torch.tensor(numbers, dtype=dtype) for name, numbers in data.items()}
    return ScoredTokens(
        sequence_index_N=sequence_index,
        turn_index_N=torch.zeros_like(sequence_index) if turns is None else torch.tensor(turns),
        group_index_S=torch.zeros(len(lengths), dtype=torch.long),
        totals=Totals(sum(w * n for w, n in zip(counts, lengths, strict=True)), sum(counts), 1),
        reference_logprobs_N=named.pop("reference", None),
        behaviour_logprobs_N=named.pop("behaviour", None),
        entropies_N=named.pop("entropies", None),
        values_S={"advantage": named.pop("advantage")} if "advantage" in named else {},
        token_values_N=named,
        weights_S=torch.tensor(counts),
    )


def run(
    settings: PolicyGradient, logprobs: list[float], scored: ScoredTokens
) -> tuple[float, list[float], dict[str, Tensor]]:
    """The loss, its gradient and the metrics."""
    logprobs_N = torch.tensor(logprobs, requires_grad=True)
    loss, metrics = settings(logprobs_N, scored)
    loss.backward()
    assert logprobs_N.grad is not None
    return loss.item(), logprobs_N.grad.tolist(), metrics


def near(found: Any, expected: list[float] | float, tolerance: float = 2e-7) -> None:
    assert found == pytest.approx(expected, abs=tolerance)


# -- LOOP's page, T2-T5: two rollouts; an observation (its tokens are not scored) lies before x1's third action token --

LOOP_NEW = [-0.8, -0.65, -1.7, -0.9, -1.17]
LOOP_DATA: dict[str, Any] = {"old_logprobs": [-1, -0.5, -2, -0.7, -1.2], "advantage": [2 / 3, -2 / 3]}


def loop_scored() -> ScoredTokens:
    return scored_of([3, 2], turns=[0, 0, 1, 0, 1], **LOOP_DATA)


@pytest.mark.parametrize(
    ("name", "loss", "gradient"),
    [
        ("loop", -0.018336242, [0, -0.09563422, 0, 0, 0.17174242]),
        ("loop_code", -0.01682109, [0, -0.09563422, 0, 0, 0.17174242]),
        ("loop_turn", -0.03680276, [-0.17521185, -0.17521185, 0, 0, 0.17174242]),
        ("loop_trajectory", -0.066666667, [0, 0, 0, 0, 0]),
    ],
)
def test_loop_golden(name: str, loss: float, gradient: list[float]) -> None:
    found, found_gradient, metrics = run(preset(name).policy_gradient(), LOOP_NEW, loop_scored())
    near(found, loss)
    near(found_gradient, gradient)
    near(metrics["log_ratio/sequence"].mean().item(), 0.09)


def test_loop_wrongly_as_a_global_token_mean_is_another_number() -> None:
    settings = preset("loop").policy_gradient(aggregation="token_mean")
    near(run(settings, LOOP_NEW, loop_scored())[0], -0.15070046)


def test_first_update_by_trajectory_is_the_sum_of_log_probabilities() -> None:
    scored = scored_of([3], advantage=[2 / 3])
    near(run(preset("loop").policy_gradient(), [-1, -2, -0.5], scored)[1], [-0.22222222] * 3)
    near(run(preset("loop_trajectory").policy_gradient(), [-1, -2, -0.5], scored)[1], [-0.66666667] * 3)
    near(run(preset("rloo").policy_gradient(), [-1, -2, -0.5], scored)[1], [-0.66666667] * 3)
    near(run(preset("reinforce").policy_gradient(), [-1, -2, -0.5], scored)[1], [-0.66666667] * 3)


def test_without_clipping_token_loop_is_reinforce_on_the_mean_log_probability() -> None:
    settings = preset("loop").policy_gradient(ratio="none", clip="none")
    near(run(settings, [-1, -2, -0.4], scored_of([3], advantage=[0.5]))[0], 0.5 * 3.4 / 3)


def test_a_short_mini_batch_makes_a_smaller_step() -> None:
    # Rollout losses [.4, -.2, .1, .3 | .5] in mini-batches of four: .15, then .5 / 4.
    settings = preset("loop").policy_gradient(sequences_per_update=4, ratio="none", clip="none")
    assert settings.sequences_divisor == 4
    near(run(settings, [-0.4, 0.2, -0.1, -0.3], scored_of([1] * 4, advantage=[1.0] * 4))[0], 0.15)
    near(run(settings, [-0.5], scored_of([1], advantage=[1.0]))[0], 0.125)


# -- PPO: LOOP's page T9, T10; RLSP's T4 -------------------------------------------------------------------------------

T7_ADVANTAGES = [0.55855062, 0.5037375, 0.73025, 0.295]
T7_WHITENED = [0.20436758, -0.10114699, 1.1613767, -1.2645973]


@pytest.mark.parametrize(
    ("advantages", "loss", "gradient"),
    [
        (T7_ADVANTAGES, -0.4963533, [0, -0.11979248, -0.13524563, -0.07375]),
        (T7_WHITENED, 0.063800293, [0, 0.024053498, -0.21509226, 0.31614933]),
    ],
)
def test_ppo_policy_term(advantages: list[float], loss: float, gradient: list[float]) -> None:
    scored = scored_of([4], old_logprobs=[-1, -0.5, -2, -0.3], advantages=advantages)
    found, found_gradient, metrics = run(PolicyGradient(), [-0.8, -0.55, -2.3, -0.3], scored)
    near(found, loss)
    near(found_gradient, gradient)
    near(metrics["policy_loss"].item(), loss)


def test_ppo_value_term() -> None:
    returns = torch.tensor([0.95855062, 1.0037375, 1.03025, 0.995])
    old, new = torch.tensor([0.4, 0.5, 0.3, 0.7]), torch.tensor([0.5, 0.9, 0.25, 0.6], requires_grad=True)
    near(value_losses(new, returns).mean().item(), 0.12323065)
    loss = value_losses(new, returns, old, 0.2).mean()
    near(loss.item(), 0.13341753)
    loss.backward()
    assert new.grad is not None
    near(new.grad.tolist(), [-0.11463766, 0, -0.1950625, -0.09875])


def test_value_loss_beside_the_policy_and_alone() -> None:
    returns, old = [0.95855062, 1.0037375, 1.03025, 0.995], [0.4, 0.5, 0.3, 0.7]
    values = torch.tensor([0.5, 0.9, 0.25, 0.6], requires_grad=True)
    scored = scored_of([4], advantages=[0.0] * 4, returns=returns, old_values=old).with_scores(None, values)
    found, _, metrics = run(PolicyGradient(value_coef=0.1), [-1.0] * 4, scored)
    near(found, 0.1 * 0.13341753)
    near(metrics["value_loss"].item(), 0.13341753)
    loss, alone = ValueRegression()(torch.full((4,), -1.0), scored)
    near([loss.item(), alone["value_loss"].item()], [0.13341753] * 2)
    with pytest.raises(ValueError, match="value head"):
        run(PolicyGradient(value_coef=0.1), [-1.0] * 4, replace(scored, predicted_values_N=None))


def test_rlsp_golden() -> None:
    scored = scored_of([3, 1], old_logprobs=[-0.5, -1, -0.2, -0.9], advantages=[0.5, 0.5, -0.4, 1.0])
    new = [-0.3, -1.3, -0.2, -0.4]
    found, gradient, _ = run(PolicyGradient(), new, scored)
    near(found, -0.44260228)
    near(gradient, [0, -0.09260228, 0.1, 0])
    old_N, advantages_N = scored.token_values_N["old_logprobs"], scored.token_values_N["advantages"]
    ratio_N = (torch.tensor(new) - old_N).exp()
    near(PolicyGradient().surrogate(torch.tensor(new), ratio_N, advantages_N).tolist(), [-0.6, -0.37040911, 0.4, -1.2])
    near(run(PolicyGradient(aggregation="sequence_mean_token_mean"), new, scored)[0], -0.69506819)
    for returned, loss, slope in ((0.3, 0.02, 0.2), (0.6, 0.045, 0.0)):
        value = torch.tensor([0.5], requires_grad=True)
        found_loss = value_losses(value, torch.tensor([returned]), torch.tensor([0.1]), 0.2).sum()
        found_loss.backward()
        near(found_loss.item(), loss)
        assert value.grad is not None
        near(value.grad.item(), slope)


# -- PF-PPO's page, T5: multiplicities ---------------------------------------------------------------------------------


def pf_ppo_scored(weights: list[float]) -> ScoredTokens:
    old = [-1, -0.5, -0.7, -0.3, -1.2, -0.9]
    return scored_of([2, 1, 3], weights=weights, old_logprobs=old, advantage=[0.8, 0.3, -0.6])


PF_PPO_NEW = [-0.9, -0.7, -0.4, -0.2, -0.9, -1.3]


def test_pf_ppo_golden() -> None:
    rows = PolicyGradient(aggregation="sequence_mean_token_mean")
    found, gradient, _ = run(rows, PF_PPO_NEW, pf_ppo_scored([2, 0, 1]))
    near(found, -0.29603846)
    near(gradient, [-0.29471224, -0.21832820, 0, 0.073678061, 0.089990587, 0])
    found, gradient, _ = run(PolicyGradient(), PF_PPO_NEW, pf_ppo_scored([2, 0, 1]))
    near(found, -0.16074641)
    near(gradient, [-0.25261050, -0.18713846, 0, 0.094728936, 0.11570218, 0])
    near(run(rows, PF_PPO_NEW, pf_ppo_scored([1, 0, 1]))[0], -0.059277362)


def test_a_multiplicity_is_the_row_written_twice() -> None:
    old = [-1, -0.5, -1, -0.5, -0.3, -1.2, -0.9]
    twice = scored_of([2, 2, 3], old_logprobs=old, advantage=[0.8, 0.8, -0.6])
    new = [-0.9, -0.7, -0.9, -0.7, -0.2, -0.9, -1.3]
    for name in ("ppo", "loop", "loop_turn", "dr_grpo", "reinforce", "gspo"):
        settings = preset(name).policy_gradient(max_completion_length=8, value_coef=0.0, beta=0.0)
        written, gradient, _ = run(settings, new, twice)
        weighed, half_gradient, _ = run(settings, PF_PPO_NEW, pf_ppo_scored([2, 0, 1]))
        near(weighed, written)
        near(half_gradient[:2], [gradient[0] + gradient[2], gradient[1] + gradient[3]])


# -- ByteDance's DAPO page, section 3 ----------------------------------------------------------------------------------

LOG_RATIOS = [0.30, -0.10, 0.05]


def token_losses(settings: PolicyGradient, advantage: float, new: list[float], old: list[float]) -> list[float]:
    """A token's loss is that of its sequence where it alone has an advantage, times the number of tokens."""
    places = range(len(new))
    alone = [[advantage * (place == other) for other in places] for place in places]
    return [
        run(settings, new, scored_of([len(new)], old_logprobs=old, advantages=only))[0] * len(new) for only in alone
    ]


def test_clipping_golden() -> None:
    old, new = [-2.0] * 3, [-2.0 + r for r in LOG_RATIOS]
    higher = preset("dapo_clip").policy_gradient()
    near(token_losses(PolicyGradient(), 1.0, new, old), [-1.2, -0.904837, -1.051271], 1e-6)
    near(token_losses(higher, 1.0, new, old), [-1.28, -0.904837, -1.051271], 1e-6)
    for settings in (PolicyGradient(), higher):
        near(token_losses(settings, -1.0, new, old), [1.349859, 0.904837, 1.051271], 1e-6)
    gspo = preset("gspo").policy_gradient()
    near(token_losses(gspo, 1.0, new, old), [-1.0004] * 3, 1e-6)
    near(token_losses(gspo, -1.0, new, old), [1.08690405] * 3, 1e-6)
    dual = PolicyGradient(dual_clip=1.3)
    near(token_losses(dual, -1.0, new, old), [1.3, 0.904837, 1.051271], 1e-6)
    near(token_losses(dual, 1.0, new, old), [-1.2, -0.904837, -1.051271], 1e-6)


def test_cispo_golden_and_that_no_token_is_dropped() -> None:
    new = [-0.5, -1.2, -2.0]
    old = [n - r for n, r in zip(new, LOG_RATIOS, strict=True)]
    band = PolicyGradient(clip="cispo", clip_low=0.2, clip_high=0.28)
    near(token_losses(band, 1.0, new, old), [0.64, 1.08580490, 2.10254219], 1e-6)
    cap = preset("cispo").policy_gradient()
    assert cap.band == (0.0, 5.0)
    near(token_losses(cap, 1.0, new, old), [0.67492940, 1.08580490, 2.10254219], 1e-6)
    _, gradient, _ = run(band, new, scored_of([3], old_logprobs=old, advantage=[1.0]))
    near(gradient, [-1.28 / 3, -0.90483742 / 3, -1.05127110 / 3])


def test_aggregations() -> None:
    scored = scored_of([2, 4], advantage=[1.0, 1.0])
    for aggregation, expected in (
        ("token_mean", 0.0),
        ("sequence_mean_token_mean", -0.25),
        ("sequence_sum_constant", 0),
    ):
        length = 8 if aggregation == "sequence_sum_constant" else None
        settings = PolicyGradient("none", "none", aggregation=aggregation, length_divisor=length)  # type: ignore[arg-type]
        near(run(settings, [1, 1] + [-0.5] * 4, scored)[0], expected)
    near(run(replace(settings, length_divisor=4), [1, 1] + [-0.5] * 2 + [0] * 2, scored)[0], (-2 + 1) / (2 * 4))


def test_kl_estimates() -> None:
    policy, reference = torch.tensor([-1.0]), torch.tensor([-0.8])
    near(kl_estimates(policy, reference, "k3").item(), 0.02140276)
    near(kl_estimates(policy, reference, "k2").item(), 0.02)
    near(kl_estimates(policy, reference, "k1").item(), -0.2)
    scored = scored_of([1, 1], advantage=[0.0, 0.0], reference=[-0.8, -1.0])
    found, gradient, metrics = run(preset("grpo").policy_gradient(), [-1.0, -1.0], scored)
    near(found, 0.04 * 0.02140276 / 2)
    near(gradient, [0.04 * (1 - math.exp(0.2)) / 2, 0])
    near(metrics["kl"].mean().item(), 0.02140276 / 2)


def test_kl_times_ratio_has_the_gradient_of_the_kl() -> None:
    # d/dx E_pi[...] at pi = pi_old: the estimate's own derivative (1 - e^d) plus the ratio's k3; together -d for k3.
    scored = scored_of([1], advantage=[0.0], reference=[-0.8])
    settings = preset("grpo").policy_gradient(kl_by_ratio=True, beta=1.0)
    near(run(settings, [-1.0], scored)[1], [-0.2])


def test_the_reported_terms_add_up_to_the_loss() -> None:
    """Also where rows count several times, and where more rows belong to the step than are computed."""
    scored = scored_of(
        [2, 1], old_logprobs=[-1, -0.5, -2], advantages=[1.0, 1.0, -0.5], reference=[-1.2, -0.4, -1.5],
        returns=[0.5, 1.0, 0.2], old_values=[0.4, 0.5, 0.3], entropies=[1.0, 0.5, 0.3],
    )  # fmt: skip
    scored = replace(scored, weights_S=torch.tensor([3.0, 1.0]), totals=Totals(20, 9, 4))
    scored = scored.with_scores(scored.entropies_N, torch.tensor([0.1, 0.9, 0.6]))
    for aggregation in ("token_mean", "sequence_mean_token_mean"):
        settings = PolicyGradient(beta=0.3, entropy_coef=0.2, value_coef=0.5, aggregation=aggregation)
        loss, _, metrics = run(settings, [-0.8, -0.9, -2.1], scored)
        terms = [metrics[name].item() for name in ("policy_loss", "kl_loss", "entropy_loss", "value_loss")]
        assert all(abs(term) > 1e-3 for term in terms)
        near(loss, sum(weight * term for weight, term in zip((1, 0.3, 0.2, 0.5), terms, strict=True)))
        assert all(metrics[name].ndim == 0 for name in metrics if name.endswith("_loss"))  # shares, which are added
    near(terms[2], -(3 * 1.0 + 3 * 0.5 + 0.3) / 20)


def test_entropy_bonus() -> None:
    scored = scored_of([1, 3], advantage=[0.0, 0.0], entropies=[1.0, 0.5, 0.3, 0.2])
    found, _, metrics = run(
        PolicyGradient(entropy_coef=0.1, aggregation="sequence_mean_token_mean"), [-1.0] * 4, scored
    )
    near(found, -0.1 * 0.5)
    near(metrics["entropy"].mean().item(), 0.5)
    assert PolicyGradient(entropy_coef=0.1).objective().needs_entropy
    assert not PolicyGradient().objective().needs_entropy


# -- the sampler's mismatch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"correction": "none"}, [1, 1, 1]),
        ({"correction": "truncate", "correction_cap": 2.0}, [2.0, 0.5, 1.5]),
        ({"correction": "truncate", "correction_cap": 2.0, "correction_floor": 0.8}, [2.0, 0.8, 1.5]),
        ({"correction": "mask", "correction_cap": 2.0}, [0, 0.5, 1.5]),
        ({"correction": "mask", "correction_cap": 2.0, "correction_floor": 0.8}, [0, 0, 1.5]),
        # The first sequence's two ratios, 4 and 0.5: product 2, geometric mean sqrt 2.
        ({"correction": "truncate", "correction_cap": 1.8, "correction_level": "sequence"}, [1.8, 1.8, 1.5]),
        ({"correction": "mask", "correction_cap": 1.8, "correction_level": "sequence"}, [0, 0, 1.5]),
        ({"correction": "mask", "correction_cap": 1.8, "correction_level": "geometric"}, [2**0.5, 2**0.5, 1.5]),
    ],
)
def test_sampler_correction(settings: dict[str, Any], weights: list[float]) -> None:
    old = [-1.0, -1.0, -1.0]
    behaviour = [-1 - math.log(4), -1 - math.log(0.5), -1 - math.log(1.5)]
    data: dict[str, Any] = {"behaviour": behaviour, "advantage": [1.0, -0.5]}
    for known in ({"old_logprobs": old}, {}):
        found, gradient, metrics = run(PolicyGradient(**settings), old, scored_of([2, 1], **(data | known)))
        near(gradient, [-weights[0] / 3, -weights[1] / 3, 0.5 * weights[2] / 3], 1e-6)
        near(found, sum(gradient))
        near(metrics["sampling/sampling_logp_difference/max"].max().item(), math.log(4), 1e-6)
        near(metrics["sampling/sampling_logp_difference/mean"].mean().item(), math.log(4 * 2 * 1.5) / 3, 1e-6)
    if settings["correction"] != "none":
        near(metrics["sampling/importance_sampling_ratio/max"].max().item(), max(weights), 1e-6)
        near(metrics["sampling/importance_sampling_ratio/min"].min().item(), min(weights), 1e-6)


@pytest.mark.parametrize("bad", [NAN, -INF, INF])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("which", ["behaviour", "old_logprobs"])
@pytest.mark.parametrize("name", ["ppo", "grpo", "loop_trajectory", "gspo", "cispo", "reinforce"])
def test_tokens_without_a_finite_log_probability_are_left_out(bad: float, level: str, which: str, name: str) -> None:
    data: dict[str, Any] = {
        "behaviour": [-1.0, -1.1, -1.2, -0.9],
        "old_logprobs": [-1.0, -1.05, -1.2, -0.9],
        "reference": [-1.0, -1.05, -1.3, -0.9],
        "advantage": [1.0, -0.5],
    }
    settings = preset(name).policy_gradient(correction="mask", correction_level=level, value_coef=0.0)
    clean = {**data, which: [-1.0, -1.1, -1.2, -0.9]}
    data[which] = [-1.0, bad, -1.2, -0.9]
    found, gradient, metrics = run(settings, [-1.0, -1.0, -1.1, -0.95], scored_of([3, 1], **data))
    assert math.isfinite(found)
    assert gradient[1] == 0
    assert all(math.isfinite(g) for g in gradient)
    assert all(torch.isfinite(m).all() for m in metrics.values())
    near(metrics["sampling/nonfinite"].sum().item(), 1)
    _, whole, _ = run(settings, [-1.0, -1.0, -1.1, -0.95], scored_of([3, 1], **clean))
    near(gradient[3], whole[3])  # another sequence's token does not feel it: no denominator moved


def test_a_micro_batch_of_nothing_usable_is_zero() -> None:
    found, gradient, _ = run(PolicyGradient(), [-1.0], scored_of([1], behaviour=[NAN], advantage=[1.0]))
    assert (found, gradient) == (0, [0])


def test_a_ratio_beyond_all_bounds_stays_a_number() -> None:
    for name in ("loop", "loop_trajectory", "rloo", "gspo", "cispo", "ppo"):
        settings = preset(name).policy_gradient(value_coef=0.0)
        scored = scored_of([2, 1], old_logprobs=[-1.0, -900.0, -900.0], advantage=[1.0, -1.0])
        found, gradient, metrics = run(settings, [-950.0, -1.0, -1.0], scored)
        assert math.isfinite(found)
        assert all(math.isfinite(g) for g in gradient)
        assert all(torch.isfinite(m).all() for m in metrics.values())


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_clip_metrics_count_what_lost_its_gradient() -> None:
    scored = scored_of([3, 2], old_logprobs=[-2.0] * 5, advantage=[1.0, -1.0])
    new = [-2 + r for r in (0.3, -0.3, 0.0, 0.3, -0.3)]
    _, gradient, metrics = run(PolicyGradient(), new, scored)
    assert [g == 0 for g in gradient] == [True, False, False, False, True]
    assert metrics["clip_ratio/high_mean"].tolist() == [1, 0, 0, 0, 0]
    assert metrics["clip_ratio/low_mean"].tolist() == [0, 0, 0, 0, 1]
    assert metrics["clip_ratio/region_mean"].tolist() == [1, 0, 0, 0, 1]
    near(metrics["clip_ratio/high_max"].tolist(), [1 / 3, 0])
    near(metrics["clip_ratio/low_min"].tolist(), [0, 0.5])
    near(metrics["approx_kl"].tolist(), [math.exp(r) - 1 - r for r in (0.3, -0.3, 0.0, 0.3, -0.3)], 1e-6)
    # A sequence's ratio counts once, however long the sequence.
    _, _, metrics = run(PolicyGradient(ratio="sequence"), [-1.5, -2, -2, -2, -2.5], scored)
    assert metrics["clip_ratio/region_mean"].tolist() == [1, 1]
    near(metrics["ratio/mean"].tolist(), [math.exp(0.5), math.exp(-0.5)], 1e-6)


def test_first_update_has_ratio_one_exactly() -> None:
    logprobs = [-0.1234567, -7.654321, -0.3333333]
    for name in PRESETS:
        scored = scored_of([2, 1], advantage=[1.0, -1.0], reference=logprobs)
        settings = preset(name).policy_gradient(max_completion_length=4, value_coef=0.0)
        _, _, metrics = run(settings, logprobs, scored)
        assert name == "reinforce" or (metrics["ratio/mean"] == 1).all()
        assert (metrics["log_ratio/sequence"] == 0).all()


# -- properties --------------------------------------------------------------------------------------------------------


def random_step(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ScoredTokens]:
    """Five sequences of a whole step: ratios well inside and well outside of every band, never at its edge."""
    generator = torch.Generator().manual_seed(5)
    lengths = [3, 1, 4, 2, 5]
    num = sum(lengths)

    def numbers(scale: float, count: int = num) -> list[float]:
        return (scale * torch.randn(count, generator=generator, dtype=torch.float64)).tolist()

    old = [-abs(x) - 0.1 for x in numbers(1.0)]
    scored = scored_of(
        lengths,
        turns=[0, 0, 1, 0, 0, 1, 2, 2, 0, 1, 0, 1, 1, 1, 2],
        weights=[1, 2, 1, 0.5, 3],
        dtype=dtype,
        old_logprobs=old,
        advantages=numbers(1.0),
        behaviour=[o + d for o, d in zip(old, numbers(0.3), strict=True)],
        reference=[o + d for o, d in zip(old, numbers(0.3), strict=True)],
        returns=numbers(1.0),
        old_values=numbers(1.0),
    )
    logprobs = torch.tensor([o + d for o, d in zip(old, numbers(0.4), strict=True)], dtype=dtype)
    return logprobs, scored


def settings_of(name: str, **own: Any) -> PolicyGradient:
    extra = {"entropy_coef": 0.01, "correction": "truncate", "correction_level": "sequence", **own}
    return preset(name).policy_gradient(max_completion_length=8, sequences_per_update=5, **extra)


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_by_finite_differences(name: str) -> None:
    logprobs, scored = random_step()
    # CISPO's clipped weight is a constant for the gradient, not for the loss; so is what `old` stands for.
    settings = settings_of(name)
    if settings.clip == "cispo":
        settings = replace(settings, clip="none", ratio="none")

    def loss(logprobs_N: Tensor, values_N: Tensor, entropies_N: Tensor) -> Tensor:
        return settings(logprobs_N, scored.with_scores(entropies_N, values_N))[0]

    values, entropies = torch.randn(15, dtype=torch.float64), torch.rand(15, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (logprobs, values, entropies)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_cispo_gradient_is_that_of_log_probabilities_with_constant_weights() -> None:
    logprobs, scored = random_step()
    settings = preset("cispo").policy_gradient(clip_low=0.2, clip_high=0.28)
    logprobs.requires_grad_()
    settings(logprobs, scored)[0].backward()
    weights = (logprobs.detach() - scored.token_values_N["old_logprobs"]).exp().clamp(0.8, 1.28)
    expected = -weights * scored.token_values_N["advantages"] * scored.weights_S[scored.sequence_index_N] / 25
    assert scored.totals.tokens == 25
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(expected.tolist(), abs=1e-7)  # weights of sequences are float32


@pytest.mark.parametrize("name", PRESETS)
def test_splitting_a_step_into_micro_batches_changes_nothing(name: str) -> None:
    settings = settings_of(name)
    logprobs, scored = random_step()
    values, entropies = torch.randn(15, dtype=torch.float64), torch.rand(15, dtype=torch.float64)
    whole = logprobs.clone().requires_grad_()
    loss, _ = settings(whole, scored.with_scores(entropies, values))
    loss.backward()

    parts, losses = logprobs.clone().requires_grad_(), []
    for first, last in ((0, 1), (1, 4), (4, 5)):
        tokens = ((scored.sequence_index_N >= first) & (scored.sequence_index_N < last)).nonzero()[:, 0]
        assert scored.reference_logprobs_N is not None
        assert scored.behaviour_logprobs_N is not None
        part = replace(
            scored,
            sequence_index_N=scored.sequence_index_N[tokens] - first,
            turn_index_N=scored.turn_index_N[tokens],
            group_index_S=scored.group_index_S[first:last],
            reference_logprobs_N=scored.reference_logprobs_N[tokens],
            behaviour_logprobs_N=scored.behaviour_logprobs_N[tokens],
            token_values_N={k: v[tokens] for k, v in scored.token_values_N.items()},
            weights_S=scored.weights_S[first:last],
        )
        part_loss, _ = settings(parts[tokens], part.with_scores(entropies[tokens], values[tokens]))
        part_loss.backward()
        losses.append(part_loss.item())
    assert whole.grad is not None
    assert parts.grad is not None
    assert sum(losses) == pytest.approx(loss.item(), abs=1e-12)
    assert parts.grad.tolist() == pytest.approx(whole.grad.tolist(), abs=1e-12)


def test_pieces_of_a_rollout_are_one_sequence() -> None:
    """A turn that goes on in the next piece of tokens is one turn: index vectors say so, not positions."""
    scored = scored_of([4], turns=[0, 0, 1, 1], old_logprobs=[-1.0] * 4, advantage=[1.0])
    settings = PolicyGradient(ratio="turn", clip="none", aggregation="sequence_mean_turn_mean")
    found, _, _ = run(settings, [-0.9, -1.0, -1.1, -0.8], scored)
    near(found, -(math.exp(0.1) + math.exp(0.1)) / 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": "rollout"},
        {"clip": "ppoo"},
        {"aggregation": "mean"},
        {"kl": "k4"},
        {"correction": "tis"},
        {"correction_level": "turn"},
        {"beta": -0.1},
        {"beta": NAN},
        {"clip_high": -0.1},
        {"clip_low": 1.5},
        {"dual_clip": 1.1},
        {"dual_clip": 3.0, "clip": "cispo"},
        {"clip": "ppo", "ratio": "none"},
        {"length_divisor": 8.0},
        {"aggregation": "sequence_sum_constant"},
        {"length_divisor": 0.0, "aggregation": "sequence_sum_constant"},
        {"sequences_divisor": 32},
        {"correction_cap": 0.5},
        {"value_clip": 0.0},
        {"entropy_coef": -1.0},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        PolicyGradient(**settings)


def test_missing_advantages_are_named() -> None:
    with pytest.raises(ValueError, match="advantage"):
        run(PolicyGradient(), [-1.0], scored_of([1]))


def test_dr_grpo_needs_its_constant() -> None:
    with pytest.raises(ValueError, match="sequence_sum_constant"):
        preset("dr_grpo").policy_gradient()
    assert preset("dr_grpo").policy_gradient(max_completion_length=512).length_divisor == 512


# -- through a model ---------------------------------------------------------------------------------------------------


def rollouts(**token_values: list[list[float]]) -> list[tuple[TokenSequence, ...]]:
    """Two groups of three answers of 2..7 tokens with advantages; `token_values` by name, sequence after sequence."""
    generator, groups, number = torch.Generator().manual_seed(7), [], 0
    for g in range(2):
        prompt, answers = torch.randint(3, 97, (4 + 3 * g,), generator=generator).tolist(), []
        for advantage in (1.0, -0.25, -0.75):
            answer = completion(prompt, torch.randint(3, 97, (2 + number,), generator=generator).tolist())
            named = {name: torch.tensor(rows[number]).numpy() for name, rows in token_values.items()}
            answers.append(replace(answer, values={"advantage": advantage}, token_values=named))
            number += 1
        groups.append(tuple(answers))
    return groups


@pytest.mark.parametrize("name", ["ppo", "loop", "grpo"])
def test_through_the_learner(name: str) -> None:
    """Old log-probabilities from `logprobs` make the same first update as none, in one micro-batch and in several."""
    settings = preset(name).policy_gradient(sequences_per_update=6, log_entropy=True)
    returns = [[0.5] * (2 + n) for n in range(6)]
    found = []
    for known, budget in ((False, 4096), (True, 4096), (True, 24)):
        options = LearnerOptions(
            learning_rate=1e-2, tokens_per_microbatch=budget, value_head=settings.value_coef > 0, reference="frozen"
        )
        learner = Learner(make_tiny_model(scale=1.0), options, Accelerator(cpu=True), say=lambda _: None)
        old = [part.tolist() for group in learner.logprobs(rollouts()) for part in group]
        groups = rollouts(returns=returns, **({"old_logprobs": old} if known else {}))
        found.append(learner.update(groups, settings.objective()))
        assert found[-1]["ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert found[-1]["entropy"] > 0
        assert found[-1]["clip_ratio/region_mean"] == 0
        moved = learner.update(groups, settings.objective()) if known else {"ratio/mean": 0}
        assert abs(moved["ratio/mean"] - 1) > 1e-4
    for metrics in found[1:]:
        assert metrics["loss"] == pytest.approx(found[0]["loss"], rel=1e-4, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)
