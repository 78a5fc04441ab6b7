"""What is said about columns, and how one is read out of a row, in the same words for every kind of data."""

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from llmrl.data.faults import RowFault
from llmrl.data.messages import Message, dialogue, is_dialogue, kind_of, without_none
from llmrl.errors import RefusedError

OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "problem"),
    "chosen": ("accepted", "preferred", "winner", "positive", "good"),
    "rejected": ("dispreferred", "loser", "negative", "bad"),
    "completion": ("response", "output", "answer", "solution", "target"),
    "answer": ("solution", "target", "label", "result"),
    "completions": ("responses", "outputs", "samples", "answers", "generations"),
    "rewards": ("scores", "reward", "score", "labels"),
}
PICTURES = ("image", "images", "video", "videos", "audio")
MEND = "mend or remove the row"


def nearest(name: str, columns: Iterable[str], close_only: bool = False) -> str | None:
    """The column that was probably meant by a missing one: written alike, or (not close_only) meaning the same."""
    columns = list(columns)
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.7)
    if not near and not close_only:
        same = OTHER_NAMES.get(name, ())
        near = [column for column in columns if name in column.lower() or column.lower() in same]
    return near[0] if near else None


def missing(name: str, columns: Sequence[str], where: str, known: Iterable[str] = (), reads: str = "") -> RefusedError:
    """The refusal of data without the column `name`; columns in `known` have a use of their own. `reads`: the formats
    that are read there, for it may be data of another kind."""
    near = nearest(name, [column for column in columns if column not in known])
    hint = f"did you mean `{near}`? Rename it" if near else "rename the one that holds it, or use other data"
    if reads:
        hint += f". Read here: {reads} (docs/data.md)"
    have = ", ".join(f"`{column}`" for column in columns)
    return RefusedError(f"{where}: no column `{name}`; the columns are {have}; {hint}")


def refuse_pictures(columns: Iterable[str], where: str) -> None:
    """Refuse data that is more than text, which would be trained as if its pictures were not there."""
    for name in columns:
        if name in PICTURES:
            raise RefusedError(f"{where}, column `{name}`: only text is supported; remove the column or use other data")


def read_dialogue(value: Any, column: str) -> list[Message]:
    """The messages in a column; raises RowFault."""
    if not is_dialogue(value):
        raise RowFault(column, f"{kind_of(value)} where text or a list of messages is expected; {MEND}")
    try:
        return dialogue(value)
    except ValueError as error:
        raise RowFault(column, f"{error}; {MEND}") from None


def read_text_or_dialogue(value: Any, column: str) -> str | list[Message]:
    """The text or the messages in a column; raises RowFault."""
    return value if isinstance(value, str) else read_dialogue(value, column)


def read_json(row: dict[str, Any], column: str, kind: type[list] | type[dict]) -> Any:
    """A list or object, perhaps written as JSON text; None if there is none in the row. Raises RowFault."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise RowFault(column, f"text that is not valid JSON ({error}); {MEND}") from None
    if value is not None and not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise RowFault(column, f"{kind_of(value)} where {expected} is expected; {MEND}")
    return without_none(value) or None


def read_extras(row: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a row brings for its chat template: `tools` and everything in `chat_template_kwargs`."""
    return {"tools": read_json(row, "tools", list), **(read_json(row, "chat_template_kwargs", dict) or {})}
