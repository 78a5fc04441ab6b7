"""The run directory: who gets it, what is kept, and what a finished run leaves behind."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrl.config import DataKeys, ModelKeys, OptimizationKeys, RunKeys
from llmrl.errors import RefusedError, RunInterruptedError
from llmrl.runs import Run, checkpoints


class Toy(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
    """Toy."""


def toy(directory: Path, **keys: Any) -> Toy:
    return Toy(
        **{"model_name_or_path": "m", "dataset_name": "d", "learning_rate": 1e-4, **keys}, output_dir=str(directory)
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    def forbid(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=forbid) for line in text.splitlines()]


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


def trained(directory: Path, steps: int = 4, save: tuple[int, ...] = (2, 4), **keys: Any) -> None:
    """A run of so many steps with checkpoints."""
    with Run.open(toy(directory, save_total_limit=None, **keys)) as run:
        run.evaluation(0, "heldout", {"accuracy": 0.25})
        for step in range(1, steps + 1):
            run.log(step, {"loss": 1 / step, "num_tokens": 10 * step})
            if step in save:
                checkpoints.publish(directory, step, lambda p: (p / "w").write_bytes(b"w"), run.manifest("data"), None)
        run.evaluation(steps, "heldout", {"accuracy": 0.75})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


# ---- what a run leaves


def test_a_whole_run_leaves_the_files_of_the_contract(out: Path):
    trained(out)
    summary = read(out, "summary.json")
    assert summary["status"] == "completed"
    assert summary["steps"] == 4
    assert summary["num_tokens"] == 40
    assert summary["seconds"] > 0
    assert summary["eval_before"] == {"heldout": {"accuracy": 0.25}}
    assert summary["eval_after"] == {"heldout": {"accuracy": 0.75}}
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert read(out, "evals.json")[0] == {"step": 0, "name": "heldout", "metrics": {"accuracy": 0.25}}
    assert yaml.safe_load((out / "config.yaml").read_text())["learning_rate"] == 1e-4
    assert read(out, "environment.json")["packages"]["torch"]
    assert (out / "report.html").read_text().startswith("<!doctype html>")


def test_a_line_can_be_read_as_soon_as_it_is_logged(out: Path):
    run = Run.open(toy(out))
    run.log(1, {"loss": 0.5})
    assert lines(out) == [{"step": 1, "loss": 0.5}]
    run.close("completed")


def test_nan_and_infinity_are_null_and_said_once(out: Path, capsys: pytest.CaptureFixture[str]):
    with Run.open(toy(out)) as run:
        for step in (1, 2):
            run.log(step, {"loss": math.nan, "grad_norm": math.inf, "num_tokens": 3})
        run.evaluation(2, "heldout", {"accuracy": math.nan})
    assert lines(out)[0] == {"step": 1, "loss": None, "grad_norm": None, "num_tokens": 3}
    assert read(out, "evals.json")[0]["metrics"] == {"accuracy": None}
    assert capsys.readouterr().out.count("loss is nan at step 1") == 1
    assert (out / "notes.log").read_text().count("loss is nan") == 1


def test_arrays_of_one_number_are_numbers(out: Path):
    numpy = pytest.importorskip("numpy")
    with Run.open(toy(out)) as run:
        run.log(1, {"loss": numpy.float32(0.5), "num_tokens": numpy.int64(7), "x": numpy.array([2.0])})
    assert lines(out) == [{"step": 1, "loss": 0.5, "num_tokens": 7, "x": 2.0}]


def test_the_same_evaluation_again_replaces_the_first(out: Path):
    with Run.open(toy(out)) as run:
        run.evaluation(0, "heldout", {"accuracy": 0.1})
        run.evaluation(0, "heldout", {"accuracy": 0.2})
        run.evaluation(0, "task", {"accuracy": 0.3})
    assert [(e["name"], e["metrics"]["accuracy"]) for e in read(out, "evals.json")] == [("heldout", 0.2), ("task", 0.3)]


def test_a_note_is_said_once_and_kept(out: Path, capsys: pytest.CaptureFixture[str]):
    with Run.open(toy(out)) as run:
        run.note("3 rows were dropped")
        run.note("3 rows were dropped")
    assert capsys.readouterr().out.count("3 rows were dropped") == 1
    assert (out / "notes.log").read_text().endswith(" 3 rows were dropped\n")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RunInterruptedError("SIGTERM after step 3"), "interrupted", "SIGTERM after step 3"),
        (ValueError("boom"), "failed", "ValueError: boom"),
        (KeyboardInterrupt(), "interrupted", "interrupted by the keyboard"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_context_that_ends_badly_says_so_in_the_summary(out: Path, error: BaseException, status: str, reason: str):
    with pytest.raises(type(error)), Run.open(toy(out)):
        raise error
    summary = read(out, "summary.json")
    assert (summary["status"], summary["reason"]) == (status, reason)


def test_the_first_end_is_the_one_that_counts(out: Path):
    run = Run.open(toy(out))
    run.close("failed", "first")
    run.close("completed")
    assert read(out, "summary.json")["reason"] == "first"


# ---- whose directory it is


def test_a_directory_with_a_run_is_refused_and_the_remedy_named(out: Path):
    trained(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RefusedError, match=r"already holds a run .*--resume_from_checkpoint latest"):
        Run.open(toy(out))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "samples.json"])
def test_any_one_file_of_ours_makes_it_a_run(out: Path, name: str):
    out.mkdir(parents=True)
    (out / name).write_text("precious")
    with pytest.raises(RefusedError, match=name):
        Run.open(toy(out))
    assert (out / name).read_text() == "precious"


def test_other_files_do_not_matter_and_are_left_alone(out: Path):
    out.mkdir(parents=True)
    (out / "slurm-17.out").write_text("log")
    trained(out)
    assert (out / "slurm-17.out").read_text() == "log"


def test_a_file_or_an_impossible_place_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RefusedError, match="is a file; name a directory"):
        Run.open(toy(tmp_path / "file"))
    with pytest.raises(RefusedError, match="cannot be used"):
        Run.open(toy(tmp_path / "file" / "below"))


def test_a_refusal_removes_what_the_run_made_and_nothing_else(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    run = Run.open(toy(tmp_path / "runs" / "a" / "b"))
    run.evaluation(0, "heldout", {"loss": 1.0})
    checkpoints.begin(run.directory, 1)
    with pytest.raises(RefusedError), run:
        raise RefusedError("the data is bad")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_refusal_leaves_what_others_put_there(out: Path):
    out.mkdir(parents=True)
    for name in ("notes.log", "slurm.out"):
        (out / name).write_text("mine\n")
    with pytest.raises(RefusedError), Run.open(toy(out)):
        raise RefusedError("the data is bad")
    assert sorted(path.name for path in out.iterdir()) == ["notes.log", "slurm.out"]
    assert (out / "notes.log").read_text().startswith("mine\n")


def test_a_refusal_after_a_checkpoint_leaves_the_run(out: Path):
    run = Run.open(toy(out))
    checkpoints.publish(out, 1, lambda path: None, run.manifest(), None)
    with pytest.raises(RefusedError), run:
        raise RefusedError("too late to be a refusal")
    assert checkpoints.latest(out) is not None


# ---- going on


def test_going_on_cuts_metrics_and_evaluations_back_to_the_checkpoint(out: Path):
    trained(out, steps=5, save=(2, 4))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with Run.open(toy(out, resume_from_checkpoint="latest")) as run:
        assert run.checkpoint == out / "checkpoints" / "step_4"
        assert run.start_step == 4
        run.log(5, {"loss": 9.0, "num_tokens": 50})
    assert [(line["step"], line["loss"]) for line in lines(out)][-2:] == [(4, 0.25), (5, 9.0)]
    assert [item["step"] for item in read(out, "evals.json")] == [0]
    assert read(out, "summary.json")["steps"] == 5


def test_a_damaged_checkpoint_is_passed_over_aloud_and_refused_where_it_is_the_only_one(out: Path, capsys):
    trained(out, steps=5, save=(2, 4))
    checkpoints_of = out / "checkpoints"
    next(f for f in (checkpoints_of / "step_4").rglob("*") if f.is_file() and f.name != "manifest.json").unlink()
    assert Run.open(toy(out, resume_from_checkpoint="latest")).start_step == 2
    assert "step_4 is damaged" in capsys.readouterr().out
    (checkpoints_of / "step_2" / "manifest.json").write_text("{")
    with pytest.raises(RefusedError, match=r"no checkpoint .* is whole.*step_2"):
        Run.open(toy(out, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("text", ["hi\n", "- a\n", "{"])
def test_somebody_elses_config_yaml_is_not_overwritten(out: Path, text: str):
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(text)
    with pytest.raises(RefusedError, match="no run has written"):
        Run.open(toy(out, resume_from_checkpoint="latest"))
    assert (out / "config.yaml").read_text() == text


def test_nothing_changes_before_it_really_goes_on(out: Path):
    trained(out, steps=5, save=(2,))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run = Run.open(toy(out, resume_from_checkpoint="latest", save_steps=1))
    with pytest.raises(RefusedError, match=r"dataset has changed since .*step_2"):
        run.verify_dataset("other data")
    run.withdraw()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_seconds_of_a_run_add_up(out: Path):
    with Run.open(toy(out)) as run:
        manifest = {**run.manifest("data"), "seconds": 100.0}
        checkpoints.publish(out, 1, lambda path: None, manifest, None)
    with Run.open(toy(out, resume_from_checkpoint="latest")) as run:
        run.log(2, {"loss": 1.0})
    assert read(out, "summary.json")["seconds"] > 100


def test_the_same_data_is_let_through_and_other_data_is_not(out: Path):
    trained(out)
    run = Run.open(toy(out, resume_from_checkpoint="latest"))
    run.verify_dataset("data")
    with pytest.raises(RefusedError, match="dataset has changed"):
        run.verify_dataset("data2")


def test_another_runs_checkpoint_names_the_keys_that_differ(out: Path):
    trained(out)
    with pytest.raises(RefusedError) as caught:
        Run.open(toy(out, resume_from_checkpoint="latest", learning_rate=2e-4, seed=7, save_steps=9))
    message = str(caught.value)
    assert "learning_rate: 0.0001 -> 0.0002" in message
    assert "seed: 42 -> 7" in message
    assert "save_steps" not in message


def test_another_number_of_processes_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch):
    trained(out)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RefusedError, match="written by 1 processes and 4 run now"):
        Run.open(toy(out, resume_from_checkpoint="latest"))


def test_latest_starts_afresh_where_there_is_none(out: Path):
    with Run.open(toy(out, resume_from_checkpoint="latest")) as run:
        assert (run.checkpoint, run.start_step) == (None, 0)
        run.log(1, {"loss": 1.0})
    assert not checkpoints.latest(out)
    with Run.open(toy(out, resume_from_checkpoint="latest")) as run:
        run.log(1, {"loss": 2.0})
    assert lines(out) == [{"step": 1, "loss": 2.0}]


def test_latest_does_not_start_afresh_over_another_run(out: Path):
    trained(out, save=())
    with pytest.raises(RefusedError, match=r"(?s)no checkpoint to resume, but another run.*seed: 42 -> 1"):
        Run.open(toy(out, resume_from_checkpoint="latest", seed=1))
    assert len(lines(out)) == 4


def test_an_earlier_checkpoint_sets_the_newer_ones_aside(out: Path):
    trained(out, steps=5, save=(2, 4))
    with Run.open(toy(out, resume_from_checkpoint=str(out / "checkpoints" / "step_2"))) as run:
        assert run.start_step == 2
        run.log(3, {"loss": 7.0})
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    assert (out / "checkpoints" / "step_4.superseded").is_dir()
    assert checkpoints.latest(out) == out / "checkpoints" / "step_2"


def test_a_checkpoint_of_elsewhere_goes_on_in_a_free_directory_only(out: Path, tmp_path: Path):
    trained(out)
    source = str(out / "checkpoints" / "step_4")
    with Run.open(toy(tmp_path / "new", resume_from_checkpoint=source)) as run:
        assert run.start_step == 4
        run.log(5, {"loss": 1.0})
    assert (out / "checkpoints" / "step_4").is_dir()
    assert [line["step"] for line in lines(tmp_path / "new")] == [5]
    trained(tmp_path / "occupied")
    with pytest.raises(RefusedError, match="is not one of its checkpoints"):
        Run.open(toy(tmp_path / "occupied", resume_from_checkpoint=source))


def test_a_checkpoint_that_is_not_there_is_named(out: Path):
    with pytest.raises(RefusedError, match="step_9 is not a whole checkpoint: there is no such folder"):
        Run.open(toy(out, resume_from_checkpoint=str(out / "checkpoints" / "step_9")))
    assert not out.exists()


# ---- several processes


def test_other_ranks_write_and_say_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Run.open(toy(out, report_to="tensorboard")) as run:
        assert not run.is_main
        run.note("hello")
        run.evaluation(0, "heldout", {"loss": 1.0})
        with run.progress(3) as progress:
            progress.step(1, 0.5, 10)
            run.log(1, {"loss": 1.0})
    assert not out.exists()
    assert capsys.readouterr().out == ""


def test_other_ranks_do_not_take_what_rank_0_just_made_for_another_run(out: Path, monkeypatch: pytest.MonkeyPatch):
    Run.open(toy(out))
    monkeypatch.setenv("RANK", "1")
    assert Run.open(toy(out)).checkpoint is None
