"""Long work in stages, each of which leaves a file that a person can read and a resumed run takes as it is.

Invariants
- Whatever goes on with a stage reads it from its file, so that it is the same for who made it and who came later.
- A file is there whole or not at all; a stage is done once `NOTES` names it.
- The first rank reads and writes, and what that raises, all ranks raise.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from llmrl.errors import LlmrlError, RunFailedError
from llmrl.learner.sharding import gather_objects
from llmrl.runs import Run, checkpoints
from llmrl.runs.disk import as_disk_failure
from llmrl.runs.files import read_json, write_json, write_text
from llmrl.trainers.online.engines import raise_together

NOTES = "stages.json"
"""What the folder comes from, and the counts of each stage that is done."""
Line = dict[str, Any]
Tallies = dict[str, float]
T = TypeVar("T")


def by_the_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives the first rank, on all of them; what it raises there, too."""
    value: Any = None
    failure: LlmrlError | None = None
    if accelerator.is_main_process:
        try:
            value = work()
        except LlmrlError as error:
            failure = error
    raise_together(accelerator, failure)
    found: T = gather_objects(accelerator, value)[0]
    return found


class StageFolder:
    """Files and folders below `path`, each made once. `identity`: what they come from; where they come from something
    else they are set aside if the work begins now (`fresh`), and else the run cannot go on. Called on all ranks."""

    def __init__(self, path: Path, identity: dict[str, Any], fresh: bool, run: Run, accelerator: Accelerator) -> None:
        self.path, self.identity, self.run, self.accelerator = path, identity, run, accelerator
        by_the_first(accelerator, lambda: self._claim(fresh))

    def _claim(self, fresh: bool) -> None:
        stored = read_json(self.path / NOTES, {})
        if stored.get("identity") == self.identity:
            return
        if not fresh:
            raise RunFailedError(
                f"{self.path} is not there as the checkpoint knows it, with its weights, data and configuration. Put "
                "it back, or go on from an earlier checkpoint, which makes it again: --resume_from_checkpoint PATH"
            )
        with self._writing(NOTES):
            if self.path.exists():
                aside = self.path.with_name(f"{self.path.name}.superseded")
                shutil.rmtree(aside, ignore_errors=True)
                self.path.rename(aside)
                self.run.note(f"{self.path} came from other weights, data or keys: it is set aside as {aside}")
            self.path.mkdir(parents=True)
            write_json(self.path / NOTES, {"identity": self.identity, "stages": {}})

    def tallies(self) -> dict[str, Tallies]:
        """What is known of the stages that are whole, by their names."""
        stages: dict[str, Tallies] = by_the_first(
            self.accelerator, lambda: read_json(self.path / NOTES, {}).get("stages", {})
        )
        return stages

    def lines(self, name: str, make: Callable[[], tuple[list[Line], Tallies]]) -> list[Line]:
        """The stage's lines, made if they are not there."""
        if name not in self.tallies():
            made, counts = make()
            by_the_first(self.accelerator, lambda: self._write(name, made, counts))
        return by_the_first(self.accelerator, lambda: self._read(name))

    def parts(self, name: str, firsts: Iterable[int], make: Callable[[int], list[Line]]) -> list[Line]:
        """Lines for `lines` of this name, made part by part; what was made before a kill is taken as it is."""
        found: list[Line] = []
        for first in firsts:
            found += self.lines(f".{name}.{first}", partial(_without_counts, make, first))
        return found

    def folder(self, name: str, make: Callable[[Path], Tallies]) -> Path:
        """The stage's folder, made if it is not there: `make` fills the one that it is given, on all ranks."""
        if name not in self.tallies():
            pending = self.path / f".tmp_{name}"

            def begin() -> None:
                shutil.rmtree(pending, ignore_errors=True)
                pending.mkdir()

            by_the_first(self.accelerator, begin)
            counts = make(pending)
            self.accelerator.wait_for_everyone()
            by_the_first(self.accelerator, lambda: self._publish(name, pending, counts))
        return self.path / name

    def _publish(self, name: str, pending: Path, counts: Tallies) -> None:
        with self._writing(name):
            shutil.rmtree(self.path / name, ignore_errors=True)
            pending.rename(self.path / name)
            self._note(name, counts)

    def _write(self, name: str, lines: list[Line], counts: Tallies) -> None:
        with self._writing(name):
            write_text(self.path / name, "".join(json.dumps(line) + "\n" for line in lines))
            self._note(name, counts)
            for part in self.path.glob(f".{name}.*"):
                part.unlink()

    def _note(self, name: str, counts: Tallies) -> None:
        """The stage is done, and its parts are no longer needed."""
        stored = read_json(self.path / NOTES, {})
        stages = {other: its for other, its in stored["stages"].items() if not other.startswith(f".{name}.")}
        write_json(self.path / NOTES, {**stored, "stages": {**stages, name: counts}})

    def _read(self, name: str) -> list[Line]:
        try:
            return [json.loads(line) for line in (self.path / name).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise RunFailedError(
                f"{self.path / name} cannot be read any more ({error}), though it was whole: remove {self.path}, and "
                "go on from a checkpoint before it"
            ) from error

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """What a disk does meanwhile is said as such."""
        try:
            yield
        except OSError as error:
            root = self.run.directory
            failure = as_disk_failure(error, root, f"{self.path.name}/{what}", checkpoints.latest(root))
            raise failure or RunFailedError(str(error)) from error


def _without_counts(make: Callable[[int], list[Line]], first: int) -> tuple[list[Line], Tallies]:
    return make(first), {}
