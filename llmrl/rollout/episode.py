"""One rollout: an environment and an engine take turns until one of them, or a limit, ends it.

Invariant: whatever an environment does (raise, hang, return anything) breaks its own rollout, in words, and no other;
every call of it has a deadline. What the engine or the template refuses is not the rollout's fault, and is raised.
"""

import asyncio
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from llmrl.envs import returned
from llmrl.envs.protocol import Environment
from llmrl.errors import RefusedError
from llmrl.rollout.dialogue import Dialogue
from llmrl.rollout.protocol import Engine, SamplingParams, row_seed
from llmrl.rollout.rendering import ParseFault, Renderer
from llmrl.rollout.threads import Maker, OverdueError, call
from llmrl.rollout.trajectory import EndState, Rollout, Turn

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Limits:
    """What ends a rollout: turns, tokens of one turn, tokens of the whole context, seconds for one environment call
    and for the whole rollout (None: no limit), and how many rollouts are under way at once.

    `cut_turns`: whether a turn that ran into `max_completion_length` is closed and answered by the environment like any
    other (as LOOP's authors do; the closing token is no action), or ends the rollout.
    `stop_token_ids`: tokens that end a turn beside the model's own.
    """

    max_turns: int = 1
    max_completion_length: int = 256
    max_length: int | None = None
    environment_seconds: float | None = 60.0
    rollout_seconds: float | None = None
    concurrent_rollouts: int = 256
    cut_turns: Literal["go_on", "end"] = "go_on"
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stage:
    """What the episodes of a collection have in common."""

    engine: Engine
    renderer: Renderer
    maker: Maker
    limits: Limits
    temperature: float


class Episode:
    """The token side and the environment side of one rollout, brought together.

    `given`: tokens with which the first completion begins, whatever the policy would have said. `waits_for`: what it
    waits for now. `close_failed`: whether its environment could not be closed.
    """

    def __init__(self, stage: Stage, row: dict[str, Any], seed: int, given: Sequence[int] = ()) -> None:
        self.stage, self.limits, self.row, self.seed = stage, stage.limits, row, seed
        self.given = list(given)
        self.waits_for, self.close_failed = "nothing", False
        self.environment: Environment | None = None
        self.dialogue: Dialogue | None = None
        self.opening = 0
        self.turns: list[Turn] = []

    async def play(self) -> tuple[EndState, str]:
        """To the end; returns how it ended, and what went wrong where something did."""
        try:
            await self._environment("__init__")
            messages, tools = _checked(returned.opening, await self._environment("init"))
        except _BrokenEnvironment as broken:
            return broken.end_state, broken.what
        self.dialogue = Dialogue(self.stage.renderer, messages, tools)
        self.opening = len(self.dialogue.messages)
        for turn in range(self.limits.max_turns):
            room = self._room()
            if room < 1 + (0 if turn else len(self.given)):
                return ("truncated-length" if turn else "truncated-prompt"), ""
            message = await self._complete(self.dialogue, turn, room)
            if isinstance(message, ParseFault):
                return "error-parse", message.reason
            cut = self.turns[-1].finish_reason == "length"
            if cut and self.limits.max_turns > 1 and self._ends_here(room):
                return "truncated-length", ""
            try:
                result = _checked(returned.step_result, await self._environment("step", message))
            except _BrokenEnvironment as broken:
                return broken.end_state, broken.what
            self.turns[-1] = replace(self.turns[-1], rewards=result.rewards)
            if result.done:
                return ("truncated-length" if cut and self.limits.max_turns == 1 else "completed"), ""
            try:
                self.dialogue.extend(result.messages)
            except RefusedError as error:  # it said nothing, or what the chat template refuses
                return "error-abort", str(error)
        return "truncated-turns", ""

    def _ends_here(self, room: int) -> bool:
        """Whether a turn that had `room` and was cut is the last: also where the whole context is full."""
        return self.limits.cut_turns == "end" or room < self.limits.max_completion_length

    def _room(self) -> int:
        assert self.dialogue is not None
        most = self.limits.max_completion_length
        if self.limits.max_length is None:
            return most
        return min(most, self.limits.max_length - len(self.dialogue.prompt_ids))

    async def _complete(self, dialogue: Dialogue, turn: int, room: int) -> dict[str, Any] | ParseFault:
        self.waits_for = "the engine"
        seed, stop = row_seed(self.seed, turn, 0), self.limits.stop_token_ids
        given = [] if turn else self.given
        sampling = SamplingParams(room - len(given), self.stage.temperature, seed=seed, stop_token_ids=stop)
        found = await self.stage.engine.complete([*dialogue.prompt_ids, *given], sampling)
        message = dialogue.complete([*given, *found.token_ids], found.finish_reason)
        pieces = dialogue.pieces()
        piece, (_, start, end) = len(pieces) - 1, pieces[-1].turns[-1]
        logprobs = [*[math.nan] * len(given), *found.logprobs]
        self.turns.append(
            Turn(piece, start, end, logprobs, found.finish_reason, found.policy_version, given=len(given))
        )
        return message

    async def _environment(self, method: str, *arguments: Any) -> Any:
        """Call the environment; raises _BrokenEnvironment."""
        self.waits_for = f"the environment's {method}"
        try:
            if method == "__init__":
                self.environment = await self.stage.maker.make(self.row, self.seed)
                return None
            seconds = self.limits.environment_seconds
            return await call(getattr(self.environment, method), *arguments, timeout=seconds)
        except OverdueError as error:
            raise _BrokenEnvironment("error-timeout", f"{method}() {error}") from None
        except asyncio.CancelledError as error:
            if _was_cancelled():
                raise
            raise _BrokenEnvironment("error-abort", f"{method}() cancelled itself") from error
        except RefusedError:
            raise
        except (Exception, SystemExit) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{method}() raised {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            raise _BrokenEnvironment("error-abort", what) from error

    async def close(self) -> None:
        """Close the environment; whatever goes wrong there no longer matters to the rollout."""
        if self.environment is not None:
            try:
                await call(self.environment.close, timeout=self.limits.environment_seconds)
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _was_cancelled():
                    raise
                self.close_failed = True

    @property
    def rewritten(self) -> int:
        """Pieces begun because a chat template rewrote history."""
        return 0 if self.dialogue is None else len(self.dialogue.rewrites)

    def rollout(self, row: int, sample: int, end: EndState, error: str, seconds: float) -> Rollout:
        """The record of what was played."""
        pieces = [] if self.dialogue is None else [piece.token_ids for piece in self.dialogue.pieces()]
        messages = [] if self.dialogue is None else self.dialogue.messages
        return Rollout(
            row=row,
            sample=sample,
            seed=self.seed,
            pieces=pieces,
            turns=self.turns,
            messages=messages,
            opening=self.opening,
            end_state=end,
            error=error,
            seconds=seconds,
        )


def _was_cancelled() -> bool:
    """Whether somebody asked this very task to end; an environment can also await something that was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _checked(check: Callable[[Any], Checked], value: Any) -> Checked:
    """What an environment's method returned, as `check` has it; raises _BrokenEnvironment."""
    try:
        return check(value)
    except ValueError as error:
        raise _BrokenEnvironment("error-abort", str(error)) from error


class _BrokenEnvironment(Exception):
    """The environment raised or overran; how the rollout ends, and what happened."""

    def __init__(self, end_state: EndState, what: str) -> None:
        super().__init__(what)
        self.end_state, self.what = end_state, what
