"""Training rows and held-out rows.

Invariants: the two share no row; rows cut from one split share no prompt either, so a prompt with several pairs is
never on both sides; the choice depends on the rows' content alone, not on their order, a seed or the machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Dataset, DatasetDict

from llmrl.data.messages import implicit_prompt
from llmrl.data.sources import find_source

# The columns that say what a row asks, by the first of these that are there; else the whole row does.
PROMPT_COLUMNS = (
    ("prompt",), ("conversations",), ("chosen", "rejected"), ("messages",), ("first", "second"), ("segments",)
)  # fmt: skip
LARGEST_SHARE = 0.1


class SplitKeys(Protocol):
    """The keys read here; `llmrl.config`'s DataKeys and SamplingKeys have them. `dataset_name` is None only where a
    `datasets` object is given in its place."""

    @property
    def dataset_name(self) -> str | None: ...
    @property
    def dataset_config(self) -> str | None: ...
    @property
    def dataset_train_split(self) -> str: ...
    @property
    def dataset_test_split(self) -> str: ...
    @property
    def eval_rows(self) -> int: ...


@dataclass(frozen=True)
class Rows:
    """Some rows of a source. `where` names the source in messages; `numbers[i]` is row i's number in it, from 1."""

    table: Dataset
    where: str
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, indices: Sequence[int]) -> "Rows":
        """The rows at these indices, in this order, with their numbers."""
        return Rows(self.table.select(indices), self.where, [self.numbers[i] for i in indices])

    def columns(self, wanted: Sequence[str]) -> "Rows":
        """The same rows with those of the wanted columns that they have."""
        names = [name for name in wanted if name in self.table.column_names]
        return Rows(self.table.select_columns(names), self.where, self.numbers)


def whole(table: Dataset, where: str) -> Rows:
    """All rows of a source."""
    return Rows(table, where, range(1, len(table) + 1))


def train_and_heldout(
    keys: SplitKeys,
    say: Callable[[str], None],
    dataset: Dataset | DatasetDict | None = None,
) -> tuple[Rows, Rows | None]:
    """Rows to train on and rows to evaluate on; None if eval_rows is 0 or nothing can be held out. Says which.

    The source's own `dataset_test_split` is taken whole where it has one. Else `eval_rows` rows, at most a tenth, are
    held out of the train split.
    """
    given = keys.dataset_name if dataset is None else dataset
    assert given is not None, "neither dataset_name nor a data set"
    source = find_source(given, keys.dataset_config)
    train_split, test_split = keys.dataset_train_split, keys.dataset_test_split
    train = whole(source.rows(train_split, "dataset_train_split"), source.names[train_split])
    if keys.eval_rows == 0:
        say(f"data: {train.where}: {len(train)} rows to train on, none held out (eval_rows is 0)")
        return train, None
    if test_split in source.names and test_split != train_split:
        heldout = whole(source.rows(test_split, "dataset_test_split"), source.names[test_split])
        say(f"data: {train.where}: {len(train)} rows to train on; {heldout.where}: {len(heldout)} rows held out")
        return train, heldout
    return hold_out(train, keys.eval_rows, say)


def hold_out(rows: Rows, wanted: int, say: Callable[[str], None]) -> tuple[Rows, Rows | None]:
    """Cut at most `wanted` rows, and at most a tenth (but one of a few), off `rows`."""
    limit = min(wanted, max(int(len(rows) * LARGEST_SHARE), 1), len(rows) - 1)
    chosen = set(_smallest_groups(_prompt_keys(rows.table), limit))
    if not chosen:
        say(f"data: {rows.where}: {len(rows)} rows to train on, none held out: too few different prompts to spare one")
        return rows, None
    train = rows.select([i for i in range(len(rows)) if i not in chosen])
    heldout = rows.select(sorted(chosen))
    say(
        f"data: {rows.where}: {len(train)} rows to train on, {len(heldout)} held out of the same split "
        "(chosen by a hash of their prompts; no prompt is on both sides)"
    )
    return train, heldout


def _prompt_keys(table: Dataset) -> list[bytes]:
    columns = next((names for names in PROMPT_COLUMNS if set(names) <= set(table.column_names)), None)
    view = table.select_columns(list(columns)) if columns else table
    return [_digest(_prompt(row)) for batch in view.iter(1000) for row in rows_of(batch)]


def enumerated(table: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its index, from 0."""
    return enumerate(row for batch in table.iter(1000) for row in rows_of(batch))


def rows_of(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A batch of columns as one object a row."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _prompt(row: dict[str, Any]) -> Any:
    if row.keys() == {"chosen", "rejected"}:
        return implicit_prompt(row["chosen"], row["rejected"]) or row
    if row.keys() == {"messages"}:
        return row["messages"][:-1] if isinstance(row["messages"], list) else row
    if row.keys() == {"first", "second"} or row.keys() == {"segments"}:
        segments = row.get("segments") or [row.get("first"), row.get("second")]
        return [segment.get("prompt") if isinstance(segment, dict) else segment for segment in segments]
    return row


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


def _smallest_groups(keys: list[bytes], limit: int) -> list[int]:
    """Indices of whole groups of equal keys, smallest keys first, at most `limit`; a group too large is passed by."""
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    chosen: list[int] = []
    for key in sorted(groups):
        if len(chosen) + len(groups[key]) <= limit:
            chosen += groups[key]
    return chosen
