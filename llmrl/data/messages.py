"""The shapes in which people write a dialogue, brought to one: a list of `{"role", "content", ...}`.

Invariant: a message that comes out of here has a known role, and text content or tool calls; keys that Arrow filled
with None because another row has them are gone.
"""

from typing import Any

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
THOUGHTS = ("tool_calls", "reasoning_content", "thinking")
ASSISTANT_MARK = "\n\nAssistant:"
HUMAN_MARK = "\n\nHuman:"


def is_dialogue(value: Any) -> bool:
    """A message, or a list of them (perhaps empty): the conversational format, as against plain text."""
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(item, dict) for item in value))


def dialogue(value: Any) -> list[Message]:
    """Messages in the form that chat templates take. Raises ValueError, worded to follow the column's name."""
    items = [value] if isinstance(value, dict) else value
    if not is_dialogue(items):
        raise ValueError(f"{kind_of(value)} where a list of messages is expected")
    return [_message(item, number) for number, item in enumerate(items, 1)]


def kind_of(value: Any) -> str:
    """What a value is, in a reader's words."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def says_something(message: Message) -> bool:
    """Whether a message has text other than blanks, calls a tool, or thinks."""
    return bool((message.get("content") or "").strip()) or any(message.get(key) for key in THOUGHTS)


def without_none(value: Any) -> Any:
    """The value less every object key whose value is None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def implicit_prompt(chosen: Any, rejected: Any) -> Any:
    """What two whole dialogues share at their start: the prompt that both answer.

    Texts in the form "\\n\\nHuman: ...\\n\\nAssistant: ..." are divided after the last shared "Assistant:", other texts
    before the first word that differs, lists before the first message that differs. Empty if nothing is shared.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _shared_text(chosen, rejected)
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return []
    shared = 0
    # The last message of each is an answer even where the two are equal: it is refused as such later.
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if left != right:
            break
        shared += 1
    return chosen[:shared]


def shared_length(left: str, right: str) -> int:
    """How many characters two texts have in common at their start."""
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


def _shared_text(chosen: str, rejected: str) -> str:
    shared = chosen[: shared_length(chosen, rejected)]
    turn = shared.rfind(ASSISTANT_MARK)
    if turn >= 0:
        return shared[: turn + len(ASSISTANT_MARK)]
    # Back to the blank before the word in which they part, which is tokenised together with that word.
    end = max((index for index, character in enumerate(shared) if character.isspace()), default=0)
    return shared[:end]


def _message(item: dict[str, Any], number: int) -> Message:
    message = without_none(item)
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"message {number} has no `role` (its keys: {', '.join(message) or 'none'})")
    message["role"] = ROLE_NAMES.get(role, role)
    if message["role"] not in ROLES:
        raise ValueError(
            f"message {number} has the unknown role `{role}`; known are {', '.join((*ROLES, *ROLE_NAMES))}"
        )
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"message {number} has no `content` (its keys: {', '.join(message)})")
    if isinstance(content, list):
        content = message["content"] = _joined_parts(content, number)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"message {number}: `content` is {kind_of(content)}, not text")
    return message


def _joined_parts(parts: list[Any], number: int) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"message {number}: only text parts are supported in `content`, no images, audio or video")
    return "".join(part["text"] for part in parts)
