"""Rows to columns of token ids, batch by batch.

Invariants: every rank does this on its own and writes only into a scratch folder of its own, so ranks never wait for or
read each other's files; a fingerprint covers the ids alone and does not depend on how rows were batched.
"""

import atexit
import functools
import hashlib
import itertools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value

from llmrl.data.splits import Rows, rows_of

ROWS_PER_BATCH = 1000
# Up to this many rows stay in memory; more are written to a scratch file and mapped from there.
ROWS_IN_MEMORY = 100_000


class Fingerprint:
    """A hash of columns of token ids in the order of their rows."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def update(self, name: str, lists: Sequence[Sequence[int]]) -> None:
        """Add further rows of the column `name`."""
        lengths = np.fromiter(map(len, lists), "<i4", len(lists))
        ids = np.fromiter(itertools.chain.from_iterable(lists), "<i4", int(lengths.sum()))
        for key, array in ((f"{name}/lengths", lengths), (f"{name}/ids", ids)):
            self._hashes.setdefault(key, hashlib.sha256()).update(array.tobytes())

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        parts = [f"{key}={self._hashes[key].hexdigest()}" for key in sorted(self._hashes)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def combined(fingerprints: Sequence[Fingerprint]) -> str:
    """One fingerprint of several parts, which tells what is in which: 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(part.hexdigest() for part in fingerprints).encode()).hexdigest()[:32]


def mapped(
    rows: Rows,
    function: Callable[[list[dict[str, Any]], list[int]], list[dict[str, Any]]],
    id_columns: Sequence[str],
    others: Mapping[str, Any] | None = None,
    fingerprint: Fingerprint | None = None,
) -> Dataset:
    """`function` over all rows: (rows, their numbers in the source) -> the rows that are kept, as objects.

    The result has the `id_columns` (lists of int32), `row` (int64) and the columns of `others` (name -> feature).
    """
    features = Features(
        {name: List(Value("int32")) for name in id_columns} | {"row": Value("int64")} | dict(others or {})
    )

    def apply(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        kept = function(rows_of(batch), [rows.numbers[i] for i in indices])
        if fingerprint is not None:
            for name in id_columns:
                fingerprint.update(name, [item[name] for item in kept])
        return {name: [item[name] for item in kept] for name in features}

    in_memory = len(rows) <= ROWS_IN_MEMORY
    with _progress_bar(shown=not in_memory and os.environ.get("RANK", "0") == "0"):
        return rows.table.map(
            apply,
            batched=True,
            batch_size=ROWS_PER_BATCH,
            with_indices=True,
            remove_columns=rows.table.column_names,
            features=features,
            load_from_cache_file=False,
            keep_in_memory=in_memory,
            cache_file_name=None if in_memory else str(_scratch() / f"{uuid.uuid4().hex}.arrow"),
            # Given, so that datasets does not hash the function with everything that it refers to.
            new_fingerprint=uuid.uuid4().hex,
            desc="Tokenising",
        )


@functools.cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="llmrl_data_")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
