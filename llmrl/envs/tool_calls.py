"""Tool calls out of sampled text, for the two families of notation that most open models use.

Invariants: pure functions; text is parsed as JSON, never evaluated; no text raises an exception; what comes out can be
encoded as UTF-8 and rendered by a chat template.

- Hermes, Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times, other text around.
- Llama 3: the whole text is `{"name": ..., "parameters": {...}}`, `<|python_tag|>` before it or not, several divided by
  `;`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["hermes", "llama3"]
ToolCall = dict[str, Any]
"""`{"type": "function", "function": {"name": ..., "arguments": {...}}}`, as chat templates take it."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
_CALL = re.compile(rf"{re.escape(OPEN)}(.*?){re.escape(CLOSE)}", re.DOTALL)


@dataclass(frozen=True)
class ParseFault:
    """Text that begins a tool call and is none; `reason` is for logs."""

    reason: str


def parse_tool_calls(text: str, family: Family | None = None) -> tuple[str, list[ToolCall]] | ParseFault:
    """(content without the calls, calls), the calls in order; no calls where the text has none.

    `family` None reads both notations.
    """
    try:
        if family != "llama3" and (OPEN in text or CLOSE in text):
            return _hermes(text)
        if family != "hermes":
            return _llama3(text)
        return text, []
    except _NoCallError as error:
        return ParseFault(str(error))


class _NoCallError(ValueError):
    pass


def _hermes(text: str) -> tuple[str, list[ToolCall]]:
    if text.count(OPEN) != text.count(CLOSE):
        raise _NoCallError(f"{OPEN} and {CLOSE} do not pair up")
    calls = [_call(_json(inside), "arguments") for inside in _CALL.findall(text)]
    content = _CALL.sub("", text)
    if OPEN in content:
        raise _NoCallError(f"{CLOSE} comes before {OPEN}")
    return content.strip(), calls


def _llama3(text: str) -> tuple[str, list[ToolCall]]:
    body = text.strip()
    marked = body.startswith(PYTHON_TAG)
    body = body.removeprefix(PYTHON_TAG).strip()
    # Without the tag, an object is a call only if it has the two keys of one: a JSON answer is an answer.
    if not marked and not (body.startswith("{") and '"name"' in body and '"parameters"' in body):
        return text, []
    try:
        return "", [_call(item, "parameters") for item in _objects(body)]
    except _NoCallError:
        if marked or _begins_like_a_call(body):
            raise
        return text, []


def _begins_like_a_call(body: str) -> bool:
    """`{"name": ...` or `{"type": "function", "name": ...`, as these models write it."""
    return re.match(r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:', body) is not None


def _objects(body: str) -> list[Any]:
    """JSON values divided by `;`, nothing else around."""
    decoder, values, at = json.JSONDecoder(parse_constant=_refuse_constant), [], 0
    while True:
        try:
            value, at = decoder.raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            raise _NoCallError(f"not JSON: {error}") from None
        values.append(value)
        rest = body[at:].lstrip()
        if not rest:
            return values
        if not rest.startswith(";"):
            raise _NoCallError("text after the call")
        at = len(body) - len(rest[1:].lstrip())
        if at == len(body):
            return values


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _NoCallError(f"not JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _call(value: Any, arguments_key: str) -> ToolCall:
    if not isinstance(value, dict):
        raise _NoCallError("a call is a JSON object")
    name, arguments = value.get("name"), value.get(arguments_key, {})
    if not isinstance(name, str) or not name:
        raise _NoCallError("the call has no `name`")
    if not isinstance(arguments, dict):
        raise _NoCallError(f"`{arguments_key}` is not a JSON object")
    try:
        # "\ud800" is JSON for half a character, which no tokenizer takes.
        json.dumps([name, arguments], ensure_ascii=False).encode()
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        raise _NoCallError(f"the call holds text that cannot be encoded: {error}") from None
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
