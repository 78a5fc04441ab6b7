r"""Direct Preference Optimization and its usual variants.

Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, Eq. 7. With the sequence log-ratio
R(y) = sum_t [log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)] over the response's tokens, its EOS included, and
delta = R(chosen) - R(rejected):

    sigmoid       -(1 - eps) log sigma(beta delta) - eps log sigma(-beta delta)
    robust        [-(1 - eps) log sigma(beta delta) + eps log sigma(-beta delta)] / (1 - 2 eps)
    hinge         max(0, 1 - beta delta)
    ipo           (delta' - 1 / (2 beta))^2, delta' = R(chosen)/|chosen| - R(rejected)/|rejected|
    ipo_sum       (delta - 1 / (2 beta))^2
    sigmoid_norm  -(1 - eps) log sigma(beta delta') - eps log sigma(-beta delta')

eps is the probability that a label is flipped: 0 in `sigmoid` is the paper's loss, above 0 it is conservative DPO
(cDPO: Mitchell, "A note on DPO with noisy preferences", 2023; also in the DPO authors' code); `robust` is Chowdhury
et al., "Provably Robust DPO", arXiv 2403.00409; `hinge` is SLiC's calibration loss on the same margin (Zhao et
al., arXiv 2305.10425); `ipo_sum` is Azar et al., arXiv 2310.12036, without a division; `ipo` divides by the lengths
first, as TRL's loss of that name does. To each pair's loss comes

    rpo_alpha * -log pi(chosen | x) / |chosen|

which keeps the chosen answer likely while the margin grows (Pang et al., "Iterative Reasoning Preference Optimization",
arXiv 2404.19733). The loss of a batch is the mean over its pairs.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmrl.objectives.scored import Objective, ScoredTokens

LossType = Literal["sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm"]
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
LENGTH_NORMALISED = {"ipo", "sigmoid_norm"}
SMOOTHABLE = {"sigmoid", "robust", "sigmoid_norm"}


def pair_losses(delta_P: Tensor, beta: float, loss_type: LossType = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """[P] -> [P]: the loss of each pair from its difference of (possibly length-normalised) log-ratios.

    `delta_P` is R(chosen) - R(rejected), not yet multiplied by beta; for `ipo` and `sigmoid_norm` each R has been
    divided by its length. Raises ValueError for an unknown `loss_type`.
    """
    eps = label_smoothing
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -(1 - eps) * logsigmoid(beta * delta_P) - eps * logsigmoid(-beta * delta_P)
    if loss_type == "robust":
        return (-(1 - eps) * logsigmoid(beta * delta_P) + eps * logsigmoid(-beta * delta_P)) / (1 - 2 * eps)
    if loss_type == "hinge":
        return torch.relu(1 - beta * delta_P)
    if loss_type in ("ipo", "ipo_sum"):
        return (delta_P - 1 / (2 * beta)) ** 2
    raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSS_TYPES)}")


@dataclass(frozen=True)
class DPO:
    """DPO over micro-batches whose groups are pairs: sequences (chosen, rejected), in this order.

    beta: strength of the pull towards the reference (> 0). label_smoothing: eps above, in [0, 0.5). rpo_alpha: weight
    of the chosen answer's negative log-likelihood a token (>= 0).
    """

    beta: float = 0.1
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"unknown loss_type {self.loss_type!r}; known: {', '.join(LOSS_TYPES)}")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss_type not in SMOOTHABLE:
            raise ValueError(f"label_smoothing has no meaning for loss_type {self.loss_type!r}")
        if not self.rpo_alpha >= 0:
            raise ValueError(f"rpo_alpha must not be negative, got {self.rpo_alpha}")

    def objective(self) -> Objective:
        return Objective(self.__call__, needs_reference=True)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] log pi of the scored tokens -> (sum of pair losses / global number of pairs, metrics)."""
        assert scored.reference_logprobs_N is not None, "DPO needs reference log-probabilities"
        scored.check_groups("DPO takes a chosen and a rejected sequence", 2, 2)
        logps_S = scored.sum_per_sequence(logprobs_N)
        ratios_S = scored.sum_per_sequence(logprobs_N - scored.reference_logprobs_N)
        lengths_S = scored.lengths_S()
        compared_S = ratios_S / lengths_S if self.loss_type in LENGTH_NORMALISED else ratios_S
        losses_P = pair_losses(compared_S[0::2] - compared_S[1::2], self.beta, self.loss_type, self.label_smoothing)

        nll_P = -logps_S[0::2] / lengths_S[0::2]
        if self.rpo_alpha:
            losses_P = losses_P + self.rpo_alpha * nll_P

        rewards_S = self.beta * ratios_S.detach()
        metrics = {
            **preference_metrics(rewards_S),
            "nll_loss": nll_P.detach(),
            "logps/chosen": logps_S.detach()[0::2],
            "logps/rejected": logps_S.detach()[1::2],
            "completions/chosen_length": lengths_S[0::2],
            "completions/rejected_length": lengths_S[1::2],
        }
        return losses_P.sum() / scored.totals.groups, metrics


def preference_metrics(rewards_S: Tensor) -> dict[str, Tensor]:
    """[S] rewards of (chosen, rejected) sequences -> per-pair rewards, margins and accuracies ([P] each).

    An equal reward counts as half: a policy that still equals its reference scores 0.5, as guessing would.
    """
    chosen_P, rejected_P = rewards_S[0::2], rewards_S[1::2]
    return {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": ((chosen_P > rejected_P).float() + (chosen_P >= rejected_P).float()) / 2,
    }


def token_rewards(logprobs_N: Tensor, reference_logprobs_N: Tensor, beta: float) -> Tensor:
    """[N]: the implicit reward of each token, beta (log pi - log pi_ref).

    Rafailov et al., "From r to Q*", arXiv 2404.12358, Sec. 4: the optimal advantage of a DPO policy, defined up to a
    potential of the state; compare it between near-identical responses rather than read it as an absolute value.
    """
    return beta * (logprobs_N - reference_logprobs_N)
