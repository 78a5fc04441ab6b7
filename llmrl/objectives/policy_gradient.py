r"""The policy-gradient family as one loss: PPO, LOOP, RLOO, GRPO, Dr.GRPO, GSPO, CISPO, decoupled clipping, REINFORCE.

With the log-ratio l_t = log pi(y_t) - log pi_old(y_t), advantages A_t, and rho the exponential of

    token      l_t                                          sequence   the sum of l over the sequence
    turn       the sum of l over the token's turn           geometric  its mean over the sequence (GSPO)

each token's loss is, by `clip` with the band [lo, hi] = [1 - clip_low, 1 + clip_high],

    ppo         -min( rho A, clip(rho, lo, hi) A )          arXiv 1707.06347, Eq. 7
    reciprocal  the same with lo = 1 / (1 + clip_high)      LOOP's code
    cispo       -stop_gradient(clip(rho, lo, hi)) A log pi  arXiv 2506.13585, Eq. 4: no token loses its gradient
    none        -rho A; with ratio `none` -A log pi

and the loss of a step is a weighted sum over its tokens. With n_S sequences, n_N tokens, |y| the tokens of a sequence:

    token_mean                 1 / n_N                                   PPO, DAPO, CISPO
    sequence_mean_token_mean   1 / (n_S |y|)                             GRPO, LOOP
    sequence_mean_turn_mean    1 / (n_S turns(y) |turn|)                 LOOP by turn
    sequence_mean_token_sum    1 / n_S                                   REINFORCE
    sequence_sum_constant      1 / (n_S length_divisor)                  Dr.GRPO

Invariants
- A ratio of a turn or a sequence is handed to each of its tokens; the mean over them is the paper's single term.
- n_S and n_N count the whole optimizer step, a sequence by its weight (PF-PPO's multiplicities), so that splitting into
  micro-batches cannot change the gradient. Masking a token changes no denominator.
- pi_old is the *learner's* policy when the samples were taken over. The sampler's own log-probabilities enter only
  through the correction weight exp(log pi_old - log pi_sampler), detached: truncated (TIS) or masked (MIS) importance
  sampling, never through rho.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmrl.objectives.scored import Objective, ScoredTokens, starts, sums
from llmrl.objectives.settings import KL, LossSettings
from llmrl.objectives.value import predicted, value_losses, value_metrics

MOST_LOG_RATIO = 20.0
"""Log-ratios are cut here before they are exponentiated (as in verl): beyond, exp overflows and infinity times a zero
gradient is not a number."""


@dataclass(frozen=True)
class PolicyGradient(LossSettings):
    """The loss that its settings describe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation == "sequence_sum_constant" and self.length_divisor is None:
            raise ValueError("aggregation sequence_sum_constant needs length_divisor, the constant that it divides by")

    def objective(self) -> Objective:
        return Objective(
            self.__call__,
            needs_reference=self.beta > 0,
            needs_entropy=self.entropy_coef > 0 or self.log_entropy,
        )

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] log pi of the scored tokens -> (the loss above, metrics).

        The metrics `policy_loss`, `kl_loss`, `entropy_loss` and `value_loss` are the terms that, with the coefficients
        of the last three, add up to the loss: of what is here, over the denominators of the whole step.

        Reads `token_values_N["advantages"]` or `values_S["advantage"]`; `token_values_N["old_logprobs"]`, without which
        this is taken for the first and only update on its samples, rho = 1 exactly; with `value_coef`
        `token_values_N["returns"]` and ["old_values"]. Tokens whose old or sampler's log-probability is not finite are
        left out of every term and counted.
        """
        advantages_N = _advantages(scored)
        usable_N = _usable(scored)
        kept = usable_N.nonzero()[:, 0]
        old_N = _known(scored.token_values_N.get("old_logprobs"), usable_N, logprobs_N.detach())
        log_ratio_N = torch.where(usable_N, logprobs_N - old_N, 0.0)
        shares_N = self.shares(scored) * usable_N

        unit_N, num_units = _units(self.ratio, scored)
        ratio_U = _pooled_ratio(log_ratio_N, unit_N, num_units, usable_N, mean=self.ratio == "geometric")
        ratio_N = ratio_U[unit_N]
        losses_N = self.surrogate(logprobs_N, ratio_N, advantages_N)
        metrics = _ratio_metrics(self, scored, log_ratio_N.detach(), ratio_U.detach(), unit_N, advantages_N, usable_N)
        metrics["approx_kl"] = kl_estimates(old_N, logprobs_N.detach())[kept]
        if scored.behaviour_logprobs_N is not None:
            differences_N = old_N - _known(scored.behaviour_logprobs_N, usable_N, old_N)
            weights_U, of_N = self.correction_weights(differences_N, scored, usable_N)
            metrics |= _sampling_metrics(differences_N[kept], weights_U, usable_N)
            if self.correction != "none":
                losses_N = losses_N * weights_U[of_N]
        terms_N = shares_N * losses_N
        metrics["policy_loss"] = terms_N.detach().sum()
        others, more_metrics = self._other_terms(logprobs_N, scored, shares_N, ratio_N, kept)
        return terms_N.sum() + others, metrics | more_metrics

    def _other_terms(
        self, logprobs_N: Tensor, scored: ScoredTokens, shares_N: Tensor, ratio_N: Tensor, kept: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """KL, entropy and value terms, each where its coefficient is not 0; what is known is reported regardless."""
        loss = torch.zeros((), dtype=logprobs_N.dtype, device=logprobs_N.device)
        metrics: dict[str, Tensor] = {}
        if scored.reference_logprobs_N is not None:
            metrics["kl"] = kl_estimates(logprobs_N.detach(), scored.reference_logprobs_N)[kept]
        if self.beta:
            assert scored.reference_logprobs_N is not None, "beta needs the reference's log-probabilities"
            kl_N = kl_estimates(logprobs_N, scored.reference_logprobs_N, self.kl)
            kl_loss = (shares_N * (kl_N * ratio_N if self.kl_by_ratio else kl_N)).sum()
            loss = loss + self.beta * kl_loss
            metrics["kl_loss"] = kl_loss.detach()
        if scored.entropies_N is not None:
            metrics["entropy"] = scored.entropies_N.detach()[kept]
        if self.entropy_coef:
            assert scored.entropies_N is not None, "entropy_coef needs entropies"
            weights_N = torch.where(shares_N != 0, scored.weights_S[scored.sequence_index_N], 0.0)
            entropy_loss = -(weights_N * scored.entropies_N).sum() / (scored.totals.tokens or 1.0)
            loss = loss + self.entropy_coef * entropy_loss
            metrics["entropy_loss"] = entropy_loss.detach()
        if self.value_coef:
            value_loss = (shares_N * value_losses(*predicted(scored), self.value_clip)).sum()
            loss = loss + self.value_coef * value_loss
            metrics |= {"value_loss": value_loss.detach(), **value_metrics(scored)}
        return loss, metrics

    def surrogate(self, logprobs_N: Tensor, ratio_N: Tensor, advantages_N: Tensor) -> Tensor:
        """[N] -> [N]: each token's loss before it is weighed."""
        low, high = self.band
        if self.ratio == "none":
            return -advantages_N * logprobs_N
        if self.clip == "cispo":
            return -ratio_N.clamp(low, high).detach() * advantages_N * logprobs_N
        if self.clip == "none":
            return -ratio_N * advantages_N
        gains_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
        if self.dual_clip is not None:
            gains_N = torch.where(advantages_N < 0, torch.maximum(gains_N, self.dual_clip * advantages_N), gains_N)
        return -gains_N

    def shares(self, scored: ScoredTokens) -> Tensor:
        """[N]: the factor of each token's loss in the loss of the step, by `aggregation`."""
        weights_N = scored.weights_S[scored.sequence_index_N]
        if self.aggregation == "token_mean":
            return weights_N / (scored.totals.tokens or 1.0)
        shares_N = weights_N / (self.sequences_divisor or scored.totals.sequences or 1.0)
        if self.aggregation == "sequence_sum_constant":
            assert self.length_divisor is not None  # see __post_init__
            return shares_N / self.length_divisor
        if self.aggregation == "sequence_mean_token_sum":
            return shares_N
        sequence_N, num = scored.sequence_index_N, scored.num_sequences
        if self.aggregation == "sequence_mean_token_mean":
            return shares_N / _lengths(sequence_N, num)[sequence_N]
        turn_N, num_turns = _units("turn", scored)
        turns_S = sums(starts(turn_N).float(), sequence_N, num)
        return shares_N / (turns_S[sequence_N] * _lengths(turn_N, num_turns)[turn_N])

    def correction_weights(
        self, differences_N: Tensor, scored: ScoredTokens, usable_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log pi_old - log pi_sampler [N] -> weights of the units that they belong to, and each token's unit [N].

        With correction `none` the bare ratios, for the metrics.
        """
        unit_N, num_units = _units(self.correction_level, scored)
        mean = self.correction_level == "geometric"
        weights_U = _pooled_ratio(differences_N, unit_N, num_units, usable_N, mean).detach()
        if self.correction == "truncate":
            weights_U = weights_U.clamp(self.correction_floor, self.correction_cap)
        elif self.correction == "mask":
            inside_U = (weights_U >= self.correction_floor) & (weights_U <= self.correction_cap)
            weights_U = torch.where(inside_U, weights_U, 0.0)
        return weights_U, unit_N


def kl_estimates(logprobs_N: Tensor, reference_logprobs_N: Tensor, kind: KL = "k3") -> Tensor:
    """[N] -> [N]: estimates of KL(pi || pi_ref) from samples of pi (Schulman, "Approximating KL divergence", 2020)."""
    d_N = (reference_logprobs_N - logprobs_N).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    return {"k1": lambda: -d_N, "k2": lambda: d_N**2 / 2, "k3": lambda: torch.expm1(d_N) - d_N}[kind]()


def _advantages(scored: ScoredTokens) -> Tensor:
    if "advantages" in scored.token_values_N:
        return scored.token_values_N["advantages"]
    if "advantage" in scored.values_S:
        return scored.values_S["advantage"][scored.sequence_index_N]
    raise ValueError('a policy gradient needs token_values["advantages"] or values["advantage"] of every sequence')


def _usable(scored: ScoredTokens) -> Tensor:
    """[N] bool: are the data of the token numbers that a ratio can be taken of?"""
    usable_N = torch.ones_like(scored.sequence_index_N, dtype=torch.bool)
    for known_N in (scored.behaviour_logprobs_N, scored.token_values_N.get("old_logprobs")):
        if known_N is not None:
            usable_N = usable_N & torch.isfinite(known_N)
    return usable_N


def _known(known_N: Tensor | None, usable_N: Tensor, otherwise_N: Tensor) -> Tensor:
    """Data where usable; elsewhere what makes a ratio of 1, so that no infinity reaches a gradient."""
    return otherwise_N if known_N is None else torch.where(usable_N, known_N, otherwise_N)


def _units(level: str, scored: ScoredTokens) -> tuple[Tensor, int]:
    """Index of what shares a ratio with each token [N], and how many of it there are."""
    sequence_N, turn_N = scored.sequence_index_N, scored.turn_index_N
    if level in ("sequence", "geometric"):
        return sequence_N, scored.num_sequences
    if level == "turn":
        unit_N = starts(sequence_N, turn_N).long().cumsum(0) - 1
        return unit_N, int(unit_N[-1]) + 1 if len(unit_N) else 0
    return torch.arange(len(sequence_N), device=sequence_N.device), len(sequence_N)


def _lengths(unit_N: Tensor, num_units: int, counted_N: Tensor | None = None) -> Tensor:
    """[U] float32: tokens of each unit; at least 1, for units without any to be divided by."""
    ones_N = torch.ones_like(unit_N, dtype=torch.float32) if counted_N is None else counted_N.float()
    return sums(ones_N, unit_N, num_units).clamp(min=1)


def _pooled_ratio(log_ratio_N: Tensor, unit_N: Tensor, num_units: int, usable_N: Tensor, mean: bool) -> Tensor:
    """[U]: exp of the sum (or mean) of the usable tokens' log-ratios over each unit."""
    log_ratio_U = sums(torch.where(usable_N, log_ratio_N, 0.0), unit_N, num_units)
    if mean:
        log_ratio_U = log_ratio_U / _lengths(unit_N, num_units, usable_N)
    return log_ratio_U.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()


def _ratio_metrics(
    settings: PolicyGradient,
    scored: ScoredTokens,
    log_ratio_N: Tensor,
    ratio_U: Tensor,
    unit_N: Tensor,
    advantages_N: Tensor,
    usable_N: Tensor,
) -> dict[str, Tensor]:
    """TRL's names; elements are what shares a ratio (a token, a turn, a sequence), for the extremes sequences."""
    sequence_N, num = scored.sequence_index_N, scored.num_sequences
    metrics = {"log_ratio/sequence": sums(log_ratio_N, sequence_N, num)}
    if settings.ratio != "none":
        metrics["ratio/mean"] = ratio_U
    if settings.clip == "none":
        return metrics
    low, high = settings.band
    ratio_N = ratio_U[unit_N]
    # CISPO's weight is clipped whatever the advantage; in PPO's minimum the clipped side wins for one sign only.
    always = settings.clip == "cispo"
    below_N = ((ratio_N < low) & (always | (advantages_N < 0)) & usable_N).float()
    above_N = ((ratio_N > high) & (always | (advantages_N > 0)) & usable_N).float()
    lengths_U, lengths_S = _lengths(unit_N, len(ratio_U), usable_N), _lengths(sequence_N, num, usable_N)
    low_U, high_U = (sums(clipped_N, unit_N, len(ratio_U)) / lengths_U for clipped_N in (below_N, above_N))
    return metrics | {
        "clip_ratio/low_mean": low_U,
        "clip_ratio/high_mean": high_U,
        "clip_ratio/region_mean": low_U + high_U,
        "clip_ratio/low_min": sums(below_N, sequence_N, num) / lengths_S,
        "clip_ratio/high_max": sums(above_N, sequence_N, num) / lengths_S,
    }


def _sampling_metrics(differences: Tensor, weights_U: Tensor, usable_N: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probabilities are from the learner's, and the weights that follow; TRL's names."""
    metrics = {f"sampling/sampling_logp_difference/{name}": differences.abs() for name in ("mean", "max")}
    metrics |= {f"sampling/importance_sampling_ratio/{name}": weights_U for name in ("min", "mean", "max")}
    return metrics | {"sampling/nonfinite": (~usable_N).float()}
