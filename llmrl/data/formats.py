"""Rows of preference data, in every format that people bring, as one kind of pair.

| format | columns |
|---|---|
| plain | `prompt`, `chosen`, `rejected`: text |
| conversational | the same three as lists of messages (`role`/`content` or `from`/`value`), or a single message each |
| implicit prompt | `chosen` and `rejected` only: whole dialogues (messages or text) that begin alike |
| conversations | `conversations` (messages) as the prompt, `chosen` and `rejected` one message each |

Optional: `tools` (a list, or JSON text) and `chat_template_kwargs` (an object, or JSON text).

Invariants of a `Pair`: both completions are of the same form as the prompt, are not empty and differ; in a dialogue
each is one assistant message, so that every token of it is the policy's own.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.data.messages import HUMAN_MARK, Message, dialogue, implicit_prompt, is_dialogue, kind_of, without_none
from llmrl.errors import RefusedError

Text = str | list[Message]

OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "chosen": ("accepted", "preferred", "winner", "positive", "good"),
    "rejected": ("dispreferred", "loser", "negative", "bad"),
}
PICTURES = ("image", "images", "video", "videos", "audio")
THOUGHTS = ("tool_calls", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers: three texts, or three lists of messages with what their template needs."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] | None = None

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


class RowFault(Exception):
    """What is wrong with one row; the caller knows its file and number."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"column `{column}`: {reason}")


def check_columns(columns: Sequence[str], where: str) -> None:
    """Refuse data without `chosen` and `rejected`, or with columns that would be ignored against the user's intent."""
    for name in ("chosen", "rejected"):
        if name not in columns:
            raise RefusedError(_missing(name, columns, where))
    if "prompt" not in columns and "conversations" not in columns and nearest("prompt", columns, close_only=True):
        raise RefusedError(_missing("prompt", columns, where))
    for name in PICTURES:
        if name in columns:
            raise RefusedError(f"{where}, column `{name}`: only text is supported; remove the column or use other data")


def nearest(name: str, columns: Iterable[str], close_only: bool = False) -> str | None:
    """The column that was probably meant, if any."""
    others = [column for column in columns if column not in OTHER_NAMES]
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.7)
    near += [] if close_only else [column for column in others if name in column or column in OTHER_NAMES.get(name, ())]
    return near[0] if near else None


def _missing(name: str, columns: Sequence[str], where: str) -> str:
    near = nearest(name, columns)
    hint = f"did you mean `{near}`? Rename it" if near else "rename the one that holds it, or use other data"
    have = ", ".join(f"`{column}`" for column in columns)
    return f"{where}: no column `{name}`; the columns are {have}; {hint}"


def read_pair(row: dict[str, Any]) -> Pair:
    """One row as a pair; raises `RowFault`."""
    chosen, rejected = _completion(row, "chosen"), _completion(row, "rejected")
    if "prompt" in row:
        pair = _explicit(row["prompt"], chosen, rejected, "prompt")
    elif "conversations" in row:
        pair = _explicit(row["conversations"], chosen, rejected, "conversations")
    else:
        pair = _implicit(chosen, rejected)
    _check_completion(pair.chosen, "chosen")
    _check_completion(pair.rejected, "rejected")
    if pair.chosen == pair.rejected:
        raise RowFault("rejected", "equal to `chosen`, so the pair prefers nothing; mend or remove the row")
    tools = _json_column(row, "tools", list)
    template_kwargs = _json_column(row, "chat_template_kwargs", dict)
    if tools and not pair.conversational:
        raise RowFault("tools", "needs the conversational format: plain text has no chat template to show them in")
    return Pair(pair.prompt, pair.chosen, pair.rejected, tools or None, template_kwargs or None)


def _completion(row: dict[str, Any], column: str) -> Text:
    value = row[column]
    return value if isinstance(value, str) else _dialogue(value, column)


def _dialogue(value: Any, column: str) -> list[Message]:
    if not is_dialogue(value):
        raise RowFault(column, f"{kind_of(value)} where text or a list of messages is expected; mend or remove the row")
    try:
        return dialogue(value)
    except ValueError as error:
        raise RowFault(column, f"{error}; mend or remove the row") from None


def _explicit(prompt: Any, chosen: Text, rejected: Text, column: str) -> Pair:
    if isinstance(prompt, str):
        if isinstance(chosen, str) and isinstance(rejected, str):
            return Pair(prompt, chosen, rejected)
        # A text beside whole dialogues repeats their first turn; beside bare answers it is the user's turn.
        if len(chosen) > 1 and len(rejected) > 1:
            return _implicit(chosen, rejected)
        return Pair([{"role": "user", "content": prompt}], _answer(chosen), _answer(rejected))
    messages = _dialogue(prompt, column)
    if not messages:
        raise RowFault(column, "no message in it; mend or remove the row")
    return Pair(messages, _answer(chosen, messages), _answer(rejected, messages))


def _answer(completion: Text, prompt: Sequence[Message] = ()) -> list[Message]:
    """A completion as messages, less the prompt where it repeats it."""
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    repeats = len(prompt) > 0 and messages[: len(prompt)] == list(prompt)
    return messages[len(prompt) :] if repeats else messages


def _implicit(chosen: Text, rejected: Text) -> Pair:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowFault("rejected", "not of the same form (text, or messages) as `chosen`; mend or remove the row")
    prompt = implicit_prompt(chosen, rejected)
    if not prompt:
        same = chosen == rejected
        raise RowFault(
            "rejected" if same else "chosen",
            "equal to `chosen`, so the pair prefers nothing; mend or remove the row"
            if same
            else "there is no column `prompt`, and `chosen` and `rejected` do not begin alike; "
            "add a column `prompt`, or begin both with the same prompt",
        )
    pair = Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    for column, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if isinstance(completion, str) and HUMAN_MARK in completion:
            raise RowFault(
                column,
                "the two dialogues part before their last Human turn, whose words would be trained; remove the row",
            )
    return pair


def _check_completion(completion: Text, column: str) -> None:
    empty = "an empty completion, which teaches nothing; mend or remove the row"
    if isinstance(completion, str):
        if not completion.strip():
            raise RowFault(column, empty)
        return
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in completion) or "none"
        raise RowFault(
            column,
            f"its messages after the shared prompt are: {roles}; there must be one, the assistant's, for only its "
            "tokens may be trained. Put the turns before it into the prompt, or remove the row",
        )
    if not (completion[0].get("content") or "").strip() and not any(completion[0].get(key) for key in THOUGHTS):
        raise RowFault(column, empty)


def _json_column(row: dict[str, Any], column: str, kind: type) -> Any:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise RowFault(column, f"text that is not valid JSON ({error}); mend the row") from None
    if value is not None and not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise RowFault(column, f"{kind_of(value)} where {expected} is expected; mend the row")
    return without_none(value)
