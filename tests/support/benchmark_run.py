"""Benchmarks of `benchmarks/` in processes that are forked from one that has imported everything.

Measurements are taken in processes of their own so that memory and imports of one do not count for another; here
nobody looks at the figures, and importing the libraries would take longer than the miniatures that are measured.
"""

import importlib
import json
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from support.forked import ended, fork
from support.recipe_run import ROOT


def run_benchmark(script: str, *arguments: str, log: Path) -> None:
    """`python benchmarks/SCRIPT ARGUMENTS`, whose words go to `log`."""
    process = fork(_main, (script, arguments), log)
    assert ended(process, 540) == 0, log.read_text()[-3000:]


def _main(script: str, arguments: tuple[str, ...]) -> None:
    torch.set_num_threads(1)  # a pool of threads would not live on in what is forked from here
    sys.argv = [script, *arguments]
    module = _module(script)
    if hasattr(module, "in_own_process"):
        module.in_own_process = _forked_again  # type: ignore[attr-defined]
    module.main()


def _module(script: str) -> ModuleType:
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(Path(script).stem)


def _forked_again(worker: str, wanted: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """As `processes.in_own_process`."""
    specification, result = folder / "specification.json", folder / "result.json"
    specification.write_text(json.dumps(wanted))
    result.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(worker, specification, result))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{wanted}: exit code {process.exitcode}"
    return dict(json.loads(result.read_text()))


def _measure(worker: str, specification: Path, result: Path) -> None:
    module = _module(worker)
    getattr(module, "measure", module.main)(specification, result)
