"""The house of CONTRIBUTING.md is the house of the code: arrows between rooms, and what loads without torch."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmrl"
HEAVY = {"accelerate", "datasets", "deepspeed", "peft", "torch", "transformers", "trl", "vllm"}
ROW = re.compile(r"^\| `llmrl/(?P<room>\w+)(?:/|\.py)` \|[^|]*\|(?P<rooms>[^|]*)\|(?P<heavy>[^|]*)\|$", re.MULTILINE)


def words(cell: str) -> set[str]:
    return set(re.findall(r"\w+", cell))


RULES = {
    row["room"]: (words(row["rooms"]), words(row["heavy"]))
    for row in ROW.finditer((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
}
ROOMS = sorted({path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")} - {"__init__"})


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it, `from llmrl import errors` counted as llmrl.errors."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; name the module in full"
            within = {f"llmrl.{alias.name}" for alias in node.names} if node.module == "llmrl" else {node.module or ""}
            names |= within
    return names


def imports_of_room(room: str) -> dict[str, set[Path]]:
    """Module -> the room's files that import it."""
    folder = PACKAGE / room
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    found: dict[str, set[Path]] = {}
    for path in files:
        for module in imported_modules(path):
            found.setdefault(module, set()).add(path.relative_to(ROOT))
    return found


def test_every_room_is_in_the_table() -> None:
    assert set(ROOMS) <= set(RULES)


def test_the_rules_have_no_cycle() -> None:
    remaining = {room: set(allowed) for room, (allowed, _) in RULES.items()}
    while remaining:
        free = [room for room, allowed in remaining.items() if not allowed & remaining.keys()]
        assert free, f"these rooms may import one another in a circle: {sorted(remaining)}"
        for room in free:
            del remaining[room]


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room: str) -> None:
    allowed_rooms, allowed_heavy = RULES[room]
    wrong = []
    for module, files in imports_of_room(room).items():
        top, _, rest = module.partition(".")
        target = rest.split(".")[0]
        foreign_room = top == "llmrl" and (PACKAGE / target).exists() | (PACKAGE / f"{target}.py").exists()
        if (foreign_room and target not in {"", room} | allowed_rooms) or (top in HEAVY and top not in allowed_heavy):
            wrong.append(f"{module} in {', '.join(sorted(map(str, files)))}")
    assert not wrong, f"llmrl/{room} may not import: " + "; ".join(sorted(wrong))


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Imports within functions and for types count, too: who changes one of the modules has to read all of them."""
    names = {
        ".".join(("llmrl", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {name: {m for m in named_modules(path) if m in names and m != name} for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def named_modules(path: Path) -> set[str]:
    """As `imported_modules`, where `from llmrl.trainers import checks` is llmrl.trainers.checks alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= modules if len(modules) == len(inner) else modules | {str(node.module)}
    return found


def test_objectives_import_torch_and_nothing_else() -> None:
    outside = {module.split(".")[0] for module in imports_of_room("objectives")} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "llmrl"}


def test_commands_and_configurations_load_without_heavy_libraries() -> None:
    program = """
import importlib, sys
import llmrl.cli, llmrl.config, llmrl.errors, llmrl.runs
from llmrl.trainers import METHODS
for module in METHODS.values():
    importlib.import_module(module)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "pydantic" in loaded, "the list of loaded modules is not what it seems"
    assert not loaded & HEAVY
