"""Trackers: refused early when missing, fed when there, dropped when they fail."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl.config import DataKeys, ModelKeys, OptimizationKeys, RunKeys
from llmrl.config.keys import TRACKERS
from llmrl.errors import RefusedError
from llmrl.runs import Run, trackers

RECIPE = Path(__file__).with_name("toy_recipe.py")


class Toy(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
    """Toy."""


def toy(directory: Path, report_to: str) -> Toy:
    keys = {"model_name_or_path": "m", "dataset_name": "d", "learning_rate": 1e-4, "report_to": report_to}
    return Toy.model_validate({**keys, "output_dir": str(directory)})


def run_toy(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE), "--output_dir", str(out), "--max_steps", "3", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_a_missing_package_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "_installed", lambda module: module != "comet_ml")
    with pytest.raises(RefusedError, match=r"report_to names comet_ml.*pip install comet-ml"):
        Run.open(toy(tmp_path / "out", "comet_ml"))
    assert not (tmp_path / "out").exists()


def test_all_means_those_that_are_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "_installed", lambda module: module in ("wandb", "trackio"))
    assert trackers.available(["all"]) == ["trackio", "wandb"]


def test_every_name_is_a_class_of_accelerate():
    import accelerate.tracking

    assert set(trackers.CLASSES) == set(TRACKERS)
    for name, (class_name, _, _) in trackers.CLASSES.items():
        assert getattr(accelerate.tracking, class_name).name == name


class Fake:
    """A tracker that notes what it is told, and fails when asked to."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.seen: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.seen.append((step, values))
        if self.fails == "log":
            raise ConnectionError("the service is gone")

    def finish(self) -> None:
        self.finished = True


def with_fakes(monkeypatch: pytest.MonkeyPatch, **fakes: Fake) -> None:
    monkeypatch.setattr(trackers, "_installed", lambda module: True)
    monkeypatch.setattr(trackers.Trackers, "_make", lambda self, name: fakes[name])


def test_metrics_and_evaluations_reach_the_tracker_without_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = Fake()
    with_fakes(monkeypatch, wandb=fake)
    with Run.open(toy(tmp_path / "out", "wandb")) as run:
        run.evaluation(0, "heldout", {"accuracy": 0.5})
        run.log(1, {"loss": 0.25, "grad_norm": float("nan")})
    assert fake.seen == [(0, {"eval/heldout/accuracy": 0.5}), (1, {"loss": 0.25})]
    assert fake.finished


def test_a_tracker_that_fails_later_is_dropped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bad, good = Fake(fails="log"), Fake()
    with_fakes(monkeypatch, wandb=bad, mlflow=good)
    with Run.open(toy(tmp_path / "out", "wandb,mlflow")) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0})
    assert len(bad.seen) == 1
    assert len(good.seen) == 3
    assert "the tracker wandb failed and is left out from here on: the service is gone" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_gets_the_curves_and_the_configuration(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    done = run_toy(out, "--report_to", "tensorboard", "--run_name", "mine")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(out / "tensorboard" / "mine"))
    events.Reload()
    assert [(event.step, round(event.value, 4)) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3333),
    ]
    assert [event.step for event in events.Scalars("eval/heldout/loss")] == [0, 3]
    assert "learning_rate: 0.5" in next((out / "tensorboard" / "mine").glob("*/hparams.yml")).read_text()


@pytest.mark.slow
def test_trackio_gets_them_too(tmp_path: Path):
    pytest.importorskip("trackio")
    done = run_toy(
        tmp_path / "out", "--report_to", "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "trackio" / "llmrl.db") as database:
        rows = database.execute("select step, run_name from metrics order by step").fetchall()
    assert rows == [(0, "out"), (1, "out"), (2, "out"), (3, "out"), (3, "out")]


def test_a_tracker_that_cannot_start_is_refused_and_leaves_nothing(tmp_path: Path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    out.mkdir()
    (out / "tensorboard").write_text("a file where a folder should be")
    done = run_toy(out, "--report_to", "tensorboard")
    assert done.returncode == 2
    assert "the tracker tensorboard could not be started" in done.stderr
    assert "take it out of report_to" in done.stderr
    assert [path.name for path in out.iterdir()] == ["tensorboard"]


def test_trackers_start_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[str] = []
    monkeypatch.setattr(trackers, "_installed", lambda module: True)
    monkeypatch.setattr(trackers.Trackers, "_make", lambda self, name: started.append(name) or Fake())
    with Run.open(toy(tmp_path / "out", "wandb")) as run:
        assert started == []
        with run.progress(3):
            assert started == ["wandb"]
