r"""DPO seen as a Q-function: what a policy trained by preferences says of single tokens and states.

Rafailov, Hejna, Park, Finn, "From r to Q*", arXiv 2404.12358. In the token MDP (a state is all tokens so far, an action
the next token, no discount, V* = 0 after the end) a DPO policy is optimal for some reward r:

    Q*(s,a)  = r(s,a) + beta log pi_ref(a | s) + V*(s')                        Eqs. 5-7
    V*(s)    = beta log sum_a exp(Q*(s,a) / beta)
    pi*(a|s) = exp((Q*(s,a) - V*(s)) / beta)
    beta log(pi* / pi_ref)(a | s) = r(s,a) + V*(s') - V*(s)                    Eqs. 10-11: the optimal advantage

so beta (log pi - log pi_ref) of a token (`llmrl.objectives.dpo.token_rewards`) is its advantage, and a reward shaped by
a potential of the state: compare it between tokens of near-identical answers rather than read it as an absolute value.

The paper shows credit by example; `auroc` and `span_rewards` count it. It says why implicit rewards of chosen answers
fall when the reference was trained on them; `reference_drift` is that number: E_ref[beta log(pi / pi_ref)] <= 0.
"""

import torch
from torch import Tensor

from llmrl.objectives.scored import starts, sums


def soft_q(rewards_A: Tensor, reference_logprobs_A: Tensor, next_values_A: Tensor, beta: float) -> Tensor:
    """Of the actions of a state (last dimension): r, log pi_ref, V*(s') (0 after the end) -> Q*."""
    return rewards_A + beta * reference_logprobs_A + next_values_A


def soft_value(q_A: Tensor, beta: float) -> Tensor:
    """Q* of a state's actions, in the last dimension -> V*(s)."""
    return beta * torch.logsumexp(q_A / beta, dim=-1)


def soft_policy_logprobs(q_A: Tensor, beta: float) -> Tensor:
    """Q* of a state's actions -> log pi*: beta times a policy's logits are Q* up to a constant of the state."""
    return torch.log_softmax(q_A / beta, dim=-1)


def cumulative_rewards(rewards_N: Tensor, sequence_index_N: Tensor) -> Tensor:
    """[N] token rewards -> [N]: the sum from the sequence's beginning to this token, it included; in their dtype.

    That is sum r + V*(s_{t+1}) - V*(s_0): where the true reward comes only at the end, how much the value has changed
    since the prompt; at the last token the true reward less V*(s_0).
    """
    sums_N = rewards_N.double().cumsum(0)
    starts_N = starts(sequence_index_N)
    number_N = starts_N.long().cumsum(0) - 1
    before = (sums_N - rewards_N.double())[starts_N]
    return (sums_N - before[number_N]).to(rewards_N.dtype)


def span_rewards(rewards_N: Tensor, span_index_N: Tensor, num_spans: int) -> tuple[Tensor, Tensor]:
    """[N] token rewards, the span (a step, a word) of each token, -1 for none -> [K] sum and mean of each span.

    An empty span has sum 0 and mean NaN.
    """
    inside = span_index_N >= 0
    index, rewards = span_index_N[inside], rewards_N[inside].double()
    sums_K = sums(rewards, index, num_spans)
    means_K = sums_K / sums(torch.ones_like(rewards), index, num_spans)
    return sums_K.to(rewards_N.dtype), means_K.to(rewards_N.dtype)


def auroc(rewards_N: Tensor, planted_N: Tensor) -> float:
    """How well low rewards point to planted errors: the probability that a token of an error [N bool] has a lower
    reward than one outside, equal ones counted half. 0.5 is chance. ValueError if all tokens are on one side."""
    planted, others = rewards_N[planted_N].double(), rewards_N[~planted_N].double().sort().values
    if not len(planted) or not len(others):
        raise ValueError(
            f"{len(planted)} tokens inside and {len(others)} outside the planted errors: nothing to compare"
        )
    not_above = torch.searchsorted(others, planted, right=True)
    below = torch.searchsorted(others, planted, right=False)
    return float((len(others) - (not_above + below) / 2).mean() / len(others))


def reference_drift(logprobs_V: Tensor, reference_logprobs_V: Tensor, beta: float) -> Tensor:
    """Both models' log-probabilities over the vocabulary (last dimension) -> E_{a ~ pi_ref}[beta log(pi / pi_ref)].

    -beta KL(pi_ref || pi) of each state: what the implicit reward of an answer from the reference falls by, a token.
    """
    ratios_V = torch.where(reference_logprobs_V == -torch.inf, 0.0, logprobs_V - reference_logprobs_V)
    return beta * (reference_logprobs_V.exp() * ratios_V).sum(-1)
