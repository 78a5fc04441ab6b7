"""Checkpoints: whole or not there, pruned last, and read with suspicion."""

import json
import os
from pathlib import Path

import pytest

from llmrl.errors import RefusedError
from llmrl.runs import checkpoints

KEEP_ALL = None


def publish(root: Path, step: int, size: int = 100, keep: int | None = KEEP_ALL) -> Path:
    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.bin").write_bytes(bytes([step % 256]) * size)
        (folder / "state.json").write_text("{}")

    return checkpoints.publish(root, step, write, {"config_fingerprint": "abc"}, keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_a_checkpoint_has_its_files_and_a_manifest(tmp_path: Path):
    path = publish(tmp_path, 4)
    assert path == tmp_path / "checkpoints" / "step_4"
    assert checkpoints.read_manifest(path) == {
        "config_fingerprint": "abc", "step": 4, "files": {"deep/weights.bin": 100, "state.json": 2},
    }  # fmt: skip
    assert checkpoints.latest(tmp_path) == path


def test_the_newest_by_number_is_the_latest_and_not_by_name(tmp_path: Path):
    for step in (9, 10, 100):
        publish(tmp_path, step)
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoints" / "step_100"


def test_no_directory_or_an_empty_one_has_none(tmp_path: Path):
    assert checkpoints.latest(tmp_path / "nowhere") is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoints.latest(tmp_path) is None


def test_older_ones_are_pruned_and_only_then(tmp_path: Path):
    for step in (2, 4, 6):
        publish(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_4", "step_6"]


def test_all_are_kept_without_a_limit(tmp_path: Path):
    for step in (1, 2, 3, 4):
        publish(tmp_path, step)
    assert names(tmp_path) == ["step_1", "step_2", "step_3", "step_4"]


def test_pruning_leaves_what_is_not_a_checkpoint(tmp_path: Path):
    publish(tmp_path, 1)
    (tmp_path / "checkpoints" / "mine").mkdir()
    (tmp_path / "checkpoints" / "step_x").mkdir()
    publish(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["mine", "step_2", "step_x"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
        (
            lambda path: (path / "manifest.json").write_text('{"step": 4, "fil'),
            "manifest.json is missing or unreadable",
        ),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is missing or unreadable"),
        (lambda path: (path / "deep" / "weights.bin").write_bytes(b"short"), "has 5 bytes, the manifest says 100"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    ],
    ids=["no manifest", "torn manifest", "foreign manifest", "short file", "missing file"],
)
def test_a_damaged_one_is_passed_over_and_named_when_asked_for(tmp_path: Path, damage, says: str):
    whole, damaged = publish(tmp_path, 2), publish(tmp_path, 4)
    damage(damaged)
    assert checkpoints.latest(tmp_path) == whole
    with pytest.raises(RefusedError, match=f"step_4 is not a whole checkpoint: .*{says}"):
        checkpoints.read_manifest(damaged)


def test_a_run_directory_given_for_a_checkpoint_gets_a_hint(tmp_path: Path):
    publish(tmp_path, 2)
    with pytest.raises(RefusedError, match="run directory, its checkpoints are in"):
        checkpoints.read_manifest(tmp_path)
    with pytest.raises(RefusedError, match="no such folder"):
        checkpoints.read_manifest(tmp_path / "nowhere")


def test_the_same_step_again_replaces_the_first(tmp_path: Path):
    publish(tmp_path, 4, size=100)
    publish(tmp_path, 4, size=7)
    assert names(tmp_path) == ["step_4"]
    assert (tmp_path / "checkpoints" / "step_4" / "deep" / "weights.bin").stat().st_size == 7


def test_killed_between_the_two_renames_of_a_replacement_the_old_one_still_counts(tmp_path: Path):
    path = publish(tmp_path, 4)
    path.rename(path.with_name(".old_step_4"))
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert checkpoints.read_manifest(found)["step"] == 4
    publish(tmp_path, 6)
    assert names(tmp_path) == ["step_6"]


def test_a_proper_name_beats_a_replaced_one_of_the_same_step(tmp_path: Path):
    publish(tmp_path, 4).rename(tmp_path / "checkpoints" / ".old_step_4")
    newer = publish(tmp_path, 4)
    publish(tmp_path / "other", 4).rename(tmp_path / "checkpoints" / ".old_step_4")
    assert checkpoints.latest(tmp_path) == newer


def test_leftovers_of_a_killed_run_are_no_checkpoints_and_go_with_the_next_begin(tmp_path: Path):
    whole = publish(tmp_path, 2)
    leftover = checkpoints.begin(tmp_path, 4)
    (leftover / "weights.bin").write_bytes(b"half")
    assert checkpoints.latest(tmp_path) == whole
    checkpoints.begin(tmp_path, 6)
    assert names(tmp_path) == [".tmp_step_6", "step_2"]


def test_a_failure_that_is_not_the_disks_is_raised_as_it_is_and_leaves_nothing(tmp_path: Path):
    whole = publish(tmp_path, 2)

    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        checkpoints.publish(tmp_path, 4, write, {}, 2)
    assert names(tmp_path) == ["step_2"]
    assert checkpoints.latest(tmp_path) == whole


def test_the_pieces_for_several_processes_make_the_same_checkpoint(tmp_path: Path):
    folder = checkpoints.begin(tmp_path, 3)
    for rank in range(2):
        with checkpoints.guarded(tmp_path, 3):
            assert checkpoints.pending(tmp_path, 3) == folder
            (folder / f"optimizer_rank{rank}.bin").write_bytes(b"o" * (rank + 1))
    assert checkpoints.latest(tmp_path) is None
    path = checkpoints.commit(tmp_path, 3, {"world_size": 2}, 1)
    assert checkpoints.read_manifest(path)["files"] == {"optimizer_rank0.bin": 1, "optimizer_rank1.bin": 2}


def test_newer_ones_are_set_aside_and_not_deleted(tmp_path: Path):
    for step in (2, 4, 6):
        publish(tmp_path, step)
    moved = checkpoints.set_aside(tmp_path, after=2)
    assert [path.name for path in moved] == ["step_4.superseded", "step_6.superseded"]
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoints" / "step_2"
    assert all(json.loads((path / "manifest.json").read_text()) for path in moved)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to name what is synced")
def test_every_file_is_on_the_disk_before_the_manifest_and_the_manifest_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a power cut needs, and no kill of a process can show: the order of syncs and renames."""
    publish(tmp_path, 2)
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name(path: str | Path) -> str:
        return str(path).replace(str(tmp_path / "checkpoints"), "").replace("/.tmp_step_4", "tmp").lstrip("/") or "."

    def recording_fsync(handle: int) -> None:
        events.append(f"sync {name(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def recording_rename(source: str, target: str) -> None:
        events.append(f"name {name(target)}")
        rename(source, target)

    def recording_replace(source: str, target: str) -> None:
        events.append(f"name {name(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    monkeypatch.setattr(os, "replace", recording_replace)
    publish(tmp_path, 4, keep=1)
    order = [next(i for i, event in enumerate(events) if event.startswith(start)) for start in (
        "sync tmp/deep/weights.bin", "sync tmp/deep", "sync tmp/.manifest.json.tmp", "name tmp/manifest.json",
        "name step_4", "sync .", "name .tmp_removed_step_2",
    )]  # fmt: skip
    assert order == sorted(order), events
    assert events.index("sync tmp/state.json") < events.index("name tmp/manifest.json")
    assert "sync tmp" in events[events.index("name tmp/manifest.json") : events.index("name step_4")]
