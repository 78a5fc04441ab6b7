"""A measurement in a process of its own, so that none inherits another's memory, caches or imports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 1800


def in_own_process(worker: str, wanted: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """Run `benchmarks/WORKER SPECIFICATION.json RESULT.json` and return its result; ends the benchmark if it fails."""
    specification, result = folder / "specification.json", folder / "result.json"
    specification.write_text(json.dumps(wanted))
    result.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks" / worker), str(specification), str(result)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if process.returncode != 0 or not result.exists():
        sys.exit(f"{wanted}: exit code {process.returncode}\n{process.stdout}\n{process.stderr}")
    return dict(json.loads(result.read_text()))
