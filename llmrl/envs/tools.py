"""The base of environments in which the model calls tools before it answers.

Invariants: every tool call gets exactly one tool message, in order, whatever is wrong with it (an unknown tool,
arguments that do not fit, a tool that raises); the episode is over with the first message that calls no tool, or with
the first one after the calls were used up and the model was told so.

There is no tool that runs Python here: code that a model writes needs a sandbox around it.
"""

import asyncio
import inspect
import json
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

from llmrl.envs.protocol import Message, Row, StepResult
from llmrl.envs.reading import said
from llmrl.envs.schemas import Schema, argument_fault, function_schema
from llmrl.envs.single_use import SingleUse

LONGEST_RESULT = 4000  # characters


class ToolEnvironment:
    """Subclass it, write `opening` and `judge`, and every other public method is a tool.

    A tool has types and a docstring in Google's style, which is what the model is told of it; its result is text, or
    goes through JSON. An `async` tool must not block; a plain one runs in a thread. An exception in a tool is told to
    the model as `Error: ...`.
    """

    max_calls: ClassVar[int] = 16
    """Calls in one episode; further ones are answered with an error."""
    multi_turn: ClassVar[bool] = True
    """A call and the answer that uses it are two messages."""
    tools: ClassVar[list[Schema]] = []
    """The schemas of the tools, in the order of their definition."""

    def __init_subclass__(cls) -> None:
        """Raises TypeError where a tool's signature or docstring does not say what a schema needs."""
        super().__init_subclass__()
        found: dict[str, FunctionType] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, ToolEnvironment) and base is not ToolEnvironment:
                found |= {name: item for name, item in vars(base).items() if isinstance(item, FunctionType)}
        names = [name for name in found if not name.startswith("_") and name not in vars(ToolEnvironment)]
        cls.tools = [function_schema(found[name]) for name in names]

    def __init__(self, row: Row, seed: int) -> None:
        self._calls_left = self.max_calls
        self._told = False
        self._use = SingleUse(type(self).__name__)

    def opening(self) -> list[Message]:
        """The messages that the episode begins with."""
        raise NotImplementedError(f"{type(self).__name__} must say how the episode begins, in opening()")

    def judge(self, answer: str) -> dict[str, float]:
        """The named rewards of the final answer; `answer` is empty where the model did nothing but call tools."""
        raise NotImplementedError(f"{type(self).__name__} must say what an answer is worth, in judge()")

    async def init(self) -> tuple[list[Message], list[Schema]]:
        self._use.begin()
        return self.opening(), self.tools

    async def step(self, message: Message) -> StepResult:
        self._use.turn()
        calls = message.get("tool_calls") or []
        if not calls or self._told:
            self._use.end()
            return StepResult([], done=True, rewards=self.judge(said(message)))
        return StepResult([await self._answer(call) for call in calls])

    async def close(self) -> None:
        self._use.end()

    async def _answer(self, call: Any) -> Message:
        """The tool message to one call."""
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        answer = {"role": "tool", "name": str(name or "")}
        if isinstance(call, dict) and "id" in call:
            answer["tool_call_id"] = call["id"]
        try:
            text = await self._result(name, function.get("arguments") if isinstance(function, dict) else None)
        except Exception as error:
            text = f"Error: {error}" if isinstance(error, ValueError) else f"Error: {type(error).__name__}: {error}"
        return {**answer, "content": _cut(text)}

    async def _result(self, name: Any, arguments: Any) -> str:
        """The result of a tool as text; raises ValueError, worded for the model, where it cannot be called so."""
        if self._calls_left == 0:
            self._told = True
            raise ValueError("no tool calls are left; answer now")
        self._calls_left -= 1
        schema = next((schema for schema in self.tools if schema["function"]["name"] == name), None)
        if schema is None:
            known = ", ".join(tool["function"]["name"] for tool in self.tools)
            raise ValueError(f"there is no tool `{name}`; there are: {known or 'none'}")
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        arguments = {} if arguments is None else arguments
        if fault := argument_fault(arguments, schema):
            raise ValueError(fault)
        return _text(await self._called(getattr(self, name), arguments))

    async def _called(self, tool: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(tool):
            return await tool(**arguments)
        return await asyncio.to_thread(tool, **arguments)


def _parsed(arguments: str) -> Any:
    """Arguments as the OpenAI format has them, as JSON text."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        raise ValueError("the arguments are not JSON") from None


def _text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    # Half a surrogate pair, which a tool may echo, can be neither tokenised nor saved.
    text = text.encode("utf-8", "replace").decode()
    more = len(text) - LONGEST_RESULT
    return text if more <= 0 else f"{text[:LONGEST_RESULT]} ... ({more} more characters)"
