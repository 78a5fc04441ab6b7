"""Advantages against numbers worked out by hand, their definitions, and what must not matter."""

import math

import pytest
import torch
from torch import Tensor

from llmrl.objectives.advantages import (
    batch_normalised,
    discounted_sums,
    gae,
    group_mean,
    group_normalised,
    leave_one_out,
    reward_to_go,
    shaped_rewards,
    shaped_scores,
    whiten,
    worth_training,
)
from llmrl.objectives.presets import PRESETS, preset

ONE_GROUP = torch.zeros(4, dtype=torch.long)
# LOOP's page, T7: one sequence of four tokens.
OLD, REFERENCE = torch.tensor([-1.0, -0.5, -2.0, -0.3]), torch.tensor([-1.2, -0.4, -1.5, -0.35])
VALUES = torch.tensor([0.4, 0.5, 0.3, 0.7])
LAMBDA_95 = [0.55855062, 0.5037375, 0.73025, 0.295]


def close(found: Tensor, expected: list[float], tolerance: float = 1e-6) -> None:
    assert found.tolist() == pytest.approx(expected, abs=tolerance)


def ragged(seed: int = 0, sequences: int = 40, longest: int = 30) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (sequences,), generator=generator).tolist()
    return torch.repeat_interleave(torch.arange(sequences), torch.tensor(lengths)), lengths


def test_leave_one_out() -> None:
    rewards = torch.tensor([1.0, 0.5, 0.5, 0.0])
    close(leave_one_out(rewards, ONE_GROUP), [2 / 3, 0, 0, -2 / 3])
    close(group_mean(rewards, ONE_GROUP), [0.5, 0, 0, -0.5])
    close(leave_one_out(rewards, ONE_GROUP, divide_by_std=True), [1.8856181, 0, 0, -1.8856181])
    close(leave_one_out(torch.tensor([1.0, 0.5, 0.0]), ONE_GROUP[:3]), [0.75, 0, -0.75])


def test_relatives_on_the_same_five_rewards() -> None:
    rewards, group, lengths = (
        torch.tensor([1.0, 1, 0, 0, 0]),
        torch.zeros(5, dtype=torch.long),
        torch.tensor([2, 4, 3, 1, 5]),
    )
    centred = group_mean(rewards, group)
    close(centred, [0.6, 0.6, -0.4, -0.4, -0.4])
    close(leave_one_out(rewards, group), [0.75, 0.75, -0.5, -0.5, -0.5])
    close(group_normalised(rewards, group), [1.09524515] * 2 + [-0.73016343] * 3)
    close(group_normalised(rewards, group, eps=0, unbiased=False), [1.22474487] * 2 + [-0.81649658] * 3)
    close(batch_normalised(centred, lengths, eps=0), [1.22474487] * 2 + [-0.81649658] * 3)
    close(batch_normalised(centred, lengths, unbiased=True, eps=0), [1.18321596] * 2 + [-0.78881064] * 3)


def test_normalisation_erases_the_weight_of_a_length_reward_and_leave_one_out_keeps_it() -> None:
    lengths, verdicts = torch.tensor([500.0, 600, 700, 800]), torch.tensor([1.0, 0, 0, 1])
    for alpha in (0.8, 0.98):
        rewards = (1 - alpha) * (-1000 / lengths)
        close(group_normalised(rewards, ONE_GROUP, eps=0), [-1.27549778, -0.24775856, 0.48634088, 1.03691546], 1e-5)
        expected = [-0.11031746, -0.02142857, 0.04206349, 0.08968254]
        close(leave_one_out(rewards, ONE_GROUP) / (1 - alpha), [e / 0.2 for e in expected])
    rewards = 0.8 * verdicts + 0.2 * (-1000 / lengths)
    close(leave_one_out(rewards, ONE_GROUP), [0.42301587, -0.55476190, -0.49126984, 0.62301587])


def test_groups_are_each_their_own() -> None:
    rewards, group = torch.tensor([1.0, 0, 5, 7, 9, 2]), torch.tensor([0, 0, 1, 1, 1, 2])
    close(leave_one_out(rewards, group), [1, -1, -3, 0, 3, 0])
    close(group_normalised(rewards, group, eps=0), [math.sqrt(0.5), -math.sqrt(0.5), -1, 0, 1, 0])
    assert group_normalised(rewards, group, eps=0, scale="none").tolist() == group_mean(rewards, group).tolist()
    close(group_normalised(rewards, group, eps=0, scale="batch"), (group_mean(rewards, group) / rewards.std()).tolist())


@pytest.mark.parametrize("advantage", [leave_one_out, group_mean, group_normalised])
def test_equal_rewards_and_single_ones_teach_exactly_nothing(advantage) -> None:  # type: ignore[no-untyped-def]
    # A third is not representable: a mean of equal ones that is off by one rounding, divided by its deviation, is +-1.
    rewards, group = torch.tensor([1 / 3] * 3 + [0.7]), torch.tensor([0, 0, 0, 1])
    assert advantage(rewards, group).tolist() == [0, 0, 0, 0]
    assert leave_one_out(rewards, group, divide_by_std=True).tolist() == [0, 0, 0, 0]
    assert group_normalised(rewards, group, eps=0).tolist() == [0, 0, 0, 0]
    assert group_normalised(rewards[:3], group[:3], eps=0, scale="batch").tolist() == [0, 0, 0]


def test_a_reward_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"sequences \[2\]"):
        leave_one_out(torch.tensor([1.0, 0, math.nan, 1]), ONE_GROUP)


def test_gae_of_shaped_rewards() -> None:
    rewards = shaped_rewards(torch.tensor([1.0]), OLD, REFERENCE, ONE_GROUP, beta=0.1)
    close(rewards, [-0.02, 0.01, 0.05, 0.995])
    advantages, returns = gae(rewards, VALUES, ONE_GROUP, lam=0.0)
    close(advantages, [0.08, -0.19, 0.45, 0.295])
    advantages, returns = gae(rewards, VALUES, ONE_GROUP, lam=0.95)
    close(advantages, LAMBDA_95)
    close(returns, [0.95855062, 1.0037375, 1.03025, 0.995])
    close(whiten(advantages), [0.20436758, -0.10114699, 1.1613767, -1.2645973])
    advantages, returns = gae(rewards, VALUES, ONE_GROUP, lam=1.0)
    close(advantages, [0.635, 0.555, 0.745, 0.295])
    close(returns, [1.035, 1.055, 1.045, 0.995])


def test_the_next_token_of_a_token_before_an_observation_is_the_one_after_it() -> None:
    keep = torch.tensor([0, 1, 3])
    rewards = shaped_rewards(torch.tensor([1.0]), OLD[keep], REFERENCE[keep], ONE_GROUP[:3], beta=0.1)
    advantages, returns = gae(rewards, VALUES[keep], ONE_GROUP[:3])
    close(advantages, [0.5457375, 0.49025, 0.295])
    close(returns, [0.9457375, 0.99025, 0.995])


def test_rlsp_golden() -> None:
    old, reference = torch.tensor([-0.5, -1, -0.2, -0.1]), torch.tensor([-0.7, -0.9, -0.6, -0.1])
    values = torch.tensor([0.1, 0.2, 0.3, 0.35])
    rewards = shaped_rewards(torch.tensor([0.4]), old, reference, ONE_GROUP, beta=0.05)
    close(rewards, [-0.01, 0.005, -0.02, 0.4])
    advantages, returns = gae(rewards, values, ONE_GROUP)
    close(advantages, [0.25969375, 0.178625, 0.0775, 0.05])
    close(returns, [0.35969375, 0.378625, 0.3775, 0.4])
    close(whiten(advantages, unbiased=False, eps=0), [1.41788669, 0.44573503, -0.76692506, -1.09669666], 1e-5)
    unpaid, _ = gae(shaped_rewards(torch.tensor([0.0]), old, reference, ONE_GROUP, beta=0.05), values, ONE_GROUP)
    close(unpaid, [-0.08325625, -0.182375, -0.3025, -0.35])


def test_pf_ppo_golden() -> None:
    old, reference = torch.tensor([-1.0, -2, -0.5]), torch.tensor([-1.5, -1, -0.7])
    rewards = shaped_rewards(torch.tensor([12.0]), old, reference, ONE_GROUP[:3], beta=0.01, clip=10)
    close(rewards, [-0.005, 0.01, 9.998])
    advantages, returns = gae(rewards, torch.tensor([0.2, 0.3, 0.1]), ONE_GROUP[:3])
    close(advantages, [8.847445, 9.2131, 9.898])
    close(returns, [9.047445, 9.5131, 9.998])


def test_whitening_before_and_after_filtering() -> None:
    advantages = torch.tensor([1, 0.4, 0.1, -0.3, -1.2])
    before = whiten(advantages, unbiased=False)
    close(before, [1.3608276, 0.54433105, 0.13608276, -0.40824829, -1.6329931])
    close(whiten(advantages[[0, 4]], unbiased=False), [1, -1])
    assert whiten(advantages[:1], unbiased=False).tolist() == [0]
    counts = torch.tensor([2.0, 0, 0, 0, 1])
    close(whiten(advantages, counts)[[0, 0, 4]], whiten(advantages[[0, 0, 4]]).tolist())


def test_kl_of_a_sequence_is_the_sum_of_its_tokens() -> None:
    index, _ = ragged()
    generator = torch.Generator().manual_seed(1)
    old, reference = (torch.randn(len(index), generator=generator) for _ in range(2))
    scores = torch.randn(40, generator=generator)
    tokens = shaped_rewards(scores, old, reference, index, beta=0.3)
    summed = torch.zeros(40).index_add(0, index, tokens)
    close(shaped_scores(scores, old, reference, index, beta=0.3), summed.tolist(), 1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.5), (1.0, 0.0)])
def test_gae_is_the_recursion_of_its_definition(gamma: float, lam: float) -> None:
    index, lengths = ragged()
    generator = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(len(index), generator=generator, dtype=torch.float64) for _ in range(2))
    expected, start = [], 0
    for length in lengths:
        following, advantage, part = 0.0, 0.0, []
        for t in reversed(range(start, start + length)):
            advantage = rewards[t].item() + gamma * following - values[t].item() + gamma * lam * advantage
            following = values[t].item()
            part.append(advantage)
        expected += part[::-1]
        start += length
    advantages, returns = gae(rewards, values, index, gamma, lam)
    close(advantages, expected, 1e-10)
    close(returns - values, expected, 1e-10)


def test_reward_to_go_ends_with_its_sequence() -> None:
    index = torch.tensor([0, 0, 0, 1, 2, 2])
    close(reward_to_go(torch.tensor([1.0, 2, 4, 8, 16, 32]), index, 0.5), [3, 4, 4, 8, 32, 32])
    assert discounted_sums(torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.9).tolist() == []


def test_filter_keeps_what_is_worth_a_step_and_fills_up_the_ranks() -> None:
    advantages = torch.tensor([2 / 3, -0.2, 0.3, 0.004, 0, 0])
    assert worth_training(advantages) == [0, 2, 1]
    assert worth_training(advantages, multiple_of=2) == [0, 2, 1, 3]
    assert len(worth_training(torch.zeros(6), multiple_of=2)) == 2
    assert len(worth_training(advantages, multiple_of=8)) == 6


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_advantage_for_every_token(name: str) -> None:
    index, _ = ragged(sequences=6, longest=5)
    group, generator = torch.tensor([0, 0, 0, 1, 1, 2]), torch.Generator().manual_seed(3)
    old, reference, values = (torch.randn(len(index), generator=generator) for _ in range(3))
    scores = torch.tensor([1.0, 0, 0.5, 0.25, 0.75, 2])
    advantages, returns = preset(name).advantages(scores, index, group, old, reference, values)
    assert advantages.shape == index.shape
    assert torch.isfinite(advantages).all()
    assert advantages.std() > 0
    assert (returns is not None) == preset(name).needs_critic


def test_presets_say_what_is_missing() -> None:
    index, scores = torch.tensor([0, 1]), torch.tensor([1.0, 0])
    with pytest.raises(ValueError, match="reference_logprobs"):
        preset("rloo").advantages(scores, index, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="critic's values"):
        preset("ppo").advantages(scores, index, torch.tensor([0, 0]), scores, scores)
    with pytest.raises(ValueError, match="direct_advantage"):
        preset("dapo")
    with pytest.raises(ValueError, match="dapo_clip"):
        preset("grop")


def test_preset_advantages_are_the_published_ones() -> None:
    index, group = torch.tensor([0, 0, 1, 2, 3]), ONE_GROUP
    scores = torch.tensor([1.0, 0.5, 0.5, 0.0])
    close(preset("loop").advantages(scores, index, group)[0], [2 / 3, 2 / 3, 0, 0, -2 / 3])
    close(preset("dr_grpo").advantages(scores, index, group)[0], [0.5, 0.5, 0, 0, -0.5])
    std = scores.std().item() + 1e-4
    close(preset("grpo").advantages(scores, index, group)[0], [0.5 / std, 0.5 / std, 0, 0, -0.5 / std])
    # The KL of the first sequence, 0.05 (0.4 + 0.6), lowers its reward before the others' mean is taken.
    old, reference = torch.tensor([-0.5, -0.5, -1, -1, -1]), torch.tensor([-0.9, -1.1, -1, -1, -1])
    close(
        preset("rloo").advantages(scores, index, group, old, reference)[0],
        [0.95 - 1 / 3] * 2 + [0.05 / 3] * 2 + [-0.65],
    )


def test_ppo_preset_is_shaped_gae_whitened() -> None:
    advantages, returns = preset("ppo").advantages(
        torch.tensor([1.0]), ONE_GROUP, ONE_GROUP[:1], OLD, REFERENCE, VALUES
    )
    expected, expected_returns = gae(
        shaped_rewards(torch.tensor([1.0]), OLD, REFERENCE, ONE_GROUP, 0.05), VALUES, ONE_GROUP
    )
    assert returns is not None
    close(returns, expected_returns.tolist())
    close(advantages, whiten(expected).tolist())
