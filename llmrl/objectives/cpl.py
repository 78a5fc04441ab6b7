r"""Contrastive Preference Learning: preferences between segments of behaviour, explained by regret.

Hejna, Rafailov, Sikchi, Finn, Niekum, Knox, Sadigh, arXiv 2310.13639; the formulas are those of the authors' code
(jhejna/cpl), for we could not read the paper's body. In maximum-entropy RL the optimal advantage of an action is
alpha log pi*(a | s), so a segment's regret needs no reward model and no value, only the policy:

    A(seg)   = alpha sum_t gamma^t log pi(a_t | s_t)          CPL-KL: log pi - log pi_ref in its place
    l(p, n)  = softplus(-(A(p) - lam A(n)))                   p preferred, n not; 0 < lam <= 1
    pair     = y l(second, first) + (1 - y) l(first, second)  y = 1: the second is preferred; y = 1/2: a tie
    L        = mean of the pairs + bc_coef L_bc,   L_bc = mean of -log pi(a_t | s_t) over steps

Only advantages are added up, so the two segments may start in different states, or answer different prompts (DPO
needs a common start). lam scales the side that was not preferred alone: below 1 the loss no longer ignores a common
shift of both log-likelihoods but falls as they rise (the conservative bias), so the policy stays near the data.

    cpl      lam 0.5, alpha 0.1
    cpl_bc   lam 1, alpha 0.1, bc_coef 1 (authors: 1 for states, 1.5 for images)
    cpl_kl   lam 0.75, alpha 0.2, against a reference; with lam 1 and a common start this is DPO with beta = alpha

Where the text is silent or speaks of robots, we decided:
- A step is a token, or a turn (whose log-probability is the sum of its tokens'); what the environment or a user says is
  not scored. t counts steps from the segment's first. The code does not discount (gamma 1); with gamma 1 and sums both
  kinds of step are the same loss.
- `mean_per_step` divides A by the number of steps, as in the authors' code for human data, against the pull towards
  short preferred and long other segments; alpha then wants to be larger by about that number.
- L_bc is a mean over a segment's steps, then over segments. In the code all segments have 64 steps, where that is the
  mean over all steps. `preferred` takes the preferred side alone; of a tie half of each.
- A tie averages both directions, among scored segments too (there the code leaves ties to the order of sorting), and
  no pair is dropped (the code drops pairs whose loss is exactly 0 from its mean).
- Dense comparisons are all pairs inside a group; the loss is the mean of the groups' means. In segments from different
  prompts the scores must be advantages, not rewards.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from llmrl.objectives.scored import Objective, ScoredTokens, starts

Step = Literal["token", "turn"]
Cloned = Literal["all", "preferred"]
Comparisons = Literal["pairs", "dense"]

VARIANTS: dict[str, dict[str, Any]] = {
    "cpl": {"alpha": 0.1, "lam": 0.5},
    "cpl_bc": {"alpha": 0.1, "lam": 1.0, "bc_coef": 1.0},
    "cpl_kl": {"alpha": 0.2, "lam": 0.75, "reference": True},
}
"""The authors' variants by name: settings of CPL."""


class Comparison(NamedTuple):
    """Q compared pairs of segments: indices of both, how far the first is preferred (1, 1/2, 0 or between), and each
    pair's share of its group (the shares of a group's pairs add up to 1)."""

    first_Q: Tensor
    second_Q: Tensor
    first_preferred_Q: Tensor
    share_Q: Tensor


def comparison_losses(first_Q: Tensor, second_Q: Tensor, first_preferred_Q: Tensor, lam: float) -> Tensor:
    """Scores A of the first and second segment, how far the first is preferred -> [Q] losses."""
    wins_Q, loses_Q = softplus(-(first_Q - lam * second_Q)), softplus(-(second_Q - lam * first_Q))
    return first_preferred_Q * wins_Q + (1 - first_preferred_Q) * loses_Q


def step_ranks(scored: ScoredTokens, step: Step) -> tuple[Tensor, Tensor]:
    """Each token's step, counted from 0 at its segment's first [N]; the number of steps of each segment [S] float32."""
    sequence_N, turn_N = scored.sequence_index_N, scored.turn_index_N
    starts_N = starts(sequence_N)
    opens_N = starts(sequence_N, turn_N) if step == "turn" else torch.ones_like(starts_N)
    counts_N = opens_N.cumsum(0)
    first_S = torch.zeros(scored.num_sequences, dtype=torch.long, device=sequence_N.device)
    first_S[sequence_N[starts_N]] = counts_N[starts_N]
    return counts_N - first_S[sequence_N], scored.sum_per_sequence(opens_N)


@dataclass(frozen=True)
class BehaviourCloning:
    """L_bc alone, on all segments of a group: the phase before the preferences (authors: 2/5 of all steps)."""

    step: Step = "token"

    def objective(self) -> Objective:
        return Objective(self.__call__)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] log pi -> (mean over segments of the mean over steps of -log pi, metrics)."""
        nll_S = _step_nll(logprobs_N, scored, self.step)
        loss = (scored.weights_S * nll_S).sum() / (scored.totals.sequences or 1.0)
        return loss, {"bc_loss": loss.detach()}


@dataclass(frozen=True)
class CPL:
    """CPL over groups of segments; `VARIANTS` has the published settings.

    alpha: temperature of the score (> 0). lam: lambda, in (0, 1]. gamma: discount a step, in (0, 1]. step: what a step
    is. mean_per_step: scores are means over steps. reference: scores are taken against it (CPL-KL). bc_coef: weight of
    L_bc, bc_on: of which segments. comparisons: `pairs` takes groups (first, second) whose `values["label"]`, the same
    on both, is y: 0 the first is preferred (so it is without a label), 1 the second, 1/2 neither; `dense` takes groups
    of two and more with `values["score"]`, and compares all by it.
    """

    alpha: float = 0.1
    lam: float = 0.5
    gamma: float = 1.0
    step: Step = "token"
    mean_per_step: bool = False
    reference: bool = False
    bc_coef: float = 0.0
    bc_on: Cloned = "all"
    comparisons: Comparisons = "pairs"

    def __post_init__(self) -> None:
        choices = {"step": Step, "bc_on": Cloned, "comparisons": Comparisons}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(get_args(known))}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        for name in ("lam", "gamma"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if not self.bc_coef >= 0:
            raise ValueError(f"bc_coef must not be negative, got {self.bc_coef}")
        if self.bc_on == "preferred" and self.comparisons == "dense":
            raise ValueError("bc_on preferred needs comparisons pairs: among many segments none is the preferred one")

    def objective(self) -> Objective:
        return Objective(self.__call__, needs_reference=self.reference)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] log pi of the scored tokens -> (the loss above, a sum over what is here / global groups; metrics).

        `cpl_loss` and bc_coef times `bc_loss` add up to the loss. `cpl/logit_abs` is |A(p) - lam A(n)|: if it is not
        of the order of 1 at the start, the logistic is saturated and alpha too large. Ties are in no accuracy.
        """
        scores_S = self.scores(logprobs_N, scored)
        pairs = self.compared(scored)
        first_Q, second_Q = scores_S[pairs.first_Q], scores_S[pairs.second_Q]
        losses_Q = comparison_losses(first_Q, second_Q, pairs.first_preferred_Q, self.lam)
        loss = cpl = (pairs.share_Q * losses_Q).sum() / scored.totals.groups
        metrics = {"cpl_loss": cpl.detach(), **_metrics(self, scores_S.detach(), pairs, logprobs_N.detach(), scored)}
        if self.bc_coef:
            cloning = self._cloning(logprobs_N, scored, pairs)
            loss = loss + self.bc_coef * cloning
            metrics["bc_loss"] = cloning.detach()
        return loss, metrics

    def scores(self, logprobs_N: Tensor, scored: ScoredTokens) -> Tensor:
        """[N] -> [S] float32: A of each segment."""
        if self.reference:
            assert scored.reference_logprobs_N is not None, "CPL-KL needs reference log-probabilities"
            logprobs_N = logprobs_N - scored.reference_logprobs_N
        if self.gamma == 1 and not self.mean_per_step:
            return self.alpha * scored.sum_per_sequence(logprobs_N)
        rank_N, steps_S = step_ranks(scored, self.step)
        sums_S = scored.sum_per_sequence(self.gamma**rank_N * logprobs_N)
        return self.alpha * (sums_S / steps_S.clamp(min=1) if self.mean_per_step else sums_S)

    def compared(self, scored: ScoredTokens) -> Comparison:
        """Which segments are compared; ValueError names a group that has too few or too many."""
        pairwise = self.comparisons == "pairs"
        wanted = "two segments" if pairwise else "two segments or more"
        scored.check_groups(f"comparisons {self.comparisons} takes {wanted}", 2, 2 if pairwise else None)
        first, second, share, start = [], [], [], 0
        for size in scored.group_sizes:
            pairs = [(i, j) for i in range(start, start + size) for j in range(i + 1, start + size)]
            first += [i for i, _ in pairs]
            second += [j for _, j in pairs]
            share += [1 / len(pairs)] * len(pairs)
            start += size
        device = scored.group_index_S.device
        first_Q, second_Q = torch.tensor(first, device=device), torch.tensor(second, device=device)
        preferred_Q = self._preferred(scored, first_Q, second_Q)
        return Comparison(first_Q, second_Q, preferred_Q, torch.tensor(share, dtype=torch.float32, device=device))

    def _preferred(self, scored: ScoredTokens, first_Q: Tensor, second_Q: Tensor) -> Tensor:
        if self.comparisons == "pairs":
            label_S = scored.values_S.get("label")
            return torch.ones_like(first_Q, dtype=torch.float32) if label_S is None else 1 - label_S[first_Q]
        if "score" not in scored.values_S:
            raise ValueError('dense comparisons need values["score"] of every segment')
        first_scores_Q, second_scores_Q = scored.values_S["score"][first_Q], scored.values_S["score"][second_Q]
        return ((first_scores_Q > second_scores_Q).float() + (first_scores_Q >= second_scores_Q).float()) / 2

    def _cloning(self, logprobs_N: Tensor, scored: ScoredTokens, pairs: Comparison) -> Tensor:
        """This micro-batch's share of L_bc."""
        nll_S = _step_nll(logprobs_N, scored, self.step)
        if self.bc_on == "preferred":
            first, preferred_Q = nll_S[pairs.first_Q], pairs.first_preferred_Q
            return (preferred_Q * first + (1 - preferred_Q) * nll_S[pairs.second_Q]).sum() / scored.totals.groups
        return (scored.weights_S * nll_S).sum() / (scored.totals.sequences or 1.0)


def _step_nll(logprobs_N: Tensor, scored: ScoredTokens, step: Step) -> Tensor:
    """[S]: the mean over a segment's steps of -log pi."""
    _, steps_S = step_ranks(scored, step)
    return -scored.sum_per_sequence(logprobs_N) / steps_S.clamp(min=1)


def _metrics(
    settings: CPL, scores_S: Tensor, pairs: Comparison, logprobs_N: Tensor, scored: ScoredTokens
) -> dict[str, Tensor]:
    """TRL's names of preference metrics, of the pairs that are no tie; scores are the implicit rewards of segments."""
    decided = (pairs.first_preferred_Q != 0.5).nonzero()[:, 0]
    first, second = pairs.first_Q[decided], pairs.second_Q[decided]
    is_first = pairs.first_preferred_Q[decided] > 0.5
    better, worse = torch.where(is_first, first, second), torch.where(is_first, second, first)
    chosen, rejected = scores_S[better], scores_S[worse]
    logps_S = scored.sum_per_sequence(logprobs_N)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": ((chosen > rejected).float() + (chosen >= rejected).float()) / 2,
        "logps/chosen": logps_S[better],
        "logps/rejected": logps_S[worse],
        "cpl/logit_abs": (chosen - settings.lam * rejected).abs(),
        "cpl/ties": (pairs.first_preferred_Q == 0.5).float(),
    }
