"""What is kept of a rollout: every turn's tokens as the policy sampled them, and how the rollout ended.

Invariants
- Token ids are those that the engine was given and gave; nothing is tokenised twice. A piece is a run of tokens in
  which each turn's prompt begins with all that stood before; where a chat template rewrote what had been said, the
  rollout goes on in a new piece.
- Only sampled tokens are scored: not the template's header or closing of a turn, not what the environment said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

EndState = Literal[
    "completed",
    "truncated-length",
    "truncated-prompt",
    "truncated-turns",
    "error-parse",
    "error-timeout",
    "error-abort",
]
BROKEN: tuple[EndState, ...] = ("error-timeout", "error-abort")
"""Ends that say nothing of the policy: such a rollout has no reward and is retried or left out."""


@dataclass(frozen=True)
class Turn:
    """One completion: tokens [start, end) of a piece, their log-probabilities when sampled, the weights' version.

    `rewards`: what the environment gave for it, by name. `given`: its first tokens that were not sampled but given,
    whose log-probabilities are NaN.
    """

    piece: int
    start: int
    end: int
    logprobs: list[float]
    finish_reason: str
    policy_version: int
    rewards: dict[str, float] = field(default_factory=dict)
    given: int = 0


@dataclass(kw_only=True)
class Rollout:
    """One episode of one data row (numbered from 1): `pieces` are token ids, `messages` all that was said.

    `scores`: what each reward gave (None: no score), the environment's own among them; `reward` is their weighted sum,
    None where there is none. `penalty`: what the algorithm adds to it, such as a punishment of length. `opening`: how
    many of the messages were there before the policy spoke. `extra`: what reward functions noted about it.
    """

    row: int
    sample: int
    seed: int
    pieces: list[list[int]]
    turns: list[Turn]
    messages: list[dict[str, Any]]
    opening: int
    end_state: EndState
    error: str = ""
    scores: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    penalty: float = 0.0
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """What it is worth to the algorithm: reward and penalty, of a rollout that has a reward."""
        assert self.reward is not None
        return float(self.reward) + self.penalty

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(turn.end - turn.start - turn.given for turn in self.turns)

    @property
    def sampled_ids(self) -> list[int]:
        """The policy's tokens of all turns in order, with those that were given to it as its own."""
        return [token for turn in self.turns for token in self.pieces[turn.piece][turn.start : turn.end]]

    @property
    def truncated(self) -> bool:
        """Whether a limit ended it."""
        return self.end_state.startswith("truncated")

    @property
    def ends_in_stop(self) -> bool:
        """Whether its last turn ended with a stop token."""
        return bool(self.turns) and self.turns[-1].finish_reason == "stop"

    @property
    def ended_by_itself(self) -> bool:
        """Whether no limit, of tokens or of turns, cut it off."""
        return self.ends_in_stop and not self.truncated

    @property
    def environment_rewards(self) -> dict[str, float]:
        """Sums over the turns, by name."""
        totals: dict[str, float] = {}
        for turn in self.turns:
            for name, value in turn.rewards.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def record(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The rollout as a line of rollouts/step_N.jsonl: `prompt` and `completions` are its first prompt and its turns
        to the letter, with what the tokenizer adds to what was said; `opening` is what had been said before the first
        turn, `messages` what was made of the turns and what the environment answered."""
        return {
            "row": self.row,
            "sample": self.sample,
            "reward": self.reward,
            "scores": self.scores,
            **({"penalty": self.penalty} if self.penalty else {}),
            "end_state": self.end_state,
            "ends_in_stop": self.ends_in_stop,
            **({"error": self.error} if self.error else {}),
            "num_turns": len(self.turns),
            "num_sampled": self.num_sampled,
            "policy_versions": sorted({turn.policy_version for turn in self.turns}),
            "prompt": decode(self.pieces[0][: self.turns[0].start]) if self.turns else "",
            "completions": [decode(self.pieces[turn.piece][turn.start : turn.end]) for turn in self.turns],
            "opening": self.messages[: self.opening],
            "messages": self.messages[self.opening :],
            **({"extra": self.extra} if self.extra else {}),
        }


@dataclass
class RolloutGroup:
    """The rollouts of one data row. `row` holds its columns, `number` counts rows from 1, `place` tasks from 0."""

    number: int
    row: dict[str, Any]
    rollouts: list[Rollout]
    place: int = 0

    @property
    def rewards(self) -> list[float]:
        """Of the rollouts that have one."""
        return [rollout.reward for rollout in self.rollouts if rollout.reward is not None]


def mean_reward(groups: Sequence[RolloutGroup]) -> float:
    """Over all rollouts with a reward; NaN where there is none."""
    rewards = [reward for group in groups for reward in group.rewards]
    return sum(rewards) / len(rewards) if rewards else float("nan")
