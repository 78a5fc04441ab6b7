"""The benchmarks run, agree with TRL and write their tables; how fast anything is, is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.benchmark_run import run_benchmark
from support.recipe_run import ROOT


def run(script: str, *arguments: str) -> None:
    """As a person does."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr


def table_rows(document: Path, first_cell: str) -> list[list[str]]:
    lines = [line for line in document.read_text().splitlines() if line.startswith(f"| {first_cell}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_dpo_vs_trl_smallest_cell(tmp_path: Path) -> None:
    document, measurements = tmp_path / "benchmarks.md", tmp_path / "measurements.json"
    document.write_text("# Kept\n")
    run_benchmark(
        "dpo_vs_trl.py", "--quick", "--cells", "ragged", "--threads", "1",
        "--document", str(document), "--measurements", str(measurements), log=tmp_path / "log",
    )  # fmt: skip
    (cell,) = json.loads(measurements.read_text())
    (one,) = json.loads(measurements.read_text())[cell]
    assert one["llmrl"]["pairs"] == one["trl"]["pairs"] == one["trl_selecting"]["pairs"]
    for toolkit in ("trl", "trl_selecting"):
        assert one["llmrl"]["losses"] == pytest.approx(one[toolkit]["losses"], abs=1e-5)
        assert one["llmrl"]["grad_norms"] == pytest.approx(one[toolkit]["grad_norms"], rel=1e-4)
    assert one["llmrl"]["losses"][0] != one["llmrl"]["losses"][1]
    assert document.read_text().startswith("# Kept\n")
    speed, memory = table_rows(document, cell)
    assert [len(speed), len(memory)] == [8, 8]
    assert all(float(figure.split()[0]) > 0 for figure in speed[1:])


@pytest.mark.slow
def test_head_memory_quick(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    run_benchmark("head_memory.py", "--quick", "--document", str(document), log=tmp_path / "log")
    rows = table_rows(document, "4k") + table_rows(document, "32k")
    assert [row[0] for row in rows] == ["4k, frozen", "4k, trainable", "32k, frozen", "32k, trainable"]


def test_a_section_is_replaced_and_the_rest_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from document import table, write_section

    path = tmp_path / "docs" / "benchmarks.md"
    write_section(path, "speed", "old figures")
    path.write_text(path.read_text() + "\nwritten by hand\n")
    write_section(path, "memory", table(["shape", "MB"], [["long", "7"]]))
    write_section(path, "speed", "new figures")
    text = path.read_text()
    assert text.startswith("# Benchmarks\n")
    assert "old figures" not in text
    assert text.index("new figures") < text.index("written by hand") < text.index("| long | 7 |")


def test_a_difference_of_losses_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dpo_vs_trl
    from workloads import Cell

    cell = Cell(4096, "ragged", True)
    equal = {"pairs": "same", "losses": [0.69, 0.5]}
    same = {toolkit: dict(equal) for toolkit in dpo_vs_trl.TOOLKITS}
    dpo_vs_trl.check_equal(cell, [same])
    for wrong in (
        {"losses": [0.69, 0.50002]},
        {"losses": [0.69]},
        {"losses": [0.69, float("nan")]},
        {"pairs": "others"},
    ):
        with pytest.raises(SystemExit, match="4k, ragged, LoRA"):
            dpo_vs_trl.check_equal(cell, [same, same | {"trl_selecting": equal | wrong}])
