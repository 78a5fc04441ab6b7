"""What the studies of the DPO policies share: their options, a file of results that loses nothing, and how each result
came about."""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import document
import dpo_policies
import measuring

RESULTS = Path(__file__).resolve().parent / "results"
Measured = dict[str, Any]


def parser(description: str, quick: str, results: Path) -> argparse.ArgumentParser:
    """The options that a study has. `quick`: what is measured with --quick, in words."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dpo_policies.POLICIES)
    made.add_argument("--policies", nargs="+", default=known, choices=known, help="default: all")
    made.add_argument("--folder", type=Path, default=dpo_policies.FOLDER, help="where policies are, or are trained")
    made.add_argument("--quick", action="store_true", help=f"{quick}; shown, and written nowhere")
    made.add_argument("--again", action="store_true", help="measure what is in the file of measurements once more")
    made.add_argument("--measurements", type=Path, default=results, help="every measurement, as JSON")
    made.add_argument("--document", type=Path, default=document.DOCUMENT, help="where the table goes")
    return made


class Results:
    """Measurements by policy and name. What is in the file stays in it, whatever else is measured; what is added is
    written at once."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: they are kept in no file."""
        self.path = path
        known = path is not None and path.exists()
        self.of: dict[str, dict[str, Measured]] = json.loads(path.read_text()) if path and known else {}

    def lacking(self, policy: str, names: Iterable[str], again: bool) -> list[str]:
        """Which of these names are to be measured: those that are not there, or all `again`."""
        return [name for name in names if again or name not in self.of.get(policy, {})]

    def add(self, policy: str, name: str, measured: Measured) -> None:
        self.of.setdefault(policy, {})[name] = measured
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            written = self.path.with_suffix(".part")  # a run that is ended leaves the old file or the new one
            written.write_text(json.dumps(self.of) + "\n")
            written.replace(self.path)


def conditions() -> Measured:
    """Under what a measurement that begins now comes about."""
    return {
        "date": measuring.today(),
        "machine": measuring.hardware(),
        "versions": measuring.versions("torch", "transformers"),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "load": os.getloadavg()[0],
    }


def conditions_in_words(results: Results, script: str) -> str:
    """What measured all that is there, and under what."""
    all_ = [one["conditions"] for measured in results.of.values() for one in measured.values()]
    date, machine, versions, threads = (
        " or ".join(sorted({str(one[key]) for one in all_})) for key in ("date", "machine", "versions", "threads")
    )
    loads = [one["load"] for one in all_]
    return (
        f"`python benchmarks/{script}.py`, {date}. {machine}; threads: {threads}; load average {min(loads):.1f} to "
        f"{max(loads):.1f}. {versions}."
    )
