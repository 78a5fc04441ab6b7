"""What every generation engine takes and gives.

Invariants: token ids in, token ids out; a completion's log-probabilities are those of the distribution that it was
drawn from; a sample depends on its prompt, its seed and the weights only, not on what else was in the batch (up to
rounding of the logits).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample: `n` completions a prompt, each of at most `max_tokens` tokens.

    `temperature` 0 is greedy. `stop_token_ids` end a completion beside the model's own end tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    n: int = 1
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.n < 1:
            raise ValueError(f"max_tokens ({self.max_tokens}) and n ({self.n}) must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature 0 gives {self.n} times the same: use n 1, or a temperature above 0")


@dataclass(frozen=True)
class Completion:
    """One sampled continuation: the token that ended it, if one did, is its last.

    `logprobs[t]` is the log-probability of `token_ids[t]` after temperature (greedy: at temperature 1). `seed` is the
    row's own, derived by `row_seed`.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    seed: int


class Engine(Protocol):
    """Anything that continues prompts."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """For each prompt its `sampling.n` completions, in the order of the prompts."""
        ...


def row_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of one row: unrelated for neighbours, the same wherever and in whatever company the row is sampled."""
    digest = hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
