"""DPO against numbers worked out by hand, finite differences, and its limits."""

import math
from typing import Any

import pytest
import torch
from support.scoring import scored_of

from llmrl.objectives.dpo import DPO, LOSS_TYPES, pair_losses, token_rewards
from llmrl.objectives.scored import ScoredTokens, Totals

# One pair, worked out by hand: R(chosen) = 0.5, R(rejected) = -0.3, delta = 0.8.
CHOSEN, CHOSEN_REF = [-0.5, -1.0, -0.2], [-0.7, -0.9, -0.6]
REJECTED, REJECTED_REF = [-1.2, -0.4], [-0.8, -0.5]


def one_pair(dtype: torch.dtype = torch.float32, groups: int = 1) -> tuple[torch.Tensor, ScoredTokens]:
    logprobs = torch.tensor(CHOSEN + REJECTED, dtype=dtype, requires_grad=True)
    scored = ScoredTokens(
        sequence_index_N=torch.tensor([0, 0, 0, 1, 1]),
        turn_index_N=torch.zeros(5, dtype=torch.long),
        group_index_S=torch.tensor([0, 0]),
        totals=Totals(tokens=5, sequences=2, groups=groups),
        reference_logprobs_N=torch.tensor(CHOSEN_REF + REJECTED_REF, dtype=dtype),
    )
    return logprobs, scored


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.1}, 0.65394697),
        ({"beta": 0.5}, 0.51301525),
        ({"beta": 0.5, "label_smoothing": 0.1}, 0.55301525),
        ({"beta": 0.1, "loss_type": "ipo"}, 21.9336),
        ({"beta": 0.1, "loss_type": "ipo_sum"}, 17.64),
        ({"beta": 0.1, "loss_type": "sigmoid_norm"}, 0.67743919),
        ({"beta": 0.1, "loss_type": "hinge"}, 0.92),
        # [0.9 * 0.51301525 - 0.1 * 0.91301525] / 0.8, for -log sigma(-0.4) = 0.91301525.
        ({"beta": 0.5, "loss_type": "robust", "label_smoothing": 0.1}, 0.46301525),
        # The chosen answer's negative log-likelihood a token is 1.7 / 3.
        ({"beta": 0.1, "rpo_alpha": 2.0}, 0.65394697 + 2 * 1.7 / 3),
    ],
)
def test_hand_worked_losses(settings: dict[str, Any], expected: float) -> None:
    loss, _ = DPO(**settings)(*one_pair())
    assert loss.item() == pytest.approx(expected, rel=2e-6)


def test_hand_worked_gradient_and_metrics() -> None:
    logprobs, scored = one_pair()
    loss, metrics = DPO(beta=0.1)(logprobs, scored)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.04800107] * 3 + [0.04800107] * 2, rel=1e-5)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.05, rel=1e-5)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.03, rel=1e-5)
    assert metrics["rewards/margins"].item() == pytest.approx(0.08, rel=1e-5)
    assert metrics["rewards/accuracies"].item() == 1.0
    assert metrics["logps/chosen"].item() == pytest.approx(-1.7)
    assert metrics["completions/chosen_length"].item() == 3


def test_rpo_raises_the_chosen_answer_and_leaves_the_rejected_one_to_the_preference() -> None:
    logprobs, scored = one_pair()
    loss, metrics = DPO(beta=0.1, rpo_alpha=2.0)(logprobs, scored)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.04800107 - 2 / 3] * 3 + [0.04800107] * 2, rel=1e-5)
    assert metrics["nll_loss"].item() == pytest.approx(1.7 / 3)


def test_token_rewards() -> None:
    rewards = token_rewards(torch.tensor(CHOSEN), torch.tensor(CHOSEN_REF), beta=0.1)
    assert rewards.tolist() == pytest.approx([0.02, -0.01, 0.04], abs=1e-7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_by_finite_differences(loss_type: Any) -> None:
    smoothing = 0.2 if loss_type in ("sigmoid", "robust", "sigmoid_norm") else 0.0
    delta = torch.tensor([-3.0, -0.4, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: pair_losses(d, 0.3, loss_type, smoothing), delta)


def test_policy_equal_to_reference_starts_at_ln_2_with_accuracy_of_a_guess() -> None:
    _, scored = one_pair()
    assert scored.reference_logprobs_N is not None
    loss, metrics = DPO()(scored.reference_logprobs_N.clone(), scored)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/accuracies"].item() == 0.5


def test_denominator_is_the_global_number_of_pairs() -> None:
    alone, _ = DPO()(*one_pair())
    among_four, _ = DPO()(*one_pair(groups=4))
    assert among_four.item() == pytest.approx(alone.item() / 4)


@pytest.mark.parametrize("sizes", [[2, 3], [2, 1]])
def test_groups_that_are_no_pairs_are_named(sizes: list[int]) -> None:
    """Slicing every other sequence would compare answers to different prompts."""
    scored = scored_of([[1] * size for size in sizes], reference=[0.0] * sum(sizes))
    with pytest.raises(ValueError, match=f"a chosen and a rejected sequence in each group; group 1 has {sizes[1]} seq"):
        DPO()(torch.zeros(sum(sizes)), scored)


def test_a_large_loss_type_stays_finite() -> None:
    delta = torch.tensor([-1e4, 1e4])
    assert torch.isfinite(pair_losses(delta, 0.5)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0},
        {"beta": -1.0},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.1},
        {"rpo_alpha": -1.0},
        {"rpo_alpha": math.nan},
        {"loss_type": "sigmoyd"},
        {"loss_type": "ipo", "label_smoothing": 0.1},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DPO(**settings)
