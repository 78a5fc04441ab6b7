r"""Direct Advantage Policy Optimization: regress a step's log-ratio on its advantage, from a critic trained apart.

Liu, Wang, Liu, Zeng, Yan, Sun, Liu, Zhou, arXiv 2412.18279 (NeurIPS 2025). The paper abbreviates it DAPO; it has
nothing to do with the decoupled-clip DAPO (arXiv 2503.14476, here `dapo_clip`). An answer is split into steps, a state
s is the prompt with the steps so far, an action a the next step, and V(s) the probability that the reference, going on
from s, ends right.

    actor     u(s,a) = sum over the tokens of a of [log pi - log pi_ref]
              L = mean over states of the mean over their actions of  1/2 (A(s,a) / beta - u(s,a))^2         Eq. 12
    advantage A(s,a_i) = V(s o a_i) - 1/M sum_j V(s o a_j)    a_1..a_M ~ pi_ref(. | s), equal ones counted   Eq. 13
    critic    L = mean over states of  -m log v - (1 - m) log(1 - v),   v = sigma(logit at s's last token)   Eqs. 14-15

m is the share of right ones among the completions of s. The actor's gradient at u = 0 is REINFORCE with A / beta.

Where the paper is silent, we decided:
- A step holds the delimiter that closes it, the last one the EOS.
- Actions of a state are weighed alike (App. F.1: states uniform, actions uniform over the unique ones), so a state with
  many actions weighs no more than one with few. `average: action` is the plain mean over rows.
- An action that ends the answer has its true outcome for a value; the paper applies V to states that go on.
- Equal actions that were given different values (outcomes, or rates instead of a critic) count as their mean.
- Targets are large: A 0.3 at beta 0.01 asks for 30 nats. Nothing is clipped here; the learner's gradient clipping is.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal, NamedTuple, TypeVar, get_args

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from llmrl.objectives.scored import Objective, ScoredTokens

Average = Literal["state", "action"]
Action = TypeVar("Action", bound=Hashable)


def step_advantages(values: Sequence[float], actions: Sequence[Action]) -> dict[Action, float]:
    """Values of the M states that candidate actions lead to -> the advantage of each different action (Eq. 13).

    The mean that is subtracted runs over all M, equal actions counted; each action then stands once.
    """
    if not values or len(values) != len(actions):
        raise ValueError(f"{len(values)} values for {len(actions)} candidate actions")
    base = fsum(values) / len(values)
    of_action: dict[Action, list[float]] = {}
    for action, value in zip(actions, values, strict=True):
        of_action.setdefault(action, []).append(value)
    return {action: fsum(found) / len(found) - base for action, found in of_action.items()}


def spread(advantages: dict[Action, float]) -> float:
    """max A - min A: a state whose spread is below the gap (paper: 0.1) is left out of the actor's training."""
    return max(advantages.values()) - min(advantages.values())


def step_losses(log_ratios_S: Tensor, advantages_S: Tensor, beta: float) -> Tensor:
    """[S] u and A of state-action rows -> [S]: 1/2 (A / beta - u)^2."""
    return 0.5 * (advantages_S / beta - log_ratios_S) ** 2


@dataclass(frozen=True)
class DirectAdvantage:
    """The actor, over groups that are all actions of one state: rows (state, action), scored on the action's tokens.

    Each row has `values["advantage"]`; a group of one is a state with one action. beta: temperature (paper: 0.01 or
    0.02). average: what counts alike, states or rows.
    """

    beta: float = 0.02
    average: Average = "state"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if self.average not in get_args(Average):
            raise ValueError(f"unknown average {self.average!r}; known: {', '.join(get_args(Average))}")

    def objective(self) -> Objective:
        return Objective(self.__call__, needs_reference=True)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] log pi of the actions' tokens -> (the loss above, a sum over what is here / a global count; metrics).

        Metrics, per row: `step/log_ratio` u, `step/target_abs` |A| / beta, `step/error_abs` |A / beta - u|, all in
        nats; `step/agreement` whether u has A's sign, of the rows whose A is not 0.
        """
        assert scored.reference_logprobs_N is not None, "Direct Advantage needs reference log-probabilities"
        if "advantage" not in scored.values_S:
            raise ValueError('Direct Advantage needs values["advantage"] of every row')
        advantages_S = scored.values_S["advantage"]
        log_ratios_S = scored.sum_per_sequence(logprobs_N - scored.reference_logprobs_N)
        losses_S = step_losses(log_ratios_S, advantages_S, self.beta)
        loss = (self.shares(scored) * losses_S).sum()
        return loss, _step_metrics(log_ratios_S.detach(), advantages_S, self.beta)

    def shares(self, scored: ScoredTokens) -> Tensor:
        """[S]: the factor of each row's loss in the loss of the step."""
        if self.average == "action":
            return scored.weights_S / (scored.totals.sequences or 1.0)
        rows_S = scored.sum_per_group(scored.weights_S)[scored.group_index_S]
        return scored.weights_S / rows_S / scored.totals.groups


def _step_metrics(log_ratios_S: Tensor, advantages_S: Tensor, beta: float) -> dict[str, Tensor]:
    targets_S = advantages_S / beta
    apart = advantages_S != 0
    return {
        "step/log_ratio": log_ratios_S,
        "step/log_ratio_max": log_ratios_S,
        "step/log_ratio_min": log_ratios_S,
        "step/target_abs": targets_S.abs(),
        "step/error_abs": (targets_S - log_ratios_S).abs(),
        "step/agreement": (log_ratios_S.sign() == advantages_S.sign()).float()[apart],
    }


@dataclass(frozen=True)
class SuccessRateCritic:
    """The critic: a value head's number as the logit of the success rate (Eqs. 14-15).

    The value head speaks at the token before each scored one. So a state is its tokens with one more behind them, any
    one, which alone is scored and whose `token_values["success_rate"]` is m; or the states of one answer are scored at
    once, each at the first token after it.
    """

    def objective(self) -> Objective:
        return Objective(self.__call__)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (sum over the states here of the cross-entropy / global number of states, metrics)."""
        if scored.predicted_values_N is None:
            raise ValueError("a success-rate critic needs a model with a value head")
        if "success_rate" not in scored.token_values_N:
            raise ValueError('a success-rate critic needs token_values["success_rate"] at every scored token')
        logits_N, rates_N = scored.predicted_values_N.float(), scored.token_values_N["success_rate"]
        losses_N = binary_cross_entropy_with_logits(logits_N, rates_N, reduction="none")
        weights_N = scored.weights_S[scored.sequence_index_N]
        # The zero keeps the log-probabilities in the graph: ranks that share gradients expect one of every parameter.
        loss = (weights_N * losses_N).sum() / (scored.totals.tokens or 1.0) + 0.0 * logprobs_N.sum()
        probabilities_N = logits_N.detach().sigmoid()
        return loss, {
            "critic_loss": loss.detach(),
            "critic/probability": probabilities_N,
            "critic/success_rate": rates_N,
            "critic/brier": (probabilities_N - rates_N) ** 2,
        }


class Bin(NamedTuple):
    """States whose predicted success lies in one interval: how many, the mean prediction, the mean rate."""

    num_states: int
    predicted: float
    rate: float


class Reliability(NamedTuple):
    """A critic against held-out success rates.

    brier: mean (v - m)^2. brier_of_mean: that of always saying the mean rate; a critic that knows something is below.
    error: expected calibration error, the mean over states of |mean v - mean m| of their bin. bins: those not empty.
    """

    brier: float
    brier_of_mean: float
    error: float
    bins: list[Bin]


def reliability(probabilities: Sequence[float], rates: Sequence[float], num_bins: int = 10) -> Reliability:
    """Predictions v and success rates m of the same states -> calibration, in bins of equal width."""
    if not probabilities or len(probabilities) != len(rates):
        raise ValueError(f"{len(probabilities)} predictions for {len(rates)} success rates")
    count, mean_rate = len(rates), fsum(rates) / len(rates)
    members: dict[int, list[tuple[float, float]]] = {}
    for v, m in zip(probabilities, rates, strict=True):
        members.setdefault(min(int(v * num_bins), num_bins - 1), []).append((v, m))
    bins = [
        Bin(len(found), fsum(v for v, _ in found) / len(found), fsum(m for _, m in found) / len(found))
        for _, found in sorted(members.items())
    ]
    return Reliability(
        brier=fsum((v - m) ** 2 for v, m in zip(probabilities, rates, strict=True)) / count,
        brier_of_mean=fsum((mean_rate - m) ** 2 for m in rates) / count,
        error=fsum(b.num_states * abs(b.predicted - b.rate) for b in bins) / count,
        bins=bins,
    )
