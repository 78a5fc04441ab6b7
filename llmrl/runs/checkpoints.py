"""Checkpoints that are whole or not there, whatever moment the process or the disk chooses to fail.

Invariants: a checkpoint is written under another name, every file synced, `manifest.json` (with every file's size)
last, then renamed to `checkpoints/step_N`; older ones go only after that. `latest` believes nothing that its manifest
does not vouch for. Names that begin with `.tmp_` are leftovers: the next `begin` removes them.

One process calls `publish`. With several, rank 0 calls `begin`, all write below the path it gives (the name is the same
on all: `pending`), then rank 0 calls `commit`, with barriers between; each rank writes inside `guarded`.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmrl.errors import RefusedError
from llmrl.files import read_json, sync, write_json
from llmrl.runs.disk import as_disk_failure

MANIFEST = "manifest.json"
STEP = re.compile(r"step_(\d+)$")
REPLACED = re.compile(r"\.old_step_(\d+)$")


def publish(
    root: Path, step: int, write: Callable[[Path], None], manifest: dict[str, Any], keep: int | None = None
) -> Path:
    """Writes `root/checkpoints/step_N` in one process and returns it.

    `write` fills the directory it is given; `manifest` is stored with the file list and step added; `keep` is how many
    checkpoints stay (None: all). Raises RunFailedError when the disk fails, with the previous checkpoint intact.
    """
    pending_path = begin(root, step)
    with guarded(root, step):
        write(pending_path)
    return commit(root, step, manifest, keep)


def pending(root: Path, step: int) -> Path:
    """Where the files of checkpoint N are written before `commit`; the same on every rank."""
    return root / "checkpoints" / f".tmp_step_{step}"


def begin(root: Path, step: int) -> Path:
    """Rank 0: removes what a killed run left half-written and makes the directory that the files go to."""
    path = pending(root, step)
    with guarded(root, step):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(".tmp_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        path.mkdir()
        sync(root)
    return path


@contextlib.contextmanager
def guarded(root: Path, step: int) -> Iterator[None]:
    """Around any writing below `pending`: a failure removes the half-written checkpoint.

    A failure of the disk (full, quota, gone, read-only; also as torch and safetensors report it) is raised as
    RunFailedError with what is free, what is needed and which checkpoint is intact; any other is raised as it is.
    """
    try:
        yield
    except Exception as error:
        path = pending(root, step)
        written = sum(file.stat().st_size for file in _files(path))
        shutil.rmtree(path, ignore_errors=True)
        failure = as_disk_failure(error, root, f"checkpoint step_{step}", latest(root), written)
        if failure is None:
            raise
        raise failure from error


def commit(root: Path, step: int, manifest: dict[str, Any], keep: int | None = None) -> Path:
    """Rank 0, when every rank has written: makes checkpoint N durable, gives it its name, then prunes older ones."""
    path, final = pending(root, step), root / "checkpoints" / f"step_{step}"
    with guarded(root, step):
        files = {file.relative_to(path).as_posix(): file.stat().st_size for file in _files(path)}
        _sync_tree(path)
        write_json(path / MANIFEST, {**manifest, "step": step, "files": files})
        if final.exists():
            replaced = final.with_name(f".old_step_{step}")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        path.rename(final)
        sync(final.parent)
    _prune(root, step, keep)
    return final


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint of a run directory, or None."""
    whole = _whole(root)
    return whole[-1][2] if whole else None


def damaged(root: Path) -> list[tuple[Path, str]]:
    """Checkpoints newer than the newest whole one, and what is wrong with each: no kill leaves such behind."""
    whole = _whole(root)
    newest = whole[-1][0] if whole else -1
    folder = root / "checkpoints"
    newer = [
        path
        for path in (folder.iterdir() if folder.is_dir() else [])
        if (match := STEP.fullmatch(path.name)) and int(match[1]) > newest
    ]
    return [(path, problem) for path in sorted(newer) if (problem := _inspect(path)[1])]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises RefusedError saying what is wrong with one that is not whole."""
    manifest, problem = _inspect(path)
    if problem:
        raise RefusedError(f"{path} is not a whole checkpoint: {problem}. Name another, or `latest`")
    return manifest


def set_aside(root: Path, after: int) -> list[Path]:
    """Renames checkpoints newer than step `after` to `step_N.superseded`: a run that goes on from an earlier one must
    not later take them for its own. Returns the new names."""
    moved = []
    for step, _, path in _whole(root):
        if step > after:
            target = path.with_name(f"step_{step}.superseded")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def _whole(root: Path) -> list[tuple[int, bool, Path]]:
    """(step, has its proper name, path) of the whole checkpoints, oldest first.

    The one that `commit` replaces keeps an odd name for an instant; killed just then, it is still a checkpoint.
    """
    folder = root / "checkpoints"
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = STEP.fullmatch(path.name) or REPLACED.fullmatch(path.name)
        if match and not _inspect(path)[1]:
            found.append((int(match[1]), path.name.startswith("step_"), path))
    return sorted(found)


def _inspect(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest, and what is wrong with the checkpoint ('' = whole)."""
    if not path.is_dir():
        return {}, "there is no such folder"
    if (path / "checkpoints").is_dir():
        return {}, f"this is a run directory, its checkpoints are in {path / 'checkpoints'}"
    manifest = read_json(path / MANIFEST, None)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "step" not in manifest:
        return {}, f"{MANIFEST} is missing or unreadable"
    for name, size in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return {}, f"{name} is missing"
        if found != size:
            return {}, f"{name} has {found} bytes, the manifest says {size}"
    return manifest, ""


def _prune(root: Path, step: int, keep: int | None) -> None:
    """Removes replaced and surplus checkpoints. A failure here loses nothing but disk, so it stops nothing."""
    whole = _whole(root)
    surplus = [path for _, proper, path in whole if not proper]
    proper = [path for number, is_proper, path in whole if is_proper and number <= step]
    surplus += proper[:-keep] if keep else []
    for path in surplus:
        with contextlib.suppress(OSError):
            # Renamed first: a kill halfway through the removal must not leave something that looks like a checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".tmp_removed_{path.name.lstrip('.')}")), ignore_errors=True)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []


def _sync_tree(path: Path) -> None:
    for file in _files(path):
        sync(file)
    for folder, _, _ in os.walk(path, topdown=False):
        sync(Path(folder))
