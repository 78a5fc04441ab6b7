"""Writing files so that a reader, or the next run, finds either the old content or the new one, never half of it."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A new file once the context ends well, in one step: a temporary one beside it, synced, renamed over it."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # its room may be what a checkpoint needs
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """A file of this text, in one step."""
    with replacing(path) as file:
        file.write(text)


def write_lines(path: Path, rows: Iterable[Any], **dumped: Any) -> int:
    """JSON Lines of the rows as they come, in one step; returns how many.

    `dumped`: how, as `json.dumps` has it, which raises TypeError or ValueError for what is no JSON.
    """
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, **dumped) + "\n")
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    """`write_text` of strict JSON; see `finite` for NaN and infinity."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value as strict JSON can hold it: one-element tensors and arrays as numbers, NaN and infinities as None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return finite(value.item())
    number = float(value)
    return number if math.isfinite(number) else None


def read_json(path: Path, default: Any) -> Any:
    """The file's value, or `default` where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects of a JSONL file; a torn or foreign line is passed over, as a killed writer may leave one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def digest(path: Path) -> str | None:
    """SHA-256 of a file, or of all files below a folder with their names; None where there is nothing."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{digest(file)} {file.relative_to(path)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def sync(path: Path) -> None:
    """Has the disk hold the file, or the directory's entries, before anything later is written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
