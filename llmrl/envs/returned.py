"""What an environment's methods returned, checked: they may be anybody's.

Invariant: what passes has the types of the protocol, and rewards are finite; whatever else it was, ValueError says so.
"""

import math
from collections.abc import Mapping
from typing import Any

from llmrl.envs.protocol import Message, StepResult


def opening(returned: Any) -> tuple[list[Message] | str, list[dict[str, Any]] | None]:
    """(messages, tools) of `init`."""
    messages, tools = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not (isinstance(messages, str) or _are_mappings(messages)) or not (tools is None or _are_mappings(tools)):
        raise ValueError(f"init() returned {_short(returned)}; expected a list of messages, or (messages, tools)")
    return (messages if isinstance(messages, str) else list(messages)), tools


def step_result(returned: Any) -> StepResult:
    """The result of `step`."""
    is_tuple = isinstance(returned, tuple) and 1 <= len(returned) <= 3
    result = StepResult(*returned) if is_tuple else None
    if result is None or not _are_mappings(result.messages) or not isinstance(result.rewards, Mapping):
        raise ValueError(f"step() returned {_short(returned)}; expected (messages, done, rewards by name)")
    checked: dict[str, float] = {}
    for name, value in result.rewards.items():
        try:
            checked[str(name)] = float(value)
        except (TypeError, ValueError):
            checked[str(name)] = math.nan
        if not math.isfinite(checked[str(name)]):
            raise ValueError(f"step() gave the reward {name} {_short(value)}, which is no finite number")
    return StepResult(list(result.messages), bool(result.done), checked)


def _are_mappings(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, Mapping) for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
