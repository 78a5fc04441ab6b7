"""One answer with what policy and reference say of each of its tokens, and the sums that can be read off it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrl.data.steps import LINES, Segmenter, step_ends
from llmrl.evaluation.credit.spans import Span
from llmrl.learner.sequences import Floats, Ints
from llmrl.objectives.dpo import token_rewards
from llmrl.objectives.implicit_reward import cumulative_rewards, span_rewards


@dataclass(frozen=True)
class Step:
    """A part of an answer: its text, its tokens (from 0), the sum and mean of their rewards, and the sums of their
    log-probabilities."""

    text: str
    tokens: Ints
    reward: float
    mean: float
    logprob: float
    reference_logprob: float


@dataclass(frozen=True)
class Credit:
    """An answer of T tokens, token by token.

    text: what they decode to, special tokens included. spans: the characters [start, end) of each token; tokens that
    only together make a character share them. logprobs, reference_logprobs: float32 [T]. ends: the last token is the
    one that ended the answer.
    """

    text: str
    token_ids: Ints
    spans: list[Span]
    logprobs: Floats
    reference_logprobs: Floats
    beta: float
    ends: bool

    @property
    def rewards(self) -> Floats:
        """[T] beta (log pi - log pi_ref): the implicit reward of each token."""
        return _array(token_rewards(_tensor(self.logprobs), _tensor(self.reference_logprobs), self.beta))

    @property
    def cumulative(self) -> Floats:
        """[T] the sum of the rewards up to each token, it included."""
        return _array(cumulative_rewards(_tensor(self.rewards), torch.zeros(len(self.spans), dtype=torch.long)))

    @property
    def total(self) -> float:
        """The sum of the rewards: what DPO compares between two answers to one prompt."""
        return float(self.rewards.sum(dtype=np.float64))

    def token_text(self, index: int) -> str:
        """The characters of a token."""
        return self.text[slice(*self.spans[index])]

    def steps(self, split: Segmenter = LINES) -> list[Step]:
        """The answer divided by `split`, by default into its lines: the steps of llmrl/data/steps.py, as they are
        trained. The token that ends the answer belongs to the last."""
        ends = step_ends(range(len(self.spans)), split, self._visible)
        index_T = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        numbers = (self.rewards, self.logprobs, self.reference_logprobs)
        (rewards_K, means_K), (logprobs_K, _), (reference_K, _) = (
            span_rewards(_tensor(each), torch.from_numpy(index_T), len(ends)) for each in numbers
        )
        return [
            Step(
                text=self.text[self.spans[start][0] : self.spans[end - 1][1]],
                tokens=np.arange(start, end),
                reward=float(rewards_K[k]),
                mean=float(means_K[k]),
                logprob=float(logprobs_K[k]),
                reference_logprob=float(reference_K[k]),
            )
            for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]

    def _visible(self, indices: Sequence[int]) -> str:
        """The text of tokens without that of the one that ended the answer; what several make stands at the last."""
        last = len(self.spans) - 1
        return "".join(
            "" if (i == last and self.ends) or (i < last and self.spans[i] == self.spans[i + 1]) else self.token_text(i)
            for i in indices
        )


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _array(values: Tensor) -> Floats:
    found: Floats = values.numpy()
    return found
