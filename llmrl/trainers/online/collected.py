"""What one or several collections brought, put together; kept in checkpoints and taken from there."""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from llmrl.errors import LlmrlError
from llmrl.rollout.collector import Collected
from llmrl.rollout.trajectory import Rollout, RolloutGroup, Turn

Summed = TypeVar("Summed", int, float, list[float])
Share = Collected | LlmrlError
"""What one rank has collected, or why it could not."""


def sound(shares: Sequence[Share]) -> list[Collected] | None:
    """They, or None where one of them failed."""
    sound = [share for share in shares if isinstance(share, Collected)]
    return sound if len(sound) == len(shares) else None


def is_mixed(group: RolloutGroup) -> bool:
    """Whether some of a prompt's rollouts are better than others."""
    return len(set(group.rewards)) > 1


def added(first: Collected, second: Collected) -> Collected:
    """What two collections brought, one after the other."""
    return Collected(
        first.groups + second.groups,
        _sums(first.counts, second.counts, 0),
        first.seconds + second.seconds,
        first.num_sampled + second.num_sampled,
        _sums(first.logged, second.logged, []),
        _sums(first.tallies, second.tallies, 0.0),
    )


def _sums(first: dict[str, Summed], second: dict[str, Summed], nothing: Summed) -> dict[str, Summed]:
    names = dict.fromkeys((*first, *second))
    return {name: first.get(name, nothing) + second.get(name, nothing) for name in names}


def beside(shares: Sequence[Collected]) -> Collected:
    """The ranks' collections, which went on beside each other, with groups in the order of the tasks."""
    together = functools.reduce(added, shares)
    together.groups.sort(key=lambda group: group.place)
    together.seconds = max(share.seconds for share in shares)
    return together


def stored(found: Collected) -> dict[str, Any]:
    """As a checkpoint can hold it."""
    return asdict(found)


def restored(stored: dict[str, Any]) -> Collected:
    """What `stored` gave."""
    groups = [
        RolloutGroup(
            **{
                **group,
                "rollouts": [
                    Rollout(**{**rollout, "turns": [Turn(**turn) for turn in rollout["turns"]]})
                    for rollout in group["rollouts"]
                ],
            }
        )
        for group in stored["groups"]
    ]
    return Collected(**{**stored, "groups": groups})
