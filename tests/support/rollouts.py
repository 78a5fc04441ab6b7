"""Rollouts as the collector makes them, of which a test says what it is about."""

from typing import Any

from llmrl.rollout.trajectory import Rollout, Turn


def turn(start: int, end: int, **fields: Any) -> Turn:
    """Tokens [start, end) of the first piece, each sampled at log-probability -1, the last a stop token."""
    given = {"piece": 0, "logprobs": [-1.0] * (end - start), "finish_reason": "stop", "policy_version": 0}
    return Turn(start=start, end=end, **{**given, **fields})


def rollout(pieces: list[list[int]], turns: list[Turn], reward: float | None = 1.0, **fields: Any) -> Rollout:
    """The first sample of the first row, which came to its end and said nothing in words."""
    given = {"row": 1, "sample": 0, "seed": 0, "messages": [], "opening": 0, "end_state": "completed"}
    return Rollout(pieces=pieces, turns=turns, reward=reward, **{**given, **fields})


def answer(ids: list[int], reward: float | None = 1.0, finish: str = "stop", **fields: Any) -> Rollout:
    """One turn, after a prompt of two tokens."""
    return rollout([[1, 2, *ids]], [turn(2, 2 + len(ids), finish_reason=finish)], reward, **fields)
