"""Rows for supervised fine-tuning, checked and in the form that TRL's SFTTrainer takes.

| format | columns |
|---|---|
| prompt and completion (loss on the completion) | `prompt`, `completion`: both text or both messages |
| dialogue | `messages`, or `conversations` with `from`/`value` |
| text | `text` |

The first of these that the columns offer is used; `tools` and `chat_template_kwargs` stay, other columns are left out.

Invariants: a dialogue has an answer of the assistant that says something, no text is empty; rows that will be cut, or
that are dropped for their length, are counted and said.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from datasets import Dataset, DatasetDict, List, Value
from transformers import PreTrainedTokenizerBase

from llmrl.data.columns import (
    MEND,
    missing,
    read_dialogue,
    read_extras,
    read_json,
    read_text_or_dialogue,
    refuse_pictures,
)
from llmrl.data.faults import RowFault, refusal, sound
from llmrl.data.lengths import TruncationMode
from llmrl.data.mapping import ROWS_PER_BATCH, mapped
from llmrl.data.messages import Message, says_something
from llmrl.data.splits import Rows, SplitKeys, enumerated, train_and_heldout
from llmrl.data.tokenization import Encoder, check_chat_template
from llmrl.errors import RefusedError

Say = Callable[[str], None]
Text = str | list[Message]

FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("text",))
READ = "supervised rows, with `prompt` and `completion`, `messages`, `conversations` or `text`"
KWARGS = "chat_template_kwargs"
EXTRAS = ("tools", KWARGS)
MESSAGES = List({"role": Value("string"), "content": Value("string")})


class SupervisedKeys(SplitKeys, Protocol):
    """The keys read here; `llmrl.config`'s DataKeys has them."""

    @property
    def max_length(self) -> int: ...
    @property
    def truncation_mode(self) -> TruncationMode: ...


def prepare_supervised(
    config: SupervisedKeys,
    say: Say,
    dataset: Dataset | DatasetDict | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Read and check rows; returns (train, heldout) with the columns of one format above.

    tokenizer: if given, dialogues are refused where it has no chat template, and rows longer than max_length are
    counted, and dropped or refused as `truncation_mode` says (SFTTrainer cuts the others, without a word).
    Raises RefusedError naming source, row, column and remedy.
    """
    train, heldout = train_and_heldout(config, say, dataset)
    prepared = [_prepared(rows, config, say, tokenizer) for rows in (train, heldout) if rows is not None]
    return prepared[0], prepared[1] if len(prepared) > 1 else None


def _prepared(rows: Rows, keys: SupervisedKeys, say: Say, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    columns = _format(rows.table.column_names, rows.where)
    rows = sound(rows.columns((*columns, *EXTRAS)), lambda row: _read(row, columns))
    first = _read(rows.table[0], columns)
    conversational = isinstance(first[columns[0]], list)
    if tokenizer is not None:
        if conversational:
            check_chat_template(tokenizer, rows.where)
        rows = _within_length(rows, columns, keys, Encoder(tokenizer), say)
    if conversational and not _as_trl_takes_it(rows.table[0], columns):
        return _with_template_kwargs(rows, _converted(rows, columns))
    return _with_template_kwargs(rows, rows.table)


def _format(columns: Sequence[str], where: str) -> tuple[str, ...]:
    refuse_pictures(columns, where)
    for names in FORMATS:
        if all(name in columns for name in names):
            return names
    known = [name for names in FORMATS for name in names]
    if "prompt" in columns or "completion" in columns:
        raise missing("completion" if "prompt" in columns else "prompt", columns, where, known, READ)
    have = ", ".join(f"`{name}`" for name in columns)
    raise RefusedError(
        f"{where}: no column `messages`, `text`, or `prompt` with `completion`; the columns are {have}; rename them "
        "(docs/data.md)"
    )


def _read(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Text]:
    """The columns of a format, each as text or messages; raises RowFault."""
    if columns == ("text",):
        return {"text": _not_empty(row["text"], "text")}
    read_extras(row)
    if len(columns) == 1:
        messages = read_dialogue(row[columns[0]], columns[0])
        _check_answer(messages, columns[0])
        return {columns[0]: messages}
    prompt = read_text_or_dialogue(row["prompt"], "prompt")
    completion = read_text_or_dialogue(row["completion"], "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": _not_empty(completion, "completion")}
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not prompt:
        raise RowFault("prompt", f"no message in it; {MEND}")
    _check_answer(completion, "completion")
    return {"prompt": prompt, "completion": completion}


def _not_empty(value: Any, column: str) -> str:
    text = read_text_or_dialogue(value, column)
    if not isinstance(text, str):
        raise RowFault(column, f"messages where text is expected; name the column `messages`, or {MEND}")
    if not text.strip():
        raise RowFault(column, f"empty, which teaches nothing; {MEND}")
    return text


def _check_answer(messages: list[Message], column: str) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowFault(column, f"no message of the assistant in it, so there is nothing to learn; {MEND}")
    if not all(map(says_something, answers)):
        raise RowFault(column, f"an empty message of the assistant, which teaches nothing; {MEND}")


def _within_length(rows: Rows, columns: tuple[str, ...], keys: SupervisedKeys, encoder: Encoder, say: Say) -> Rows:
    """Count the rows longer than max_length; drop or refuse them as truncation_mode says."""
    overlong: dict[int, int] = {}
    for start in range(0, len(rows), ROWS_PER_BATCH):
        part = rows.table.select(range(start, min(start + ROWS_PER_BATCH, len(rows))))
        for index, length in enumerate(_lengths([row for _, row in enumerated(part)], columns, rows, start, encoder)):
            if length > keys.max_length:
                overlong[start + index] = length
    if not overlong:
        return rows
    index, length = next(iter(overlong.items()))
    if keys.truncation_mode == "error":
        reason = f"{length} tokens, more than max_length {keys.max_length}; raise it, or set truncation_mode"
        raise refusal(rows.where, {rows.numbers[index]: RowFault(columns[-1], reason)})
    if keys.truncation_mode != "drop":
        say(f"data: {rows.where}: {len(overlong)} of {len(rows)} rows are cut to max_length {keys.max_length}")
        return rows
    if len(overlong) == len(rows):
        raise RefusedError(f"{rows.where}: all {len(rows)} rows are longer than max_length {keys.max_length}; raise it")
    say(f"data: {rows.where}: {len(overlong)} of {len(rows)} rows dropped, longer than max_length {keys.max_length}")
    return rows.select([i for i in range(len(rows)) if i not in overlong])


def _lengths(
    batch: list[dict[str, Any]], columns: tuple[str, ...], rows: Rows, start: int, encoder: Encoder
) -> list[int]:
    """Tokens of each row with its answer, as the trainer will make them."""
    read = [_read(row, columns) for row in batch]
    if isinstance(read[0][columns[0]], str):
        return [len(encoder.start_ids) + len(ids) + 1 for ids in encoder.ids(["".join(r.values()) for r in read])]  # type: ignore[arg-type]
    dialogues = [[message for part in r.values() for message in part] for r in read]
    texts = encoder.render([(d, False, read_extras(row)) for d, row in zip(dialogues, batch, strict=True)])  # type: ignore[misc]
    for index, text in enumerate(texts):
        if isinstance(text, RowFault):
            raise refusal(rows.where, {rows.numbers[start + index]: text})
    return [len(ids) for ids in encoder.ids([text for text in texts if isinstance(text, str)])]


def _as_trl_takes_it(row: dict[str, Any], columns: tuple[str, ...]) -> bool:
    """Whether a row's messages are lists with `role` and `content` already, so that the table can stay as it is."""
    return columns != ("conversations",) and all(
        isinstance(row[name], list) and all("role" in message and "from" not in message for message in row[name])
        for name in columns
    )


def _converted(rows: Rows, columns: tuple[str, ...]) -> Dataset:
    """Messages of other shapes as `role` and `content`, `conversations` as `messages`."""
    named = {"conversations": "messages"}
    extras = {name: rows.table.features[name] for name in EXTRAS if name in rows.table.column_names}

    def convert(batch: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
        read = [_read(row, columns) for row in batch]
        messages = [{named.get(n, n): [_role_and_content(m) for m in part] for n, part in r.items()} for r in read]
        kept = [{name: row[name] for name in extras} for row in batch]
        return [m | k | {"row": n} for m, k, n in zip(messages, kept, numbers, strict=True)]

    features = {named.get(name, name): MESSAGES for name in columns} | extras
    return mapped(rows, convert, (), features).remove_columns("row")


def _with_template_kwargs(rows: Rows, table: Dataset) -> Dataset:
    """The template's arguments as objects, which is how TRL takes them; without the column where it holds none.

    Arrow gives every row the keys of all rows, and TRL hands on null where a row had none: other keys are a fault.
    """
    if KWARGS not in table.column_names:
        return table
    values = [read_json(row, KWARGS, dict) or {} for _, row in enumerated(rows.table.select_columns([KWARGS]))]
    for number, value in zip(rows.numbers, values, strict=True):
        if value.keys() != values[0].keys():
            known = ", ".join(f"`{key}`" for key in values[0]) or "none"
            raise refusal(rows.where, {number: RowFault(KWARGS, f"other keys than in the first row ({known}); {MEND}")})
    table = table.remove_columns(KWARGS)
    return table.add_column(KWARGS, values) if values[0] else table


def _role_and_content(message: Any) -> dict[str, str]:
    return {"role": message["role"], "content": message.get("content") or ""}
