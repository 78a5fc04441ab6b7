"""When a run saves and evaluates at its end, and what a resumed one makes good, with a learner that learns nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import TrainerState

from llmrl.errors import RunFailedError
from llmrl.trainers.session import STATE_FILE, Session

STEPS = 4


class Learner:
    """Writes a file where weights would be."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.causal_lm = self.optimizer = self.scheduler = None

    def save(self, folder: Path) -> None:
        (folder / "weights").write_text("w")

    def load(self, folder: Path) -> None:
        assert (folder / "weights").exists()

    def export(self, folder: Path) -> None:
        folder.mkdir()
        self.save(folder)


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


class Progress:
    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, *facts: object) -> None:
        pass


class Run:
    """Keeps a diary of what it is asked to do."""

    def __init__(self, directory: Path, checkpoint: Path | None = None, eval_steps: int = 0) -> None:
        self.metrics = SimpleNamespace(evaluations=[{"step": 0}])
        self.config = SimpleNamespace(
            save_steps=0, eval_steps=eval_steps, logging_steps=1, save_total_limit=None, push_to_hub=False
        )
        self.directory, self.checkpoint, self.is_main, self.interrupted = directory, checkpoint, True, False
        self.start_step = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
        self.diary: list[str] = []

    def progress(self, total: int) -> Progress:
        return Progress()

    def manifest(self, fingerprint: str) -> dict[str, Any]:
        return {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def evaluation(self, step: int, name: str, metrics: dict[str, float]) -> None:
        saved = sorted(folder.name for folder in (self.directory / "checkpoints").glob("step_*"))
        self.diary.append(f"evaluated at {step} beside {saved}")


def train(run: Run) -> None:
    evaluate = lambda: {"task": {"accuracy": 0.5}}  # noqa: E731
    session = Session(run, Learner(), Tokenizer(), STEPS, "data", evaluate)  # type: ignore[arg-type]
    for _ in session.steps():
        session.record({"loss": 1.0, "num_tokens": 1.0})
    session.finish()


def test_the_last_step_is_saved_before_the_last_evaluation(tmp_path: Path) -> None:
    run = Run(tmp_path)
    train(run)
    assert run.diary == ["evaluated at 0 beside []", "evaluated at 4 beside ['step_4']"]
    assert (tmp_path / "final" / "weights").exists()


@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_run_resumed_from_any_checkpoint_makes_its_last_evaluation(tmp_path: Path, killed_at: int) -> None:
    """Also from the last step's, where the kill came in the middle of that evaluation."""
    checkpoint = tmp_path / "checkpoints" / f"step_{killed_at}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("w")
    TrainerState(max_steps=STEPS, global_step=killed_at).save_to_json(str(checkpoint / STATE_FILE))
    run = Run(tmp_path, checkpoint)
    train(run)
    assert [entry.split(" beside")[0] for entry in run.diary] == ["evaluated at 4"]
    assert (tmp_path / "final" / "weights").exists()


@pytest.mark.parametrize(("recorded", "again"), [([0], [2, 4]), ([0, 2], [4])])
def test_an_evaluation_that_was_given_up_is_made_before_the_run_goes_on(
    tmp_path: Path, recorded: list[int], again: list[int]
) -> None:
    """The checkpoint of step 2 was left because its evaluation was interrupted, or was an ordinary one."""
    checkpoint = tmp_path / "checkpoints" / "step_2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("w")
    TrainerState(max_steps=STEPS, global_step=2).save_to_json(str(checkpoint / STATE_FILE))
    run = Run(tmp_path, checkpoint, eval_steps=2)
    run.metrics.evaluations = [{"step": step} for step in recorded]
    train(run)
    assert [entry.split(" beside")[0] for entry in run.diary] == [f"evaluated at {step}" for step in again]


def test_a_checkpoint_that_cannot_be_loaded_is_named_with_the_way_out(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: Learner, folder: Path) -> None:
        raise RuntimeError("invalid header")

    monkeypatch.setattr(Learner, "load", broken)
    with pytest.raises(RunFailedError, match=r"step_2 cannot be loaded.*invalid header.*--resume_from_checkpoint PATH"):
        train(Run(tmp_path, tmp_path / "checkpoints" / "step_2"))
