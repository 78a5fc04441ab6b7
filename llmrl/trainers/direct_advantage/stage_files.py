"""Long work in stages, each of which leaves a file that a person can read and a resumed run takes as it is.

Invariants
- Whatever goes on with a stage reads it from its file, so that it is the same for who made it and who came later.
- A file is there whole or not at all; a stage is done once `NOTES` names it, with the digest of what it has left. What
  is no longer as it was written is never read: the work begins anew, or ends where it cannot.
- The first rank reads and writes, and what that raises, all ranks raise.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from llmrl.errors import RunFailedError
from llmrl.files import digest, read_json, write_json, write_lines
from llmrl.learner.together import from_first
from llmrl.runs import Run, checkpoints
from llmrl.runs.disk import as_disk_failure

NOTES = "stages.json"
"""What the folder comes from, and the counts of each stage that is done."""
ANEW = (
    "go on from a checkpoint before this round, which makes it again (--resume_from_checkpoint PATH), or, where there "
    "is none, begin a run in another output_dir"
)
Line = dict[str, Any]
Tallies = dict[str, float]


class StageFolder:
    """Files and folders below `path`, each made once. `identity`: what they come from; where they come from something
    else, or are damaged, they are set aside if the work begins now (`fresh`), and else the run cannot go on. Called on
    all ranks."""

    def __init__(self, path: Path, identity: dict[str, Any], fresh: bool, run: Run, accelerator: Accelerator) -> None:
        self.path, self.identity, self.run, self.accelerator = path, identity, run, accelerator
        from_first(accelerator, lambda: self._claim(fresh))

    def _claim(self, fresh: bool) -> None:
        stored = read_json(self.path / NOTES, {})
        is_ours = stored.get("identity") == self.identity
        damaged = [name for name in stored.get("stages", {}) if not self._is_as_written(name, stored)] if fresh else []
        if is_ours and not damaged:
            self._say_kept(stored["stages"])
            return
        if not fresh:
            raise RunFailedError(
                f"{self.path} is not there as the checkpoint knows it, with its weights, data and configuration. Put "
                f"it back, or {ANEW}"
            )
        with self._writing(NOTES):
            if self.path.exists():
                aside = self.path.with_name(f"{self.path.name}.superseded")
                shutil.rmtree(aside, ignore_errors=True)
                self.path.rename(aside)
                others = "it is of other weights, data, keys or functions"
                why = f"{damaged[0]} is not as it was written" if is_ours else others
                self.run.note(f"{self.path} is set aside as {aside}, and made anew: {why}")
            self.path.mkdir(parents=True)
            write_json(self.path / NOTES, {"identity": self.identity, "stages": {}, "digests": {}})

    def _is_as_written(self, name: str, stored: dict[str, Any]) -> bool:
        known = stored.get("digests", {}).get(name)
        return bool(known) and known == digest(self.path / name)

    def tallies(self) -> dict[str, Tallies]:
        """What is known of the stages that are whole, by their names."""
        stages: dict[str, Tallies] = from_first(
            self.accelerator, lambda: read_json(self.path / NOTES, {}).get("stages", {})
        )
        return stages

    def lines(self, name: str, make: Callable[[], tuple[list[Line], Tallies]]) -> list[Line]:
        """The stage's lines, made if they are not there."""
        if name not in self.tallies():
            made, counts = make()
            from_first(self.accelerator, lambda: self._write(name, made, counts))
        return from_first(self.accelerator, lambda: self._read(name))

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

            from_first(self.accelerator, begin)
            counts = make(pending)
            self.accelerator.wait_for_everyone()
            from_first(self.accelerator, lambda: self._publish(name, pending, counts))
        return self.path / name

    def _publish(self, name: str, pending: Path, counts: Tallies) -> None:
        with self._writing(name):
            shutil.rmtree(self.path / name, ignore_errors=True)
            pending.rename(self.path / name)
            self._note(name, counts)

    def _write(self, name: str, lines: list[Line], counts: Tallies) -> None:
        with self._writing(name):
            write_lines(self.path / name, lines)
            self._note(name, counts)
            for part in self.path.glob(f".{name}.*"):
                part.unlink()

    def _note(self, name: str, counts: Tallies) -> None:
        """The stage is done, and its parts are no longer needed."""
        stored = read_json(self.path / NOTES, {})
        parts = f".{name}."
        stages = {other: its for other, its in stored["stages"].items() if not other.startswith(parts)}
        digests = {other: its for other, its in stored["digests"].items() if not other.startswith(parts)}
        digests[name] = digest(self.path / name)
        stages[name] = counts
        write_json(self.path / NOTES, {**stored, "stages": stages, "digests": digests})
        self._say_kept(stages)

    def _say_kept(self, stages: dict[str, Tallies]) -> None:
        """For whoever hears that the run ended before its first checkpoint."""
        done = [f"parts of {name[1:].rpartition('.')[0]}" if name.startswith(".") else name for name in stages]
        if done:
            self.run.kept_work = f"what is done in {self.path}: {', '.join(dict.fromkeys(done))}"

    def _read(self, name: str) -> list[Line]:
        path = self.path / name
        if not self._is_as_written(name, read_json(self.path / NOTES, {})):
            raise RunFailedError(f"{path} is not as it was written, and what was trained on it is gone: {ANEW}")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

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
