"""What every generation engine takes and gives.

Invariants: token ids in, token ids out; a completion's log-probabilities are those of the distribution that it was
drawn from; a sample depends on its prompt, its seed and the weights only, not on what else was in the batch (up to
rounding of the logits).
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
ASLEEP = "the engine sleeps, and nothing can be sampled before it was synchronised or woken"


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
    row's own, derived by `row_seed`. `policy_version`: of the weights with which its first token was drawn.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    seed: int
    policy_version: int = 0


class Engine(Protocol):
    """Anything that continues prompts with a policy that can be renewed."""

    policy_version: int

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """For each prompt its `sampling.n` completions, in the order of the prompts; row (p, s) has the seed
        `row_seed(sampling.seed, p, s)`."""
        ...

    async def complete(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """One completion (`sampling.n` is 1) with the seed `sampling.seed` itself; many may be under way at once."""
        ...

    def sync(self, weights: Iterable[tuple[str, "Tensor"]], version: int) -> None:
        """Take over the policy's weights, whole, by their names in the model's state dict; every cache is reset, and
        what is sampled from now on comes from them. An engine that shares the learner's model does not read them."""
        ...

    def sleep(self) -> None:
        """Give memory back until `sync` or `wake`; nothing may be under way, and nothing is sampled meanwhile. Raises
        RefusedError where the engine cannot."""
        ...

    def wake(self) -> None:
        """Be ready to sample again, with the weights of before; nothing where the engine is awake."""
        ...

    def close(self) -> None:
        """End; the engine is not used afterwards."""
        ...


def row_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of one row: unrelated for neighbours, the same wherever and in whatever company the row is sampled."""
    digest = hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
