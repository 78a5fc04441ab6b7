"""Folders that are made once: whole or not there, one maker at a time, damage noticed."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from llmrl.models.cache import SOURCE_FILE, cache_root, is_whole, make_once


def fill(folder: Path) -> dict:
    (folder / "sub").mkdir()
    (folder / "weights").write_bytes(b"x" * 100)
    (folder / "sub" / "config").write_text("{}")
    return {"source": "a test"}


def ignore(text: str) -> None:
    pass


def test_made_once_then_only_read(tmp_path):
    calls = []

    def make(folder: Path) -> dict:
        calls.append(folder)
        return fill(folder)

    target = tmp_path / "models" / "m"
    assert make_once(target, make, ignore) == target
    assert make_once(target, make, ignore) == target
    assert len(calls) == 1
    assert json.loads((target / SOURCE_FILE).read_text())["source"] == "a test"
    assert [p.name for p in target.parent.iterdir() if not p.name.startswith(".")] == ["m"]


@pytest.mark.parametrize("harm", ["short", "missing", "no_source", "source_is_no_object"])
def test_a_damaged_folder_is_made_again(tmp_path, harm):
    target = make_once(tmp_path / "m", fill, ignore)
    if harm == "short":
        (target / "weights").write_bytes(b"x")
    elif harm == "missing":
        (target / "sub" / "config").unlink()
    elif harm == "no_source":
        (target / SOURCE_FILE).unlink()
    else:
        (target / SOURCE_FILE).write_text('{"files": 3}')
    assert not is_whole(target)
    make_once(target, fill, ignore)
    assert is_whole(target)
    assert (target / "weights").read_bytes() == b"x" * 100


def test_a_failure_leaves_nothing_and_the_next_try_works(tmp_path):
    def fail(folder: Path) -> dict:
        fill(folder)
        raise RuntimeError("the network went away")

    with pytest.raises(RuntimeError, match="network"):
        make_once(tmp_path / "m", fail, ignore)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert is_whole(make_once(tmp_path / "m", fill, ignore))


def make_slowly(target: Path, log: Path, seconds: float) -> None:
    def slow(folder: Path) -> dict:
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        source = fill(folder)
        time.sleep(seconds)
        return source

    def say(text: str) -> None:
        with log.open("a") as lines:
            lines.write("waits\n")

    make_once(target, slow, say)


def test_of_two_processes_one_makes_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    both = [context.Process(target=make_slowly, args=(tmp_path / "m", log, 1.0)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    lines = log.read_text().split()
    assert sum(line != "waits" for line in lines) == 1
    assert is_whole(tmp_path / "m")


def test_what_a_killed_maker_left_is_not_used(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=make_slowly, args=(tmp_path / "m", tmp_path / "log", 600.0))
    process.start()
    while not (tmp_path / ".tmp_m" / "weights").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "m").exists()
    (tmp_path / ".tmp_m" / "stale").write_text("from the dead process")
    make_once(tmp_path / "m", fill, ignore)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted([SOURCE_FILE, "sub", "weights"])


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMRL_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("LLMRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "llmrl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "llmrl"
