r"""BRAIn: fit the reward-conditioned posterior by self-normalised importance sampling over a prompt's samples.

Pandey, Nandwani, Naseem, Mishra, Xu, Raghu, Joshi, Munawar, Fernandez Astudillo, arXiv 2402.02479v2. Prior p (the SFT
model, frozen), policy q, proposal q' (the model that the samples y_1..y_n were drawn from), reward r. Under a
Bradley-Terry reward model an answer is good with a probability proportional to exp(r / beta), so the posterior is
p(y | x, good) ~ p(y | x) exp(r(x, y) / beta), the optimum of E[r] - beta KL(q || p). Over the n samples of one prompt:

    u_i = log p(y_i) - log q'(y_i) + r_i / beta     alpha = softmax(u)      constant
    v_i = log q(y_i) - log q'(y_i)                  b     = softmax(v)
    L   = mean over prompts of KL(alpha || b),      gradient -sum_i (alpha_i - b_i) grad log q(y_i)

The -b_i is the self-normalised baseline: it estimates E_q[grad log q] = 0 with the same samples. Log-probabilities are
sums over an answer's tokens, its EOS included; no length enters. L is 0 iff q is the posterior on the samples.

Limits: all rewards equal and q = p, no gradient for any q'. q' = p and n = 2 with beta -> 0: DPO with beta 1. q' = q:
REINFORCE with the advantage alpha_i - 1/n, which holds the pull to p.

The paper's body was not readable: the gradient is the authors' code's (BRAIn_experiments), L the simple form with that
gradient. Where they are silent, we decided:
- Equal samples count as often as they were drawn; a sequence of weight w counts as w samples.
- `most_prior_gap` leaves samples with |log p - log q'| above it out of both softmaxes: then q = posterior remains where
  the gradient is zero, which clipping would move. So are samples without a finite log p or log q'.
- A prompt of which nothing is left teaches nothing. Of one with a single sample left, alpha = b = 1: no gradient, but
  without the baseline that sample's plain likelihood. Both count in the mean; in `brain/ess` only the latter, as 1.
- Other models of goodness than Bradley-Terry's: hand beta log(goodness) as the reward.

In the learner a group is never split, so the softmaxes are over whole prompts. Where a prompt's samples together are
too much for one forward pass, take two: log q of all samples without a graph, and the gradient of the loss in them;
then `WeightedLikelihood` with minus that gradient, times the number of prompts, for coefficients, on the samples in any
groups, with the totals of the undivided ones: the same gradient of the weights.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llmrl.objectives.scored import Objective, ScoredTokens, num_indexed, sums

Proposal = Literal["old", "behaviour", "prior"]


def log_weights(scores_S: Tensor, group_index_S: Tensor, kept_S: Tensor | None = None) -> Tensor:
    """[S] -> [S]: log-softmax inside each group, over the samples that are kept; of the others -infinity.

    Groups are numbered from 0. A group of which nothing is kept has no weights: all -infinity.
    """
    kept_S = torch.ones_like(scores_S, dtype=torch.bool) if kept_S is None else kept_S
    num_groups = num_indexed(group_index_S)
    scores_S = torch.where(kept_S, scores_S, -torch.inf)
    top_G = torch.full((num_groups,), -torch.inf, dtype=scores_S.dtype, device=scores_S.device)
    top_G = top_G.scatter_reduce(0, group_index_S, scores_S.detach(), "amax")
    shifted_S = scores_S - torch.where(top_G.isfinite(), top_G, 0.0)[group_index_S]
    sums_G = sums(shifted_S.exp(), group_index_S, num_groups)
    return shifted_S - torch.where(sums_G > 0, sums_G, 1.0).log()[group_index_S]


def target_scores(prior_ratios_S: Tensor, rewards_S: Tensor, beta: float) -> Tensor:
    """[S] log p - log q' and rewards -> [S]: u."""
    return prior_ratios_S + rewards_S / beta


def divergences(target_S: Tensor, policy_S: Tensor, group_index_S: Tensor) -> Tensor:
    """Log-weights log alpha (constant) and log b [S] -> [G]: KL(alpha || b) of each group."""
    target_S = target_S.detach()
    kept_S = target_S.isfinite()
    log_ratio_S = torch.where(kept_S, target_S, 0.0) - torch.where(kept_S, policy_S, 0.0)
    return sums(target_S.exp() * log_ratio_S, group_index_S, num_indexed(group_index_S))


@dataclass(frozen=True)
class BRAIn:
    """BRAIn over groups that are the n >= 2 samples of one prompt, each with `values["reward"]`.

    log p is the reference's. beta: temperature of the target (> 0): rewards matter only as r / beta. proposal: where
    log q' comes from: `old`, `token_values["old_logprobs"]`, the learner's own log-probabilities of the model that
    sampled (exact for sampling at temperature 1 without top-p or top-k); `behaviour`, what the sampler said; `prior`,
    all samples are p's. baseline: without it the loss is -sum alpha_i log q(y_i), an ablation. most_prior_gap: nats.
    """

    beta: float = 1.0
    proposal: Proposal = "old"
    baseline: bool = True
    most_prior_gap: float | None = None

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if self.proposal not in get_args(Proposal):
            raise ValueError(f"unknown proposal {self.proposal!r}; known: {', '.join(get_args(Proposal))}")
        if self.most_prior_gap is not None and not self.most_prior_gap > 0:
            raise ValueError(f"most_prior_gap must be above 0, got {self.most_prior_gap}")
        if self.most_prior_gap is not None and self.proposal == "prior":
            raise ValueError("most_prior_gap has no meaning with proposal prior: the gap is 0")

    def objective(self) -> Objective:
        return Objective(self.__call__, needs_reference=True)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """[N] log q of the scored tokens -> (sum over the prompts here of the loss above / global prompts, metrics).

        `brain/ess` is 1 / sum alpha^2, the samples that the target rests on, of n; `brain/kl` is KL(alpha || b) of each
        prompt; `brain/prior_log_ratio` is log q - log p of each sample.
        """
        reference_N, proposal_N, rewards_S = self._constants(scored)
        scored.check_groups("BRAIn takes two samples of a prompt or more", 2)
        # Differences are taken token by token: sums of hundreds of nats would round them away.
        prior_ratios_S = scored.sum_per_sequence(reference_N - proposal_N)
        policy_ratios_S = scored.sum_per_sequence(logprobs_N - proposal_N)
        kept_S = _kept(prior_ratios_S, self.most_prior_gap)
        group_S, counts_S = scored.group_index_S, scored.weights_S.log()
        target_S = log_weights(target_scores(prior_ratios_S, rewards_S, self.beta) + counts_S, group_S, kept_S)
        kl_G = divergences(target_S, log_weights(policy_ratios_S + counts_S, group_S, kept_S), group_S)
        losses_G = kl_G
        if not self.baseline:
            losses_G = -scored.sum_per_group(target_S.exp() * scored.sum_per_sequence(logprobs_N))
        return losses_G.sum() / scored.totals.groups, {
            "brain/kl": kl_G.detach(),
            **_target_metrics(scored.sum_per_group(target_S.exp() ** 2)),
            "brain/left_out": (~kept_S).float(),
            "brain/prior_log_ratio": scored.sum_per_sequence(logprobs_N.detach() - reference_N)[kept_S],
            "reward": rewards_S,
        }

    def _constants(self, scored: ScoredTokens) -> tuple[Tensor, Tensor, Tensor]:
        """log p and log q' [N], r [S]; ValueError names what is missing."""
        assert scored.reference_logprobs_N is not None, "BRAIn needs the prior's log-probabilities as the reference's"
        if "reward" not in scored.values_S:
            raise ValueError('BRAIn needs values["reward"] of every sample')
        proposal_N = {
            "old": scored.token_values_N.get("old_logprobs"),
            "behaviour": scored.behaviour_logprobs_N,
            "prior": scored.reference_logprobs_N,
        }[self.proposal]
        if proposal_N is None:
            place = 'token_values["old_logprobs"]' if self.proposal == "old" else "behaviour_logprobs"
            raise ValueError(f"proposal {self.proposal} needs {place} of every sample; if all are the prior's: prior")
        return scored.reference_logprobs_N, proposal_N, scored.values_S["reward"]


@dataclass(frozen=True)
class WeightedLikelihood:
    """-sum_i c_i log q(y_i) / global groups, c = `values["coefficient"]`: the second pass of a two-pass method.

    Sequences stand in any groups; hand `Learner.update` the totals of the groups that the coefficients were made of.
    """

    def objective(self) -> Objective:
        return Objective(self.__call__)

    def __call__(self, logprobs_N: Tensor, scored: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        if "coefficient" not in scored.values_S:
            raise ValueError('a weighted likelihood needs values["coefficient"] of every sequence')
        coefficients_S = scored.values_S["coefficient"]
        loss = -(coefficients_S * scored.sum_per_sequence(logprobs_N)).sum() / scored.totals.groups
        return loss, {"coefficient/abs": coefficients_S.abs()}


def _kept(prior_ratios_S: Tensor, most_gap: float | None) -> Tensor:
    """[S] bool: which samples take part."""
    kept_S = prior_ratios_S.isfinite()
    return kept_S if most_gap is None else kept_S & (prior_ratios_S.abs() <= most_gap)


def _target_metrics(squares_G: Tensor) -> dict[str, Tensor]:
    """Effective sample size from the sum of alpha^2, of the groups of which something was kept: mean and smallest."""
    ess_G = 1 / squares_G[squares_G > 0]
    return {"brain/ess": ess_G, "brain/ess_min": ess_G}
