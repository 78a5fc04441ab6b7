"""`final/`: whole or not there, and uploaded where that was asked for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmrl.config import DataKeys, ModelKeys, OptimizationKeys, RunKeys
from llmrl.runs import Run
from llmrl.runs.final import publish_model


class Toy(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
    """Toy."""


def opened(directory: Path, **keys: Any) -> Run:
    needed = {"model_name_or_path": "m", "dataset_name": "d", "learning_rate": 1e-4, "output_dir": str(directory)}
    return Run.open(Toy.model_validate(needed | keys))


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text("new")


def nobody() -> None:
    """One process waits for no other."""


def test_an_earlier_model_is_replaced_as_a_whole(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    for name in ("final", ".tmp_final"):
        (run.directory / name).mkdir()
        (run.directory / name / "leftover").write_text("old")
    publish_model(run, write, nobody)
    assert [path.name for path in (run.directory / "final").iterdir()] == ["weights"]
    assert not (run.directory / ".tmp_final").exists()


def test_a_model_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    publish_model(run, write, nobody)

    def fails(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish_model(run, fails, nobody)
    assert (run.directory / "final" / "weights").read_text() == "new"


@pytest.mark.parametrize(("keys", "repository"), [({}, "run"), ({"hub_model_id": "me/tuned"}, "me/tuned")])
def test_the_whole_model_is_uploaded(
    tmp_path: Path, keys: dict[str, str], repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no hub to upload to, so its client is told to remember."""
    uploads: list[tuple[str, list[str]]] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> SimpleNamespace:
            assert exist_ok
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str) -> None:
            uploads.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    publish_model(opened(tmp_path / "run", push_to_hub=True, **keys), write, nobody)
    assert uploads == [(repository, ["weights"])]
