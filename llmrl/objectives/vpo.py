r"""Value-Incentivized Preference Optimization: DPO plus a term that makes the implicit value larger or smaller.

Cen, Mei, Goshvadi, Dai, Yang, Yang, Schuurmans, Chi, Dai, arXiv 2405.19320 (several methods are called VPO: this is the
one by value incentive). With R(y) = sum_t [log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)] over the answer's tokens,
its EOS included, and y^c ~ pi_cal(. | x):

    L(pi) = mean over pairs of  -log sigma(beta (R(chosen) - R(rejected)))
          + s alpha beta  mean over prompts of  the mean over their y^c of  R(y^c)

    s = +1  optimism, online: what pi_cal already says becomes less likely, so the policy explores
    s = -1  pessimism, offline: it becomes more likely, so the policy stays with what the data know

It follows from reward maximum likelihood regularised by the optimal KL-regularised value J*(r) (minimise the negative
log-likelihood less s alpha J*), in which Bradley-Terry's free shift of rewards is fixed by E_{y ~ pi_cal} r(x, y) = 0:
then J* = -beta E_cal R of the policy that is optimal for r. alpha 0 is DPO; pi_cal = pi_ref with s = -1 adds
alpha beta KL(pi_ref || pi).

Where what we know of the paper is silent, we decided:
- `alpha` belongs to means. The likelihood's own form, a sum over all N pairs, has alpha_sum = N alpha.
- Prompts count alike, whatever number of calibration answers each has (the paper: y^c ~ pi_cal(. | x) for x ~ rho).
- R is a sum over tokens: a long calibration answer weighs more, so calibration answers want the policy's own limits.
- The optimistic loss has no lower bound (the pairs see only differences). `calibration_floor` is a guard that the paper
  does not have: an answer with R below it no longer pulls. Off unless set.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llmrl.objectives.dpo import pair_losses, preference_metrics
from llmrl.objectives.scored import Objective, ScoredTokens, starts, sums

Incentive = Literal["optimism", "pessimism"]
Calibration = Literal["chosen", "pair", "samples"]
Schedule = Literal["constant", "inverse_sqrt"]


def calibration_terms(
    ratios_C: Tensor, group_index_C: Tensor, num_groups: int, incentive: Incentive, floor: float | None = None
) -> Tensor:
    """[C] log-ratios of calibration answers, the group of each -> [G]: s times their mean in each group.

    `floor`: answers below it count as the floor, without a gradient. Every group must have an answer.
    """
    floored_C = ratios_C if floor is None else ratios_C.clamp(min=floor)
    counts_G = sums(torch.ones_like(ratios_C), group_index_C, num_groups)
    sign = 1.0 if incentive == "optimism" else -1.0
    return sign * sums(floored_C, group_index_C, num_groups) / counts_G


def alpha_of_round(alpha: float, number: int, schedule: Schedule = "constant") -> float:
    """alpha in round 1, 2, ... of online VPO: the same in each, or alpha / sqrt(round).

    The theory's constant depends on the horizon; neither schedule is the paper's.
    """
    if number < 1:
        raise ValueError(f"rounds are counted from 1, got {number}")
    if schedule not in get_args(Schedule):
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(get_args(Schedule))}")
    return alpha if schedule == "constant" else alpha / math.sqrt(number)


@dataclass(frozen=True)
class VPO:
    """VPO over groups (chosen, rejected, *calibration answers to the same prompt), in this order.

    beta: strength of the pull towards the reference (> 0). alpha: strength of the incentive, in the mean form (>= 0).
    incentive: s above. calibration: who y^c is: the chosen answer (then the term is its negative log-likelihood), both
    of the pair (the behaviour policy), or the `samples` that follow the pair in its group (pi_ref's, say). With
    `chosen` and `pair` nothing more is computed than for DPO. calibration_floor: see above; only with optimism.
    """

    beta: float = 0.1
    alpha: float = 0.5
    incentive: Incentive = "pessimism"
    calibration: Calibration = "chosen"
    calibration_floor: float | None = None

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        for name, known in (("incentive", get_args(Incentive)), ("calibration", get_args(Calibration))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.calibration_floor is not None and not self.calibration_floor < 0:
            raise ValueError(f"calibration_floor must be below 0, where R starts, got {self.calibration_floor}")
        if self.calibration_floor is not None and self.incentive == "pessimism":
            raise ValueError("calibration_floor has no meaning with incentive pessimism, which raises R and is bounded")

    def objective(self) -> Objective:
        return Objective(self.__call__, needs_reference=True)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] log pi of the scored tokens -> (the loss above, a sum over what is here / global pairs; metrics).

        `preference_loss` and `calibration_loss` add up to the loss. `calibration/log_ratio` is the mean R(y^c), in
        nats: 0 at the start; with optimism it falls, and a run in which it falls by whole nats should stop.
        """
        assert scored.reference_logprobs_N is not None, "VPO needs reference log-probabilities"
        ratios_S = scored.sum_per_sequence(logprobs_N - scored.reference_logprobs_N)
        pairs_2G, calibration_C = self._places(scored)
        pair_ratios = ratios_S[pairs_2G]
        losses_G = pair_losses(pair_ratios[0::2] - pair_ratios[1::2], self.beta)
        ratios_C, group_index_C = ratios_S[calibration_C], scored.group_index_S[calibration_C]
        terms_G = calibration_terms(ratios_C, group_index_C, len(losses_G), self.incentive, self.calibration_floor)

        preference = losses_G.sum() / scored.totals.groups
        incentive = self.alpha * self.beta * terms_G.sum() / scored.totals.groups
        metrics = {
            **preference_metrics(self.beta * pair_ratios.detach()),
            "preference_loss": preference.detach(),
            "calibration_loss": incentive.detach(),
            **_calibration_metrics(ratios_C.detach(), group_index_C, len(losses_G), self.calibration_floor),
        }
        return preference + incentive, metrics

    def _places(self, scored: ScoredTokens) -> tuple[Tensor, Tensor]:
        """Indices of (chosen, rejected, chosen, ...) and of the calibration answers; ValueError for another group."""
        if self.calibration == "samples":
            scored.check_groups("calibration samples takes a pair and at least one calibration answer", 3)
        else:
            scored.check_groups(f"calibration {self.calibration} takes a pair and nothing else", 2, 2)
        chosen_G = starts(scored.group_index_S).nonzero()[:, 0]
        pairs_2G = torch.stack([chosen_G, chosen_G + 1], dim=1).flatten()
        if self.calibration == "chosen":
            return pairs_2G, chosen_G
        if self.calibration == "pair":
            return pairs_2G, pairs_2G
        others_S = torch.ones_like(scored.group_index_S, dtype=torch.bool)
        others_S[pairs_2G] = False
        return pairs_2G, others_S.nonzero()[:, 0]


def _calibration_metrics(
    ratios_C: Tensor, group_index_C: Tensor, num_groups: int, floor: float | None
) -> dict[str, Tensor]:
    metrics = {
        "calibration/log_ratio": calibration_terms(ratios_C, group_index_C, num_groups, "optimism"),
        "calibration/log_ratio_min": ratios_C,
    }
    return metrics if floor is None else metrics | {"calibration/floored": (ratios_C < floor).float()}
