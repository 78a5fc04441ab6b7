"""`metrics.jsonl` and `evals.json`: what a run measured, readable at any moment, whole after any interruption.

Invariants: one strict JSON object a line, flushed as it is written; NaN and infinities are null, and said aloud once;
going on from a checkpoint cuts both files back to its step, so no step is there twice.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from llmrl.errors import RunFailedError
from llmrl.files import finite, read_json, read_lines, write_json, write_text
from llmrl.runs.disk import as_disk_failure


class Metrics:
    """Writes the two files of one run directory."""

    def __init__(self, directory: Path, note: Callable[[str], None]) -> None:
        self.directory = directory
        self.evaluations: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []
        self._note = note
        self._said: set[str] = set()
        self._file: TextIO | None = None

    def load(self, step: int) -> None:
        """Reads what was measured up to `step` (-1: nothing), a torn last line left out. Changes no file."""
        self._lines = [line for line in read_lines(self._metrics_path) if _step(line) <= step]
        self.last = self._lines[-1] if self._lines else {}
        kept = read_json(self._evals_path, [])
        self.evaluations = [item for item in kept if isinstance(item, dict) and _step(item) <= step]

    def cut(self) -> None:
        """Makes the files hold what `load` found, no more."""
        write_text(self._metrics_path, "".join(json.dumps(line) + "\n" for line in self._lines))
        write_json(self._evals_path, self.evaluations)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Appends a line and returns it as written."""
        line = self._checked({"step": int(step), **metrics}, step)
        try:
            if self._file is None:
                self._file = open(self._metrics_path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        self.last = line
        return line

    def evaluation(self, step: int, name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Adds an evaluation and returns its metrics as written; the same name at the same step is replaced."""
        checked = self._checked(dict(metrics), step)
        self.evaluations = [e for e in self.evaluations if (e["step"], e["name"]) != (int(step), name)]
        self.evaluations.append({"step": int(step), "name": name, "metrics": checked})
        try:
            write_json(self._evals_path, self.evaluations)
        except OSError as error:
            raise self._failure(error) from error
        return checked

    def close(self) -> None:
        """Closes the file; what was written stays."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk it tries once more to write what failed before
                self._file.close()
            self._file = None

    def _checked(self, values: dict[str, Any], step: int) -> dict[str, Any]:
        line: dict[str, Any] = finite(values)
        for key, value in line.items():
            if value is None and values[key] is not None:
                self._say_once(
                    key, f"{key} is {float(values[key])} at step {step}: written as null, as all such from here on"
                )
        return line

    def _say_once(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._note(text)

    def _failure(self, error: OSError) -> RunFailedError:
        from llmrl.runs.checkpoints import latest

        failure = as_disk_failure(error, self.directory, "a line of metrics", latest(self.directory))
        return failure or RunFailedError(str(error))

    @property
    def _metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def _evals_path(self) -> Path:
        return self.directory / "evals.json"


def _step(item: Mapping[str, Any]) -> float:
    step = item.get("step")
    return step if isinstance(step, int | float) else float("inf")
