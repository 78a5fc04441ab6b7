"""The run directory, and the one object through which a training loop speaks to the outside.

Invariants: a directory belongs to one run (`claims`); nothing of an earlier run is changed before training really goes
on; what a refused command made is removed again, and nothing else; only rank 0 writes and speaks.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmrl.config.keys import RunKeys
from llmrl.config.resolved import fingerprint, result_keys, to_yaml
from llmrl.errors import RefusedError, RunInterruptedError
from llmrl.files import write_json, write_text
from llmrl.runs import checkpoints, ranks, trackers
from llmrl.runs.claims import OURS, checkpoint_to_resume, refuse_occupied, verify_checkpoint, verify_world_size
from llmrl.runs.console import Console
from llmrl.runs.environment import describe_environment
from llmrl.runs.metrics import Metrics
from llmrl.runs.progress import Progress
from llmrl.runs.summary import Status, before_and_after

BESIDE = ("notes.log", "error.log", "tensorboard", "aim", "weights")


class Run:
    """One training run: its directory, its metrics, its end. Made by `Run.open`; a context that closes itself."""

    directory: Path
    """Where everything of the run goes."""
    config: RunKeys
    is_main: bool
    """Whether this process writes and speaks (rank 0)."""
    interrupted: bool
    """A signal asked *this rank* to stop: finish the step, save, raise RunInterruptedError. Ranks must agree first."""
    training: bool
    """Steps are being trained: a signal waits for the end of a step instead of ending the run at once."""
    listens: bool
    """Whoever works now looks at `interrupted` itself: a signal does not end the run at once, either."""
    checkpoint: Path | None
    """The whole checkpoint to go on from; None: from the start."""
    start_step: int
    """Steps done before this process: the checkpoint's step, or 0."""
    digests: dict[str, str]
    """Of files in the directory that training goes on with, by name: those of `checkpoint`; every checkpoint keeps
    them."""
    kept_work: str | None
    """What an attempt that starts anew in this directory takes up as it is, in words; None: nothing."""

    def __init__(self, config: RunKeys, checkpoint: Path | None) -> None:
        """Use `Run.open`, which checks the directory."""
        self.directory = Path(config.output_dir)
        self.config = config
        self.is_main = ranks.is_main()
        self.interrupted = False
        self.training = False
        self.listens = False
        self.kept_work = None
        self.checkpoint = checkpoint
        self._manifest = checkpoints.read_manifest(checkpoint) if checkpoint else {}
        self.start_step = int(self._manifest.get("step", 0))
        self.digests = dict(self._manifest.get("digests", {}))
        self.console = Console(quiet=not self.is_main)
        self.metrics = Metrics(self.directory, self.note)
        self.metrics.load(self.start_step if checkpoint else -1)
        self._argv: Sequence[str] | None = None
        self._began_at = time.monotonic()
        self._started = False
        self._made: list[Path] = []
        self._ours_alone: list[Path] = []
        self._notes: set[str] = set()
        self._progress: Progress | None = None
        self._steps = self.start_step
        self._status: Status | None = None
        names = trackers.available(config.trackers) if self.is_main else []
        self._trackers = trackers.Trackers(names, config, self.directory, self.note)

    @classmethod
    def open(cls, config: RunKeys, argv: Sequence[str] | None = None) -> "Run":
        """Takes the directory for this run, or finds the checkpoint to go on from.

        Raises RefusedError when the directory holds another run or cannot be written, when the checkpoint is not whole
        or belongs to another run, and when a tracker's package is missing. `argv` goes into environment.json.
        """
        directory = Path(config.output_dir)
        checkpoint = checkpoint_to_resume(config, directory)
        if ranks.is_main():
            refuse_occupied(config, directory, checkpoint)
        run = cls(config, checkpoint)
        if checkpoint is not None:
            verify_checkpoint(config, checkpoint, run._manifest)
            verify_world_size(checkpoint, run._manifest)
        if run.is_main:
            run._take_directory(argv)
        for path, problem in checkpoints.damaged(directory) if config.resume_from_checkpoint == "latest" else []:
            run.note(f"{path} is damaged ({problem}) and passed over; going on from {checkpoint}")
        return run

    def verify_dataset(self, dataset_fingerprint: str) -> None:
        """Raises RefusedError when the data is not what the checkpoint was trained on."""
        stored = self._manifest.get("dataset_fingerprint")
        if stored is not None and stored != dataset_fingerprint:
            raise RefusedError(
                f"the dataset has changed since {self.checkpoint} was written (fingerprint {stored[:12]} then, "
                f"{dataset_fingerprint[:12]} now): its position in the data would be meaningless. Restore the data "
                "(files, tokenizer and length limits), or start a new run in another output_dir"
            )

    def manifest(self, dataset_fingerprint: str | None = None, **state: Any) -> dict[str, Any]:
        """What a checkpoint of this run says about itself; pass it to `checkpoints.publish` or `commit`."""
        return {
            **state,
            "config_fingerprint": fingerprint(self.config),
            "config": result_keys(self.config),
            "dataset_fingerprint": dataset_fingerprint,
            "world_size": ranks.world_size(),
            "seconds": self.seconds,
            "digests": self.digests,
        }

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl (NaN as null), to the trackers, and into the progress display."""
        self._steps = max(self._steps, step)
        if not self.is_main:
            return
        self._start()
        line = self.metrics.log(step, metrics)
        self._trackers.log(step, {key: value for key, value in line.items() if key != "step"})
        if self._progress is not None:
            self._progress.step(step, line.get("loss"), line.get("num_tokens"), line.get("reward"))

    def evaluation(self, step: int, name: str, metrics: Mapping[str, Any]) -> None:
        """One entry of evals.json, e.g. `evaluation(0, "heldout", {"loss": 0.69})`, and to the trackers as NAME/KEY."""
        if not self.is_main:
            return
        self._start()
        checked = self.metrics.evaluation(step, name, metrics)
        numbers = {f"eval/{name}/{k}": v for k, v in checked.items() if isinstance(v, int | float)}
        self._trackers.log(step, numbers)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in checked.items() if isinstance(v, int | float))
        self.console.say(f"evaluation {name} at step {step}: {shown}")

    def note(self, text: str) -> None:
        """Says something once, and keeps it in notes.log."""
        if text in self._notes or not self.is_main:
            return
        self._notes.add(text)
        self.console.say(text)
        if self.directory.is_dir():
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            try:
                with open(self.directory / "notes.log", "a", encoding="utf-8") as file:
                    file.write(f"{stamp} {text}\n")
            except OSError:
                self.console.say(f"(notes.log in {self.directory} cannot be written)")

    def progress(self, total_steps: int, start: int | None = None) -> Progress:
        """The display around the training loop, a context. From here on signals wait for the end of a step.

        `log` moves it; call its `step` as well where not every step is logged.
        """
        self.training = True
        start = self.start_step if start is None else start
        if self.is_main:
            self._start()
            self._trackers.start()
        tokens = self.metrics.last.get("num_tokens") if start else 0
        self._progress = Progress(self.console, total_steps, start, tokens)
        return self._progress

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Around what looks at `interrupted` every now and then and ends by itself, together with the other ranks."""
        self.listens = True
        try:
            yield
        finally:
            self.listens = False

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, those before the checkpoint included."""
        return round(float(self._manifest.get("seconds", 0.0)) + time.monotonic() - self._began_at, 3)

    def close(self, status: Status, reason: str | None = None) -> None:
        """Writes summary.json, then report.html, and ends the trackers. Once; later calls change nothing."""
        if self._status is not None:
            return
        self._status = status
        if self.is_main:
            if self.checkpoint is None:
                self._start()
            self.metrics.close()
            self._write_summary(status, reason)
            self._trackers.finish()
            self._write_report()

    def withdraw(self) -> None:
        """After a refusal: removes what this run made, so that the same command can be given again.

        Nothing of an earlier run, and nothing that anybody else put there, is touched.
        """
        self.metrics.close()
        self._trackers.finish()
        if checkpoints.latest(self.directory) is not None:
            return
        for path in self._ours_alone:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # somebody has put something into it
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close("completed")
            return
        with contextlib.suppress(OSError):  # the error under way says more than a summary that cannot be written
            if isinstance(error, RefusedError):
                self.withdraw()
            elif isinstance(error, RunInterruptedError | KeyboardInterrupt):
                self.close("interrupted", str(error) or "interrupted by the keyboard")
            else:
                self.close("failed", f"{type(error).__name__}: {error}")

    def _take_directory(self, argv: Sequence[str] | None) -> None:
        self._argv = argv
        mine = [self.directory / name for name in (*OURS, *BESIDE)]
        if not any((self.directory / name).exists() for name in OURS):
            self._ours_alone = [path for path in mine if not path.exists()]
        try:
            for path in reversed([self.directory, *self.directory.parents]):
                if not path.exists():
                    path.mkdir()
                    self._made.append(path)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(13, "no permission to write", str(self.directory))
            if self.checkpoint is None:
                write_text(self.directory / "config.yaml", to_yaml(self.config))
                write_json(self.directory / "environment.json", describe_environment(argv))
        except OSError as error:
            self.withdraw()
            raise RefusedError(f"output_dir {self.directory} cannot be used: {error.strerror or error}") from None

    def _start(self) -> None:
        """At the first value: cuts an earlier attempt's files back to the step from which this one goes on."""
        if self._started:
            return
        self._started = True
        (self.directory / "summary.json").unlink(missing_ok=True)
        for leftover in self.directory.glob(".*.tmp[0-9]*"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        if self.checkpoint is not None:
            write_text(self.directory / "config.yaml", to_yaml(self.config))
            write_json(self.directory / "environment.json", describe_environment(self._argv))
            if self.checkpoint.resolve().parent == (self.directory / "checkpoints").resolve():
                for path in checkpoints.set_aside(self.directory, self.start_step):
                    self.note(f"a checkpoint newer than {self.checkpoint.name} is set aside as {path}")
            self.note(f"going on from {self.checkpoint}")
        self.metrics.cut()

    def _write_summary(self, status: Status, reason: str | None) -> None:
        before, after = before_and_after(self.metrics.evaluations)
        write_json(
            self.directory / "summary.json",
            {
                "status": status,
                "reason": reason,
                "steps": self._steps,
                "seconds": self.seconds,
                "num_tokens": self.metrics.last.get("num_tokens", 0),
                "eval_before": before,
                "eval_after": after,
            },
        )

    def _write_report(self) -> None:
        try:
            from llmrl.runs.report import write_report  # matplotlib comes with it

            page = write_report(self.directory)
        except Exception as error:  # a picture that fails must not turn a trained model into a failed run
            self.note(f"report.html could not be written: {type(error).__name__}: {error}")
        else:
            self.console.say(f"report: {page}")
