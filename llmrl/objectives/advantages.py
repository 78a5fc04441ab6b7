r"""Advantages: from rewards of sequences, or of tokens and a critic's values, to one number per sequence or token.

Invariants
- Pure functions of detached numbers; nothing here is differentiated. Sums are taken in float64, results come back in
  the dtype that came in, so an order of summation cannot move an advantage.
- "Per token" is per *scored* token: observations between them do not exist here. The next token of a sequence's last
  token before an observation is its first token after it.
- The tokens of a sequence stand next to each other and in order; so do the sequences of a group.
- A group of one has no baseline but itself: its group-relative advantage is 0. So is that of a group whose rewards are
  all equal, exactly, whatever it is divided by.
"""

from typing import Literal

import torch
from torch import Tensor

from llmrl.objectives.scored import num_indexed, starts, sums

Scale = Literal["none", "group", "batch"]


def leave_one_out(rewards_S: Tensor, group_index_S: Tensor, divide_by_std: bool = False) -> Tensor:
    """[S] -> [S]: A_k = R_k - mean of the other rewards of its group = K/(K-1) (R_k - mean R).

    LOOP (Chen et al., arXiv 2502.01600, Eq. 3) and RLOO (Ahmadian et al., arXiv 2402.14740). `divide_by_std` is LOOP's
    RwNorm ablation: divided by the group's population standard deviation, at least 1e-7 as in the authors' code.
    """
    centred_S, size_S = _centred(rewards_S, group_index_S)
    advantages_S = centred_S * size_S / (size_S - 1).clamp(min=1)
    if divide_by_std:
        advantages_S = advantages_S / _group_std(centred_S, group_index_S, size_S, unbiased=False).clamp(min=1e-7)
    return advantages_S.to(rewards_S.dtype)


def group_mean(rewards_S: Tensor, group_index_S: Tensor) -> Tensor:
    """[S] -> [S]: R - mean of its group, itself included. Dr.GRPO (arXiv 2503.20783), REINFORCE with a baseline."""
    return _centred(rewards_S, group_index_S)[0].to(rewards_S.dtype)


def group_normalised(
    rewards_S: Tensor, group_index_S: Tensor, eps: float = 1e-4, unbiased: bool = True, scale: Scale = "group"
) -> Tensor:
    """[S] -> [S]: (R - mean of its group) / (std + eps). GRPO (Shao et al., arXiv 2402.03300).

    `scale` says whose standard deviation: of the group, of all rewards of the batch, or none (then as `group_mean`).
    unbiased: the sample's (n - 1) as in TRL, verl and OpenRLHF; otherwise the population's. eps: TRL 1e-4, verl 1e-6.
    """
    centred_S, size_S = _centred(rewards_S, group_index_S)
    if scale == "group":
        centred_S = centred_S / (_group_std(centred_S, group_index_S, size_S, unbiased) + eps)
    elif scale == "batch":
        std = rewards_S.double().std(correction=int(unbiased)) if len(rewards_S) > 1 else torch.zeros(())
        centred_S = torch.where(centred_S == 0, 0.0, centred_S / (std + eps))
    return centred_S.to(rewards_S.dtype)


def batch_normalised(advantages_S: Tensor, lengths_S: Tensor, unbiased: bool = False, eps: float = 1e-8) -> Tensor:
    """[S] -> [S]: advantages whitened over all tokens of the batch, each sequence counting by its length.

    REINFORCE++ with a group baseline (Hu, arXiv 2501.03262). unbiased: False as in OpenRLHF; verl takes the sample's.
    """
    return whiten(advantages_S, lengths_S, unbiased, eps)


def whiten(values_N: Tensor, weights_N: Tensor | None = None, unbiased: bool = True, eps: float = 1e-8) -> Tensor:
    """[N] -> [N]: (x - mean) / sqrt(var + eps); `weights_N` are counts, unbiased divides by their sum less 1.

    PPO's advantages are whitened after the returns are taken from them: unbiased in TRL and verl, with the
    population's variance in OpenRLHF (RLSP, PF-PPO). Of values that are all equal nothing remains: zeros.
    """
    x = values_N.double()
    w = torch.ones_like(x) if weights_N is None else weights_N.double()
    total = w.sum()
    centred = x - (w * x).sum() / total.clamp(min=1e-300)
    variance = (w * centred**2).sum() / (total - int(unbiased)).clamp(min=1e-300)
    equal = len(x) == 0 or bool(x.max() == x.min())
    return torch.zeros_like(values_N) if equal else (centred / (variance + eps).sqrt()).to(values_N.dtype)


def shaped_rewards(
    scores_S: Tensor,
    old_logprobs_N: Tensor,
    reference_logprobs_N: Tensor,
    sequence_index_N: Tensor,
    beta: float,
    clip: float | None = None,
) -> Tensor:
    """[S], [N] -> [N]: r_t = -beta (log pi_old - log pi_ref), and the sequence's score on its last token.

    The KL term is the k1 estimate, detached: PPO (Ouyang et al., arXiv 2203.02155), RLSP, PF-PPO. clip: scores are cut
    to [-clip, clip] first (10 in OpenRLHF). The score goes to the last token whether or not it is an end token;
    a sequence without a scored token has no place for it.
    """
    _check_finite(scores_S)
    kl_N = old_logprobs_N - reference_logprobs_N
    scores_S = scores_S.to(kl_N.dtype) if clip is None else scores_S.to(kl_N.dtype).clamp(-clip, clip)
    return torch.where(is_last(sequence_index_N), scores_S[sequence_index_N], 0.0) - beta * kl_N


def shaped_scores(
    scores_S: Tensor, old_logprobs_N: Tensor, reference_logprobs_N: Tensor, sequence_index_N: Tensor, beta: float
) -> Tensor:
    """[S], [N] -> [S]: R - beta sum_t (log pi_old - log pi_ref), the reward of RLOO (arXiv 2402.14740, Eq. 3)."""
    _check_finite(scores_S)
    kl_S = sums((old_logprobs_N - reference_logprobs_N).double(), sequence_index_N, len(scores_S))
    return (scores_S.double() - beta * kl_S).to(scores_S.dtype)


def gae(
    rewards_N: Tensor, values_N: Tensor, sequence_index_N: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """[N], [N] -> advantages [N], returns [N]. Schulman et al., arXiv 1506.02438, Eq. 16.

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after a sequence's last token; A_t = delta_t + gamma lam A_{t+1};
    return = A_t + V_t, what the critic regresses on. V_t is the value *before* token t: of the position predicting it.
    """
    values, rewards = values_N.double(), rewards_N.double()
    next_values = torch.where(is_last(sequence_index_N), 0.0, values.roll(-1))
    advantages = discounted_sums(rewards + gamma * next_values - values, sequence_index_N, gamma * lam)
    return advantages.to(rewards_N.dtype), (advantages + values).to(rewards_N.dtype)


def reward_to_go(rewards_N: Tensor, sequence_index_N: Tensor, gamma: float = 1.0) -> Tensor:
    """[N] -> [N]: sum_{j>=0} gamma^j r_{t+j} to the sequence's end. REINFORCE++ (arXiv 2501.03262)."""
    return discounted_sums(rewards_N.double(), sequence_index_N, gamma).to(rewards_N.dtype)


def discounted_sums(values_N: Tensor, sequence_index_N: Tensor, factor: float) -> Tensor:
    """[N] -> [N]: y_t = x_t + factor y_{t+1}, from each sequence's end to its beginning.

    By doubling: after round k, y_t holds the first 2^k terms of its sum. log2(longest sequence) passes over [N]
    instead of one step per token, and no padding.
    """
    sums = values_N.clone()
    reach = 1
    while reach < len(sums):
        same = sequence_index_N[reach:] == sequence_index_N[:-reach]
        if not same.any():
            break
        sums[:-reach] += torch.where(same, factor**reach * sums[reach:], 0.0)
        reach *= 2
    return sums


def is_last(sequence_index_N: Tensor) -> Tensor:
    """[N] -> [N] bool: is this the last scored token of its sequence?"""
    return starts(sequence_index_N).roll(-1)  # before each start; the first start's is the last token of all


def worth_training(advantages_S: Tensor, least: float = 0.01, multiple_of: int = 1) -> list[int]:
    """Indices of the sequences with |A| >= `least`, the largest first. LOOP's filter (authors' code, default 0.01).

    Their number is rounded up to a multiple of `multiple_of` (the ranks), at least one each, with those that come
    next; never more than there are.
    """
    sizes = advantages_S.abs()
    kept = max(int((sizes >= least).sum()), 1)
    kept = min(-(-kept // multiple_of) * multiple_of, len(sizes))
    return sizes.sort(descending=True, stable=True).indices[:kept].tolist()


def _check_finite(rewards_S: Tensor) -> None:
    bad = (~torch.isfinite(rewards_S)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"rewards of sequences {bad[:5]} are not finite: leave out what has no score")


def _centred(rewards_S: Tensor, group_index_S: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards less their group's mean, exactly 0 where all of a group are equal, and group sizes; float64 [S] each."""
    _check_finite(rewards_S)
    rewards = rewards_S.double()
    num_groups = num_indexed(group_index_S)
    size_S = sums(torch.ones_like(rewards), group_index_S, num_groups)[group_index_S]
    mean_S = sums(rewards, group_index_S, num_groups)[group_index_S] / size_S
    zeros_G = torch.zeros(num_groups, dtype=torch.float64, device=rewards.device)
    low_S, high_S = (
        zeros_G.scatter_reduce(0, group_index_S, rewards, how, include_self=False)[group_index_S]
        for how in ("amin", "amax")
    )
    return torch.where(low_S == high_S, 0.0, rewards - mean_S), size_S


def _group_std(centred_S: Tensor, group_index_S: Tensor, size_S: Tensor, unbiased: bool) -> Tensor:
    """[S]: the standard deviation of each sequence's group; of a group of equal ones (centred: 0) taken as 1."""
    squares_S = sums(centred_S**2, group_index_S, num_indexed(group_index_S))[group_index_S]
    std_S = (squares_S / (size_S - int(unbiased)).clamp(min=1)).sqrt()
    return torch.where(squares_S == 0, 1.0, std_S)
