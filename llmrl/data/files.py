"""JSONL, JSON and CSV files as Arrow tables, every fault named by file and line.

Invariants: rows and lines count from 1, blank lines are no rows; a column holds one kind of value; `tools` and
`chat_template_kwargs` are kept as JSON text, because Arrow would give every row's object the keys of all the others.
"""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from llmrl.errors import RefusedError

ROWS_PER_CHUNK = 10_000
OTHER_SEPARATORS = ";\t|"
JSON_COLUMNS = ("tools", "chat_template_kwargs")
KINDS: dict[type, str] = {
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read_jsonl(path: Path) -> pa.Table:
    """One JSON object a line."""
    return _table(_jsonl_rows(path), path)


def read_json(path: Path) -> pa.Table:
    """One array of objects; a file that is JSON Lines in disguise is read as such."""
    with _open(path) as file:
        start = file.read(4096).lstrip()
    if not start.startswith("["):
        return read_jsonl(path)
    with _open(path) as file:
        try:
            items = json.load(file)
        except json.JSONDecodeError as error:
            raise RefusedError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}); mend the line"
            ) from None
        except UnicodeDecodeError as error:
            raise _not_utf8(str(path), error) from None
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"{path}: cannot be read ({error}); mend the file") from None
    return _table(((number, item) for number, item in enumerate(items, 1)), path)


def read_csv(path: Path) -> pa.Table:
    """A header line, then rows; every value stays the text it is, so that ` 4` does not become a number."""
    return _table(_csv_rows(path), path)


def _open(path: Path, mode: str = "rt") -> Any:
    return (gzip.open if path.suffix == ".gz" else open)(path, mode, encoding="utf-8-sig" if mode == "rt" else None)


def _lines(path: Path) -> Iterator[str]:
    """With their line ends. Read as bytes: a text file is decoded in blocks, and the line of a wrong byte is lost."""
    with _open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{path}, line {number}", error) from None


def _not_utf8(place: str, error: UnicodeDecodeError) -> RefusedError:
    return RefusedError(f"{place}: not UTF-8 text ({error.reason}); save the file as UTF-8")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    line = 0
    try:
        for line, text in enumerate(_lines(path), 1):
            if text.strip():
                yield line, json.loads(text)
    except json.JSONDecodeError as error:
        raise RefusedError(
            f"{path}, line {line}: not valid JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1}); "
            "each line must hold one whole JSON object. Mend or remove the line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise RefusedError(f"{path}, line {line}: cannot be read ({error}). Mend or remove the line") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise RefusedError(f"{path}, line 1: a column name stands twice in the header; rename one")
        if len(header) == 1 and (other := next((c for c in OTHER_SEPARATORS if c in header[0]), None)):
            raise RefusedError(
                f"{path}, line 1: {other!r} separates the columns {header[0]!r}; save the file with commas"
            )
        for values in reader:
            if len(values) != len(header) and values:
                raise RefusedError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(header)} columns; "
                    "put values that hold commas or line ends in double quotes"
                )
            if values:
                yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise RefusedError(f"{path}, line {reader.line_num}: not valid CSV ({error}); mend the line") from None


def _table(rows: Iterator[tuple[int, Any]], path: Path) -> pa.Table:
    """Rows with their line (or, in an array, row) numbers as one table. Raises on the first row that does not fit."""
    columns = _Columns(path)
    chunks: list[pa.Table] = []
    pending: list[dict[str, Any]] = []
    for line, row in rows:
        if not isinstance(row, dict):
            kind = KINDS.get(type(row), "null")
            raise RefusedError(f"{path}, line {line}: {kind} where a JSON object with named columns is expected")
        pending.append(columns.checked(row))
        if len(pending) == ROWS_PER_CHUNK:
            chunks.append(columns.chunk(pending))
            pending = []
    if pending:
        chunks.append(columns.chunk(pending))
    if not chunks:
        return pa.table({})
    try:
        return pa.concat_tables(chunks, promote_options="permissive")
    except pa.ArrowException as error:
        raise RefusedError(f"{path}: a column's inner structure changes between rows: {error}") from None


class _Columns:
    """What each column has held so far, so that the first row that breaks with it can be named."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.first: dict[str, tuple[str, int]] = {}

    def checked(self, row: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        for name, value in row.items():
            if value is None:
                continue
            if name in JSON_COLUMNS:
                row[name] = value if isinstance(value, str) else json.dumps(value)
                continue
            kind = KINDS[type(value)]
            known, since = self.first.setdefault(name, (kind, self.count))
            if kind != known:
                raise RefusedError(
                    f"{self.path}, row {self.count}, column `{name}`: {kind}, but row {since} has {known} there; "
                    "a column must hold one kind of value. Mend the row, or remove the column if it is not needed"
                )
        return row

    def chunk(self, rows: list[dict[str, Any]]) -> pa.Table:
        # Names in order of first appearance, and all of them: Arrow would take those of the first row for all.
        names = list(dict.fromkeys(name for row in rows for name in row))
        arrays = []
        for name in names:
            values = [row.get(name) for row in rows]
            try:
                arrays.append(pa.array(values))
            except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
                raise RefusedError(self._misfit(name, values, error)) from None
        return pa.table(arrays, names=names)

    def _misfit(self, name: str, values: list[Any], error: Exception) -> str:
        """Arrow says that some value does not fit, not which: the first whose prefix fails, by bisection."""
        low, high = 0, len(values) - 1
        while low < high:
            middle = (low + high) // 2
            try:
                pa.array(values[: middle + 1])
                low = middle + 1
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                high = middle
        row = self.count - len(values) + low + 1
        if isinstance(error, UnicodeEncodeError):
            return (
                f"{self.path}, row {row}, column `{name}`: half of a surrogate pair, as a character that was cut in "
                "two leaves it; mend the text"
            )
        return (
            f"{self.path}, row {row}, column `{name}`: its inner structure differs from the rows before ({error}); "
            "mend the row, or remove the column if it is not needed"
        )
