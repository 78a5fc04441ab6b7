"""Rows of preference data, in every format that people bring, as one kind of pair.

| format | columns |
|---|---|
| plain | `prompt`, `chosen`, `rejected`: text |
| conversational | the same three as lists of messages (`role`/`content` or `from`/`value`), or a single message each |
| implicit prompt | `chosen` and `rejected` only: whole dialogues (messages or text) that begin alike |
| conversations | `conversations` (messages) as the prompt, `chosen` and `rejected` one message each |

Optional: `tools` (a list, or JSON text) and `chat_template_kwargs` (an object, or JSON text). For VPO `calibration`:
further answers to the same prompt, one (as `chosen` is written) or a list of them.

Invariants of a `Pair`: both completions are of the same form as the prompt, are not empty and differ; in a dialogue
each is one assistant message, so that every token of it is the policy's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmrl.data.columns import (
    MEND,
    missing,
    nearest,
    read_dialogue,
    read_extras,
    read_text_or_dialogue,
    refuse_pictures,
)
from llmrl.data.faults import RowFault
from llmrl.data.messages import HUMAN_MARK, Message, implicit_prompt, says_something

Text = str | list[Message]

COLUMNS = ("prompt", "conversations", "chosen", "rejected", "tools", "chat_template_kwargs")
READ = "preference pairs, with `prompt`, `chosen` and `rejected`"
CALIBRATION = "calibration"
EMPTY = f"an empty completion, which teaches nothing; {MEND}"
EQUAL = f"equal to `chosen`, so the pair prefers nothing; {MEND}"


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers: three texts, or three lists of messages; `extras` are arguments for their template.

    `calibration`: further answers to the prompt, of which none is preferred.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    extras: dict[str, Any] = field(default_factory=dict)
    calibration: tuple[Text, ...] = ()

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


def check_columns(columns: Sequence[str], first_row: dict[str, Any], where: str, reads: str = READ) -> None:
    """Refuse data without `chosen` and `rejected`, or with a column that would be ignored against the user's intent.
    `reads`: the formats that are read there, pairs among them."""
    for name in ("chosen", "rejected"):
        if name not in columns:
            raise missing(name, columns, where, COLUMNS, reads)
    if "prompt" not in columns and "conversations" not in columns:
        # `question`, say, may be the prompt or a label; where the answers share no beginning it is the prompt.
        implicit = implicit_prompt(first_row["chosen"], first_row["rejected"])
        if nearest("prompt", [name for name in columns if name not in COLUMNS], close_only=bool(implicit)):
            raise missing("prompt", columns, where, COLUMNS, reads)
    refuse_pictures(columns, where)


def read_pair(row: dict[str, Any]) -> Pair:
    """One row as a pair; raises RowFault."""
    chosen = read_text_or_dialogue(row["chosen"], "chosen")
    rejected = read_text_or_dialogue(row["rejected"], "rejected")
    if "prompt" in row:
        pair = _explicit(row["prompt"], chosen, rejected, "prompt")
    elif "conversations" in row:
        pair = _explicit(row["conversations"], chosen, rejected, "conversations")
    else:
        pair = _implicit(chosen, rejected)
    _check_completion(pair.chosen, "chosen")
    _check_completion(pair.rejected, "rejected")
    if pair.chosen == pair.rejected:
        raise RowFault("rejected", EQUAL)
    extras = read_extras(row)
    if extras["tools"] and not pair.conversational:
        raise RowFault("tools", "needs the conversational format: plain text has no chat template to show them in")
    return replace(pair, extras=extras)


def with_calibration(pair: Pair, row: dict[str, Any]) -> Pair:
    """The pair with the answers in the row's column `calibration`; raises RowFault."""
    value = row[CALIBRATION]
    if not value:
        raise RowFault(CALIBRATION, f"no answer in it; {MEND}")
    several = isinstance(value, list) and not isinstance(value[0], dict)
    answers = [_calibrating(answer, pair) for answer in (value if several else [value])]
    return replace(pair, calibration=tuple(answers))


def _calibrating(value: Any, pair: Pair) -> Text:
    answer = read_text_or_dialogue(value, CALIBRATION)
    if isinstance(pair.prompt, list):
        answer = as_answer(answer, pair.prompt)
    elif not isinstance(answer, str):
        raise RowFault(CALIBRATION, f"messages, and the pair is text; {MEND}")
    _check_completion(answer, CALIBRATION)
    return answer


def _explicit(prompt: Any, chosen: Text, rejected: Text, column: str) -> Pair:
    if isinstance(prompt, str):
        if isinstance(chosen, str) and isinstance(rejected, str):
            return Pair(prompt, chosen, rejected)
        # A text beside whole dialogues repeats their first turn; beside bare answers it is the user's turn.
        if len(chosen) > 1 and len(rejected) > 1:
            return _implicit(chosen, rejected)
        return Pair([{"role": "user", "content": prompt}], as_answer(chosen), as_answer(rejected))
    messages = read_dialogue(prompt, column)
    if not messages:
        raise RowFault(column, f"no message in it; {MEND}")
    return Pair(messages, as_answer(chosen, messages), as_answer(rejected, messages))


def as_answer(completion: Text, prompt: Sequence[Message] = ()) -> list[Message]:
    """A completion as messages, less the prompt where it repeats it."""
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    repeats = len(prompt) > 0 and messages[: len(prompt)] == list(prompt)
    return messages[len(prompt) :] if repeats else messages


def _implicit(chosen: Text, rejected: Text) -> Pair:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowFault("rejected", f"not of the same form (text, or messages) as `chosen`; {MEND}")
    if chosen == rejected:
        raise RowFault("rejected", EQUAL)
    prompt = implicit_prompt(chosen, rejected)
    if not prompt:
        raise RowFault(
            "chosen",
            "there is no column `prompt`, and `chosen` and `rejected` do not begin alike; add a column `prompt`, or "
            "begin both with the same prompt",
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
    if isinstance(completion, str):
        if not completion.strip():
            raise RowFault(column, EMPTY)
        return
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in completion) or "none"
        raise RowFault(
            column,
            f"its messages after the shared prompt are: {roles}; there must be one, the assistant's, for only its "
            "tokens may be trained. Put the turns before it into the prompt, or remove the row",
        )
    if not says_something(completion[0]):
        raise RowFault(column, EMPTY)
