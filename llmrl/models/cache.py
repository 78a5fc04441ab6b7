"""Folders that are made once per user and then only read: fetched and trained models.

Invariants: a folder under its final name is whole (it is made beside it, fsynced and renamed); of several processes
that want it at once, one makes it and the others wait for it; a folder that was damaged later is noticed by its file
sizes and made again.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrl.files import sync

SOURCE_FILE = "source.json"  # written last: where the folder comes from, and the size of each of its files


def cache_root() -> Path:
    """`LLMRL_CACHE` if it is set, else `~/.cache/llmrl` (`XDG_CACHE_HOME` is honoured)."""
    if own := os.environ.get("LLMRL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmrl"


def is_whole(folder: Path) -> bool:
    """Whether `folder` was published by `make_once` and every file still has the size that it had then."""
    try:
        sizes = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def make_once(folder: Path, make: Callable[[Path], dict[str, Any]], say: Callable[[str], None]) -> Path:
    """Return `folder`, made by `make` if it is not there.

    `make` fills the empty directory that it is given and returns what is worth knowing about the source; an exception
    from it leaves nothing behind.
    """
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock_file = folder.parent / f".{folder.name}.lock"
    with _lock(lock_file, when_busy=lambda: say(f"another process is making {folder}; waiting for it")):
        if not is_whole(folder):
            _make_and_publish(folder, make)
    return folder


@contextmanager
def _lock(file: Path, when_busy: Callable[[], None]) -> Iterator[None]:
    """Held by one process at a time; the kernel releases it when that process ends, however it ends."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_busy()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make_and_publish(folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
    """Only under the lock: whatever unfinished directory lies there belongs to a process that died."""
    unfinished = folder.parent / f".tmp_{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        source = make(unfinished)
        files = {str(p.relative_to(unfinished)): p.stat().st_size for p in sorted(unfinished.rglob("*")) if p.is_file()}
        (unfinished / SOURCE_FILE).write_text(json.dumps({**source, "files": files}, indent=2) + "\n", encoding="utf-8")
        for path in unfinished.rglob("*"):
            sync(path)
        sync(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
