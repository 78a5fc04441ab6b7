"""What one process uses: wall time, CPU time of all its threads, and how far its resident memory rises (Linux)."""

import ctypes
import gc
import os
import platform
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_mb(field: str) -> float:
    """A line of /proc/self/status such as VmRSS (now) or VmHWM (the highest so far), in MB of 10^6 bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{STATUS} has no {field}: memory can be measured on Linux only")


@dataclass
class Meter:
    """Measures from its `start` to its `stop`. The kernel's high-water mark is reset at the start, so what loading took
    before does not count; memory that the allocator merely keeps is given back first."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    extra_mb: float = 0.0
    laps: list[tuple[float, float]] = field(default_factory=list)
    """(wall seconds, CPU seconds) since the start, at each `lap`."""

    def start(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
        self.extra_mb = -_status_mb("VmRSS")
        self.wall_seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()

    def lap(self) -> None:
        self.laps.append((self.wall_seconds + time.perf_counter(), self.cpu_seconds + time.process_time()))

    def stop(self) -> None:
        self.wall_seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()
        self.extra_mb += _status_mb("VmHWM")


def hardware() -> str:
    """The processor, its cores and the memory, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = dict(line.split(":", 1) for line in lines if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in cpu.items()}
    kind = f"{cpu.get('model name', platform.processor())} (family {cpu.get('cpu family')}, model {cpu.get('model')}"
    kind += ", AVX-512)" if "avx512f" in cpu.get("flags", "") else ")"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{kind}, {os.cpu_count()} cores, {memory:.0f} GiB memory, no GPU used"


def versions(*names: str) -> str:
    """`name version` of Python and of installed packages, separated by commas."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def today() -> str:
    """The date, as in 2025-01-31."""
    return date.today().isoformat()
