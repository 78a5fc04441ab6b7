"""Playing an episode as a rollout does, less the tokens."""

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest

from llmrl.envs.protocol import Environment, Message, StepResult

Agent = Callable[[list[Message]], Message | str]


async def _maybe(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def _play(environment: Environment, agent: Agent, most: int) -> tuple[list[Message], dict[str, float], bool]:
    opening = await _maybe(environment.init())
    dialogue = list(opening[0] if isinstance(opening, tuple) else opening)
    rewards: dict[str, float] = {}
    done = False
    for _ in range(most):
        answer = agent(dialogue)
        message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        result = StepResult(*await _maybe(environment.step(message)))
        dialogue += [message, *result.messages]
        for name, value in result.rewards.items():
            assert math.isfinite(value)
            rewards[name] = rewards.get(name, 0.0) + value
        assert bool(result.messages) != result.done
        if done := result.done:
            break
    await _maybe(environment.close())
    return dialogue, rewards, done


@pytest.fixture
def play() -> Callable[..., tuple[list[Message], dict[str, float], bool]]:
    """`play(environment, agent, most=50)` -> (dialogue, summed rewards, done). The agent answers a dialogue."""

    def run(environment: Environment, agent: Agent, most: int = 50) -> tuple[list[Message], dict[str, float], bool]:
        return asyncio.run(_play(environment, agent, most))

    return run
