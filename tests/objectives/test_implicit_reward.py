"""DPO as a Q-function: soft Bellman identities by enumeration, credit by hand."""

import math

import pytest
import torch

from llmrl.objectives.dpo import DPO, token_rewards
from llmrl.objectives.implicit_reward import (
    auroc,
    cumulative_rewards,
    reference_drift,
    soft_policy_logprobs,
    soft_q,
    soft_value,
    span_rewards,
)

BETA = 0.5
# The page's T2: depth two, tokens A and B; rewards at the end.
REFERENCE = {"": [0.6, 0.4], "A": [0.7, 0.3], "B": [0.5, 0.5]}
REWARDS = {"AA": 1.0, "AB": 0.0, "BA": 0.5, "BB": -1.0}


def tensor(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def solved() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """V* and log pi* of every state, from the leaves."""
    values, policy = {}, {}
    for state in ("A", "B", ""):
        rewards = [REWARDS.get(state + a, 0.0) for a in "AB"]
        onward = [values.get(state + a, 0.0) for a in "AB"]
        q = soft_q(tensor(rewards), tensor(REFERENCE[state]).log(), tensor(onward), BETA)
        values[state], policy[state] = float(soft_value(q, BETA)), soft_policy_logprobs(q, BETA)
    return values, policy


def implicit(leaf: str) -> torch.Tensor:
    """beta log(pi* / pi_ref) of both tokens that lead to the leaf."""
    _, policy = solved()
    steps = [("", leaf[0]), (leaf[0], leaf[1])]
    of_policy = tensor([float(policy[state]["AB".index(a)]) for state, a in steps])
    return token_rewards(of_policy, tensor([REFERENCE[state]["AB".index(a)] for state, a in steps]).log(), BETA)


def test_t1_token_rewards_and_their_sums() -> None:
    """The loss and gradient of the page's T1 are in test_dpo.py."""
    rewards = token_rewards(
        torch.tensor([-0.5, -1.0, -0.2, -1.2, -0.4]), torch.tensor([-0.7, -0.9, -0.6, -0.8, -0.5]), 0.1
    )
    assert rewards.tolist() == pytest.approx([0.02, -0.01, 0.04, -0.04, 0.01], abs=1e-7)
    sums = cumulative_rewards(rewards, torch.tensor([0, 0, 0, 1, 1]))
    assert sums.tolist() == pytest.approx([0.02, 0.01, 0.05, -0.04, -0.03], abs=1e-7)
    margin = float(sums[2] - sums[4])
    assert -math.log(1 / (1 + math.exp(-margin))) == pytest.approx(0.65394697, rel=1e-6)
    assert 1 / (1 + math.exp(-margin)) == pytest.approx(0.51998934, rel=1e-6)
    assert DPO(beta=0.1).objective().needs_reference


def test_t2_soft_values_and_the_optimal_policy() -> None:
    values, policy = solved()
    assert values == pytest.approx({"A": 0.849853, "B": 0.177720, "": 0.674572}, abs=1e-6)
    assert [float(policy[s][0].exp()) for s in ("", "A", "B")] == pytest.approx(
        [0.851919, 0.945179, 0.952574], abs=1e-6
    )


def test_t2_implicit_rewards_telescope() -> None:
    values, policy = solved()
    assert implicit("AA").tolist() == pytest.approx([0.175281, 0.150147], abs=1e-6)
    assert implicit("BB").tolist() == pytest.approx([-0.496852, -1.177720], abs=1e-6)
    for leaf, reward in REWARDS.items():
        sums = cumulative_rewards(implicit(leaf), torch.tensor([0, 0]))
        # After the first token the value's change since the root; after the last the reward less V*(root).
        assert sums.tolist() == pytest.approx([values[leaf[0]] - values[""], reward - values[""]], abs=1e-6)
        likelihood = float(policy[""]["AB".index(leaf[0])] + policy[leaf[0]]["AB".index(leaf[1])])
        of_reference = math.log(REFERENCE[""]["AB".index(leaf[0])] * REFERENCE[leaf[0]]["AB".index(leaf[1])])
        assert BETA * likelihood + values[""] == pytest.approx(reward + BETA * of_reference, abs=1e-6)
    margin = float(implicit("AA").sum() - implicit("BB").sum())
    assert 1 / (1 + math.exp(-margin)) == pytest.approx(0.88079708, rel=1e-6)


def test_t3_implicit_rewards_of_the_reference_fall_by_its_divergence() -> None:
    _, policy = solved()
    reference = tensor(REFERENCE[""]).log()
    assert reference_drift(policy[""], reference, BETA).item() == pytest.approx(-0.09357237, rel=1e-6)
    assert reference_drift(reference, reference, BETA).item() == 0
    # What the reference never says has no part in it, even if the policy does not either.
    impossible = tensor([-math.inf])
    found = reference_drift(torch.cat([policy[""], impossible]), torch.cat([reference, impossible]), BETA)
    assert found.item() == pytest.approx(-0.09357237, rel=1e-6)


def test_sums_start_anew_with_each_sequence() -> None:
    rewards = torch.tensor([2.0**24, 1.0, 0.25, -0.25, 2.0])
    found = cumulative_rewards(rewards, torch.tensor([0, 1, 1, 1, 2]))
    assert found.tolist() == [2.0**24, 1.0, 1.25, 1.0, 2.0]
    assert found.dtype == rewards.dtype
    assert cumulative_rewards(torch.tensor([]), torch.tensor([], dtype=torch.long)).tolist() == []


def test_spans() -> None:
    sums, means = span_rewards(torch.tensor([1.0, 2.0, -4.0, 8.0]), torch.tensor([0, 0, -1, 2]), 3)
    assert sums.tolist() == [3.0, 0.0, 8.0]
    assert means[[0, 2]].tolist() == [1.5, 8.0]
    assert means[1].isnan()


@pytest.mark.parametrize(
    ("rewards", "planted", "expected"),
    [
        ([-1.0, 0.0, 1.0, 2.0], [True, False, False, False], 1.0),
        ([-1.0, 0.0, 1.0, 2.0], [False, False, False, True], 0.0),
        ([0.0, 0.0, 0.0], [False, True, False], 0.5),
        # Of the six comparisons the error's tokens are lower in four and equal in one.
        ([1.0, -1.0, 1.0, 2.0, 0.0], [True, True, False, False, False], 4.5 / 6),
    ],
)
def test_auroc(rewards: list[float], planted: list[bool], expected: float) -> None:
    assert auroc(torch.tensor(rewards), torch.tensor(planted)) == pytest.approx(expected)


def test_auroc_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="0 tokens inside"):
        auroc(torch.tensor([1.0]), torch.tensor([False]))
