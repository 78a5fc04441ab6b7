"""Telling a failed disk from other failures, and saying what to do about it.

torch and safetensors report a full disk as their own error types, so the text has to be read as well.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmrl.errors import RunFailedError

DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE})
DISK_WORDS = re.compile(
    r"no space left|os error (?:28|27|5|30|122)\b|disk quota|file too large|input/output error|read-only file system"
    r"|PytorchStreamWriter failed|inline_container|unexpected pos",
    re.IGNORECASE,
)


def is_disk_failure(error: BaseException) -> bool:
    """Whether the disk is the cause: full, over quota, read-only, gone."""
    return any(
        (isinstance(link, OSError) and link.errno in DISK_ERRNOS) or DISK_WORDS.search(str(link)) is not None
        for link in _chain(error)
    )


def as_disk_failure(
    error: BaseException, root: Path, what: str, intact: Path | None, written: int | None = None
) -> RunFailedError | None:
    """The error for a person when the disk failed while `what` was written below `root`, else None.

    `intact`: the newest whole checkpoint; `written`: where `what` is a checkpoint, the bytes that got onto the disk.
    """
    if not is_disk_failure(error) and not isinstance(error, OSError):
        return None
    device = _existing(root)
    facts = f"The disk that holds {root} (mounted at {_mount(device)}) has {size(shutil.disk_usage(device).free)} free"
    if written is not None and intact is not None:
        facts += f"; a checkpoint needs about {size(sum(f.stat().st_size for f in intact.rglob('*') if f.is_file()))}"
    elif written is not None:
        facts += f"; a checkpoint needs more than the {size(written)} written before it failed"
    kept = f"{intact} is whole" if intact is not None else "There was no earlier checkpoint"
    remedy = "Free space, or lower save_total_limit," if is_disk_failure(error) else "Mend that,"
    return RunFailedError(
        f"{what} could not be written: {_reason(error)}. {facts}. {kept}. {remedy} and give the same command with "
        "--resume_from_checkpoint latest"
    )


def size(count: int) -> str:
    """Bytes for a person."""
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def _reason(error: BaseException) -> str:
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in DISK_ERRNOS:
            return os.strerror(link.errno)
    return " ".join(str(error).split())[:200] or type(error).__name__


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _mount(path: Path) -> Path:
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path
