"""Lines of JSON, the time that is left, and how long a call takes and how much memory it adds."""

import contextlib
import gc
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def seconds_since_start() -> float:
    """Of the process: imports count, too."""
    return time.time() - Path(f"/proc/{os.getpid()}").stat().st_ctime


class Report:
    """Lines of JSON, and what to do with the time that is left."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.seconds = seconds

    def line(self, section: str, **values: Any) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        text = json.dumps({"t": round(seconds_since_start(), 1), "section": section, **rounded})
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()

    def case(self, section: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run one case; its failure or its being late is a line too."""
        if seconds_since_start() > self.seconds:
            self.line(section, case=name, skipped="no time left")
            return
        begin, said = time.perf_counter(), []
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                values = work()
            ours = sorted({str(w.message)[:300] for w in said if "block-sparse" in str(w.message)})
            took = {"case_seconds": time.perf_counter() - begin}
            self.line(section, case=name, **values, **({"warned": ours} if ours else {}), **took)
        except Exception as error:
            where = traceback.format_exc().strip().splitlines()[-6:]
            self.line(section, case=name, error=f"{type(error).__name__}: {str(error)[:600]}", where=where)
        finally:
            clear()


def clear() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def measured(work: Callable[[], Any], repeats: int = 5, warm_ups: int = 2) -> dict[str, float]:
    """Mean milliseconds of calls in a row, as a training step makes them, and the peak of memory they add, in GiB."""
    for _ in range(warm_ups):
        work()
    synchronize()
    before = torch.cuda.memory_allocated() if GPU else 0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if GPU else 0
    return {"ms": seconds / repeats * 1e3, "extra_gib": (peak - before) / 2**30}


@contextlib.contextmanager
def patched(place: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(place, name) for name in values}
    for name, value in values.items():
        setattr(place, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)
