"""Rows that compare segments of behaviour, in every format, as segments with a label or a score each.

Scored samples are compared, too, and have a reader of their own (`llmrl.data.scored`).

| format | columns |
|---|---|
| compared segments | `first` and `second`, a segment each, and `label`: 0 the first is preferred, 1 the second, 0.5 neither (between: how likely the second is) |
| scored segments | `segments`: two and more, each with a `score`; the higher is preferred |
| preference pairs | those of `llmrl.data.formats`: `chosen` is the first segment, `rejected` the second, the label 0 |

A segment is an object: `prompt`, the state in which it starts (text, or the messages so far), and `completion`, what the
policy did there: text, a message, or the assistant's messages with what users and tools said between them. Segments of
a row may start in different states. `ends: false`: the completion is cut out of a longer one and gets no stop token.
`tools` and `chat_template_kwargs` may stand in the segment or beside it in the row.

Invariants of a `Segment`: prompt and completion are of the same form; a dialogue's completion begins and ends with a
message of the assistant (what came before the first is part of the prompt); none of them is empty.
"""  # noqa: E501

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrl.data import formats
from llmrl.data.columns import MEND, missing, read_extras, read_text_or_dialogue, refuse_pictures
from llmrl.data.faults import RowFault
from llmrl.data.formats import Text
from llmrl.data.messages import Message, kind_of, says_something
from llmrl.data.scored_rows import READ as SCORED
from llmrl.errors import RefusedError

COLUMNS = ("first", "second", "label", "segments")
SHOWN_BY = {
    "scored segments": ("segments",),
    "compared segments": ("first", "second"),
    "scored samples": ("completions", "rewards"),
    "preference pairs": ("chosen", "rejected"),
}
"""The columns by which each format is known."""
MOST = 3.4e38
"""What a float32 holds, as which scores are kept."""
READ = (
    f"{formats.READ}; compared segments, with `first`, `second` and `label`; scored segments, with `segments`; {SCORED}"
)
EMPTY = f"an empty segment, which is no behaviour to prefer; {MEND}"
NOBODY = f"no message of the assistant in it, and only the assistant's behaviour is compared; {MEND}"


@dataclass(frozen=True)
class Segment:
    """Where a segment starts and what the policy did there: two texts, or two lists of messages; `places`: in which
    columns the two stand; `ends`: the policy stopped at its end; `extras`: arguments of the chat template."""

    prompt: Text
    completion: Text
    places: tuple[str, str]
    ends: bool = True
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


@dataclass(frozen=True)
class Comparable:
    """The segments of one row with what tells which is preferred: for two the label (of both the same), or scores."""

    segments: tuple[Segment, ...]
    values: tuple[float, ...]

    @property
    def conversational(self) -> bool:
        """Whether any segment is a dialogue."""
        return any(segment.conversational for segment in self.segments)


@dataclass(frozen=True)
class Format:
    """How the rows of a file are read. `value`: what their values are; `columns`: those that are read."""

    name: str
    columns: tuple[str, ...]
    value: str
    read: Callable[[dict[str, Any]], Comparable]


def refuse_two_formats(columns: Sequence[str], where: str) -> None:
    """Refuse data whose columns show two formats, of which one would be ignored."""
    shown = [(name, own) for name, own in SHOWN_BY.items() if set(own) <= set(columns)]
    if len(shown) > 1:
        (name, own), (other, others) = (
            (name, " and ".join(f"`{column}`" for column in own)) for name, own in shown[:2]
        )
        raise RefusedError(
            f"{where}: the columns are those of {name} ({own}) and of {other} ({others}), and only one of them can be "
            "compared; remove the columns of the other"
        )


def find_format(columns: Sequence[str], first_row: dict[str, Any], where: str) -> Format:
    """The format that the columns show; raises RefusedError where one of its columns is missing."""
    refuse_pictures(columns, where)
    if "segments" in columns:
        return SCORED_SEGMENTS
    if "first" in columns or "second" in columns:
        for name in ("first", "second", "label"):
            if name not in columns:
                raise missing(name, columns, where, COLUMNS, READ)
        return COMPARED_SEGMENTS
    formats.check_columns(columns, first_row, where, READ)
    return PAIRS


def _read_compared(row: dict[str, Any]) -> Comparable:
    segments = tuple(_segment(row[name], name, row) for name in ("first", "second"))
    label = _number(row["label"], "label")
    if not 0 <= label <= 1:
        raise RowFault(
            "label",
            f"{label:g} is outside 0 to 1: 0 says that the first segment is preferred, 1 the second, 0.5 neither; "
            f"{MEND}",
        )
    first, second = segments
    if (first.prompt, first.completion, first.ends) == (second.prompt, second.completion, second.ends):
        raise RowFault("second", f"equal to `first`, so that neither can be preferred; {MEND}")
    return Comparable(segments, (label, label))


def _read_scored(row: dict[str, Any]) -> Comparable:
    items = row["segments"]
    if not isinstance(items, list):
        raise RowFault("segments", f"{kind_of(items)} where a list of segments is expected; {MEND}")
    if len(items) < 2:
        raise RowFault(
            "segments",
            f"a group of {len(items)}, in which nothing can be compared; give two and more, or remove the row",
        )
    places = [f"segments.{number}" for number in range(1, len(items) + 1)]
    segments = tuple(_segment(item, place, row) for item, place in zip(items, places, strict=True))
    scores = tuple(_number(item.get("score"), f"{place}.score") for item, place in zip(items, places, strict=True))
    return Comparable(segments, scores)


def _read_pair(row: dict[str, Any]) -> Comparable:
    pair = formats.read_pair(row)
    completions = (("chosen", pair.chosen), ("rejected", pair.rejected))
    segments = tuple(Segment(pair.prompt, text, ("prompt", column), extras=pair.extras) for column, text in completions)
    return Comparable(segments, (0.0, 0.0))


COMPARED_SEGMENTS = Format(
    "compared segments", ("first", "second", "label", "tools", "chat_template_kwargs"), "label", _read_compared
)
SCORED_SEGMENTS = Format("scored segments", ("segments", "tools", "chat_template_kwargs"), "score", _read_scored)
PAIRS = Format("preference pairs", formats.COLUMNS, "label", _read_pair)


def _segment(value: Any, column: str, row: dict[str, Any]) -> Segment:
    if not isinstance(value, dict):
        raise RowFault(
            column, f"{kind_of(value)} where a segment is expected, an object with `prompt` and `completion`"
        )
    for name in ("prompt", "completion"):
        if value.get(name) is None:
            known = ", ".join(f"`{key}`" for key, item in value.items() if item is not None) or "none"
            raise RowFault(column, f"a segment without `{name}` (its keys: {known}); {MEND}")
    places = (f"{column}.prompt", f"{column}.completion")
    prompt = read_text_or_dialogue(value["prompt"], places[0])
    completion = read_text_or_dialogue(value["completion"], places[1])
    ends = True if value.get("ends") is None else value["ends"]
    if not isinstance(ends, bool):
        raise RowFault(f"{column}.ends", f"{kind_of(ends)} where true or false is expected; {MEND}")
    extras = read_extras({**row, **{key: item for key, item in value.items() if item is not None}})
    if isinstance(prompt, str) and isinstance(completion, str):
        if extras["tools"]:
            raise RowFault("tools", "needs messages: plain text has no chat template to show them in")
        if not completion.strip():
            raise RowFault(places[1], EMPTY)
        return Segment(prompt, completion, places, ends, extras)
    return Segment(*_dialogue(prompt, completion, places), places, ends, extras)


def _dialogue(prompt: Text, completion: Text, places: tuple[str, str]) -> tuple[list[Message], list[Message]]:
    """Both as messages, the completion from the assistant's first on."""
    history = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    own = [index for index, message in enumerate(said) if message["role"] == "assistant"]
    if not own:
        raise RowFault(places[1], NOBODY if said else EMPTY)
    if not all(says_something(said[index]) for index in own):
        raise RowFault(places[1], EMPTY)
    if own[-1] != len(said) - 1:
        raise RowFault(
            places[1],
            f"ends with a message of role {said[-1]['role']}, to which the policy does nothing any more; leave the "
            "messages after the assistant's last out",
        )
    history, said = [*history, *said[: own[0]]], said[own[0] :]
    if not history:
        raise RowFault(places[0], f"no message in it; {MEND}")
    if history[-1]["role"] == "assistant":
        raise RowFault(
            places[0],
            "ends with the assistant's message, so that it is not its turn. Move that message to the completion; a "
            "segment that starts within a turn is given as text: the template's text up to there, and what follows",
        )
    return history, said


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowFault(column, f"{kind_of(value)} where a finite number is expected; {MEND}")
    if abs(value) > MOST:
        raise RowFault(column, f"{value:g} is beyond what a float32 holds; scale all scores down, or remove the row")
    return float(value)
