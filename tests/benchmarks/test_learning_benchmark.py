"""The benchmark of learning runs the recipes' own commands, goes on where it was ended, and knows its statistics."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.test_benchmarks import run, table_rows
from support.recipe_run import ROOT


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import learning

    return learning


def one(before: float, after: float, seconds: float = 60.0) -> dict[str, Any]:
    return {
        "before": before, "after": after, "rows": 400, "steps": 20, "seconds": seconds, "threads": 1, "load": 0.5,
    }  # fmt: skip


@pytest.mark.slow
def test_learning_quick_runs_the_control_and_keeps_what_is_there(tmp_path: Path) -> None:
    document, measurements = tmp_path / "learning.md", tmp_path / "learning.json"
    document.write_text("# Kept\n")
    measurements.write_text(json.dumps({"loop, huggingface, seed 0": one(0.5, 0.75)}))
    where = ["--document", str(document), "--measurements", str(measurements)]
    run("learning.py", "--quick", "--methods", "loop", "by_lot", "--engines", "huggingface", "--seeds", "0",
        "--resume", *where)  # fmt: skip
    done = json.loads(measurements.read_text())
    assert done.pop("loop, huggingface, seed 0") == one(0.5, 0.75)
    ((label, found),) = done.items()
    assert label == "by_lot, huggingface, seed 0"
    assert (found["rows"], found["steps"]) == (16, 1)
    assert found["before"] == found["metrics_before"]["correct_number"]
    assert found["metrics_after"]["reward"] == found["metrics_after"]["by_lot"]  # it alone is trained on
    assert document.read_text().startswith("# Kept\n")
    assert [row[4:7] for row in table_rows(document, "loop |")] == [["50.0%", "75.0%", "+25.0"]]
    assert len(table_rows(document, "loop, rewards by lot")) == 1


def test_a_row_says_each_seed_and_the_gain(learning: Any) -> None:
    done = {
        learning.label("ppo", "vllm", 1): one(0.6, 0.95, 30.0),
        learning.label("ppo", "vllm", 0): one(0.6, 0.9, 50.0),
        learning.label("game", "huggingface", 0): one(0.2, 1.0),
        learning.label("loop", "huggingface", 0): one(0.6, 0.9),
    }
    (plain, *_), (name, engine, found), (game, *_, played) = learning.by_row(done)
    assert [plain, name, engine, game] == ["loop", "ppo", "vllm", "game"]
    assert learning._row(name, engine, found)[2:] == [
        "20", "400", "60.0%", "90.0%, 95.0%", "+32.5 [+0.7, +64.3]", "40",
    ]  # fmt: skip
    assert learning._row(game, "huggingface", played)[4:7] == ["0.20", "1.00", "+0.80"]


def test_commands_are_the_recipes_own(learning: Any) -> None:
    words = learning.command("rlsp", "vllm", 2, Path("runs/there"), ["--max_steps", "5"])
    assert words[1:] == [
        "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml", "recipes/rlsp/run.py",
        "--config", "recipes/rlsp/tiny.yaml", "--output_dir", "runs/there", "--seed", "2", "--engine.kind", "vllm",
        "--max_steps", "5",
    ]  # fmt: skip
    every = learning.cells(list(learning.TASKS), learning.ENGINES, [0])
    assert {(name, engine) for name, engine, _ in every} >= {
        (name, engine) for name in ("loop", "ppo", "rlsp", "pf_ppo") for engine in learning.ENGINES
    }
    for task in learning.TASKS.values():
        assert (ROOT / "recipes" / task.method / f"{task.preset}.yaml").exists()
