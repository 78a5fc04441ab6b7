"""One answer with what policy and reference say of each of its tokens, and the sums that can be read off it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmrl.evaluation.credit.spans import Span, step_of, step_spans
from llmrl.learner.sequences import Floats, Ints
from llmrl.objectives.dpo import token_rewards
from llmrl.objectives.implicit_reward import cumulative_rewards, span_rewards

NEWLINES = r"\n+"


@dataclass(frozen=True)
class Step:
    """A part of an answer: its characters [start, end), its tokens (from 0), the sum and mean of their rewards, and the
    sums of their log-probabilities."""

    start: int
    end: int
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

    def steps(self, ends: str = NEWLINES) -> list[Step]:
        """The answer in steps that end where the regular expression `ends` matches: by default its lines.

        A token belongs to the step of its first character that is not blank, the one that ends the answer to the last.
        """
        last = self.spans[-1][0] if self.ends else len(self.text)
        spans = step_spans(self.text[:last], ends)
        spans[-1] = (spans[-1][0], len(self.text))
        index_T = np.array([step_of(span, spans, self.text) for span in self.spans])
        numbers = (self.rewards, self.logprobs, self.reference_logprobs)
        (rewards_K, means_K), (logprobs_K, _), (reference_K, _) = (
            span_rewards(_tensor(each), torch.from_numpy(index_T), len(spans)) for each in numbers
        )
        return [
            Step(
                start=start,
                end=end,
                text=self.text[start:end],
                tokens=np.flatnonzero(index_T == k),
                reward=float(rewards_K[k]),
                mean=float(means_K[k]),
                logprob=float(logprobs_K[k]),
                reference_logprob=float(reference_K[k]),
            )
            for k, (start, end) in enumerate(spans)
        ]


def lowest(steps: list[Step]) -> int:
    """The step (from 0) with the lowest sum of rewards; the first of several."""
    return min(range(len(steps)), key=lambda k: steps[k].reward)


def _tensor(values: Floats) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _array(values: Tensor) -> Floats:
    found: Floats = values.numpy()
    return found
