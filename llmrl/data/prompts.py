"""Rows that a policy is asked about, online: every column is kept, for the environment and the reward functions.

Invariants: a row's number is its number in its source, from 1; training and held-out rows of a data set share none, and
what those that an environment makes share is said; nothing is dropped without being counted and said.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Dataset, DatasetDict

from llmrl.data.faults import RowFault, refusal
from llmrl.data.splits import Rows, SplitKeys, rows_of, train_and_heldout
from llmrl.errors import RefusedError

Row = dict[str, Any]


class PromptKeys(SplitKeys, Protocol):
    """The keys read here; `llmrl.config`'s SamplingKeys has them."""

    @property
    def overlong_prompts(self) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """One row with its number."""

    number: int
    row: Row


@dataclass(frozen=True)
class PromptData:
    """Prompts to train on and to evaluate on, and a fingerprint of the former."""

    train: list[Prompt]
    heldout: list[Prompt]
    fingerprint: str
    columns: frozenset[str]


def prompts_of_dataset(
    keys: PromptKeys,
    length_of: Callable[[Row], int],
    room: int | None,
    say: Callable[[str], None],
    dataset: Dataset | DatasetDict | None = None,
    tried: int | None = None,
) -> PromptData:
    """The rows of a data set. `length_of(row)` is the prompt's length in tokens, and raises RefusedError for a row that
    is none; a longer one than `room` is dropped or refused, as `overlong_prompts` says. `tried`: only so many rows are
    measured, where that is expensive."""
    train, heldout = train_and_heldout(keys, say, dataset)
    kept = [_fitting(rows, keys, length_of, room, say, tried) for rows in (train, heldout) if rows is not None]
    evaluated = kept[1][: keys.eval_rows] if len(kept) > 1 else []
    if heldout is not None and len(evaluated) < len(kept[1]):
        say(f"data: {heldout.where}: the first {len(evaluated)} of the held-out rows are evaluated (eval_rows)")
    if not kept[0]:
        raise RefusedError(f"{train.where}: no prompt leaves room for an answer, so there is nothing to train on")
    return PromptData(kept[0], evaluated, _fingerprint(kept[0]), frozenset(train.table.column_names))


def prompts_made(train: Sequence[Row], heldout: Sequence[Row], say: Callable[[str], None]) -> PromptData:
    """Rows that an environment made. Held-out rows that are also trained on measure less than they seem to: said."""
    say(f"data: {len(train)} rows to train on and {len(heldout)} held out, made by the environment")
    trained = {_text_of(row) for row in train}
    if shared := sum(_text_of(row) in trained for row in heldout):
        say(f"data: {shared} of {len(heldout)} held-out rows are also trained on: `rows` gives them for both splits")
    prompts = [Prompt(i + 1, row) for i, row in enumerate(train)]
    beside = [Prompt(i + 1, row) for i, row in enumerate(heldout)]
    return PromptData(prompts, beside, _fingerprint(prompts), frozenset(train[0] if train else ()))


def _fitting(
    rows: Rows,
    keys: PromptKeys,
    length_of: Callable[[Row], int],
    room: int | None,
    say: Callable[[str], None],
    tried: int | None,
) -> list[Prompt]:
    kept, faults, dropped = [], {}, 0
    for place, (number, row) in enumerate(zip(rows.numbers, _iterate(rows.table), strict=True)):
        if tried is not None and place >= tried:
            kept.append(Prompt(number, row))
            continue
        try:
            length = length_of(row)
        except RefusedError as error:
            faults[number] = RowFault(None, str(error))
            continue
        if room is not None and length > room:
            if keys.overlong_prompts == "error":
                faults[number] = RowFault(
                    None,
                    f"the prompt has {length} tokens, but only {room} leave room for max_completion_length; shorten "
                    "it, raise max_length, or set overlong_prompts to drop",
                )
            dropped += 1
            continue
        kept.append(Prompt(number, row))
    if faults:
        raise refusal(rows.where, faults)
    if dropped:
        say(f"data: {rows.where}: {dropped} of {len(rows)} rows dropped, their prompts are longer than {room} tokens")
    return kept


def _iterate(table: Dataset) -> Iterable[Row]:
    return (row for batch in table.iter(1000) for row in rows_of(batch))


def _text_of(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.number, prompt.row], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
