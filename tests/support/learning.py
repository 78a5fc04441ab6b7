"""Whether what was measured over seeds is learning; the presets that are measured."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from support.online_run import evals
from support.recipe_run import ROOT, launch, run_method

SEEDS = (0, 1, 2)
T_975 = 4.303
"""Student's t with two degrees of freedom, 97.5%: three seeds of no effect look better once in 40 times, and
hardly ever when their mean has to reach a margin as well."""


def run_preset(method: str, preset: str, run: Path, seed: int, *further: str, launched: bool = False) -> Path:
    """Train as recipes/METHOD/PRESET.yaml says, with what `further` says instead: in this process, or as a person
    types it, `launched` by accelerate."""
    own = (f"recipes/{method}/{preset}.yaml", "--output_dir", str(run), "--seed", str(seed), *further)
    if launched:
        done = launch(method, "cpu", "--config", *own)
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert run_method(method, ROOT / own[0], *own[1:]) == 0
    return run


def gain(run: Path, score: str) -> float:
    """How far a held-out score is above the first evaluation, in the mean of those behind it."""
    first, *later = (entry["metrics"][score] for entry in evals(run))
    return fmean(later) - first


def assert_rises(gains: Sequence[float], by: float) -> None:
    """The mean of three gains is above `by`, and so far above 0 that chance would not do it."""
    assert len(gains) == 3
    mean = fmean(gains)
    assert mean > by, gains
    assert mean > T_975 * stdev(gains) / math.sqrt(len(gains)), gains


def assert_rises_on(run: Path, score: str, rows: int) -> None:
    """A share of `rows` held-out rows is so far above the first evaluation's that chance would not do it: 2.6 standard
    errors, once in 200 times. They are those of two samples of rows; of the same rows twice they are smaller."""
    first, *_, last = (entry["metrics"][score] for entry in evals(run))
    error = math.sqrt((first * (1 - first) + last * (1 - last)) / rows)
    assert last - first > 2.6 * error, (first, last)
