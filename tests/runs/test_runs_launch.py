"""From a command line to an exit code and a summary, as a user and a scheduler see it."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from llmrl.runs import launch

RECIPE = Path(__file__).with_name("toy_recipe.py")


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_recipe"] = module
    spec.loader.exec_module(module)
    return module


def run(toy: ModuleType, words: Sequence[str]) -> int:
    return launch.run_command(toy.ToyConfig, toy.describe, toy.train, ["--max_steps", "4", *words])


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())  # type: ignore[no-any-return]


def test_done_is_0(toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(toy, ["--output_dir", str(tmp_path / "out")]) == 0
    assert summary(tmp_path / "out")["status"] == "completed"
    assert summary(tmp_path / "out")["reason"] is None
    shown = capsys.readouterr()
    assert "step 4/4  loss 0.2500" in shown.out
    assert "report.html" in shown.out
    assert shown.err == ""


def test_the_runs_own_configuration_repeats_it(toy: ModuleType, tmp_path: Path):
    assert run(toy, ["--output_dir", str(tmp_path / "a"), "--learning_rate", "0.25"]) == 0
    words = ["--config", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")]
    assert launch.run_command(toy.ToyConfig, toy.describe, toy.train, words) == 0
    assert (tmp_path / "b/final/total.json").read_text() == (tmp_path / "a/final/total.json").read_text()


def test_a_dry_run_answers_and_leaves_nothing(toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(toy, ["--output_dir", str(tmp_path / "out"), "--dry-run", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "# rows per step and process  16" in text
    assert yaml.safe_load(text)["seed"] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_the_processes(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(toy, ["--output_dir", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "# rows per step and process  4" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--learning_rte", "1"], ["--seed", "x"], ["--end", "refused"]], ids=str)
def test_refused_is_2_with_one_message_and_nothing_left(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
):
    assert run(toy, ["--output_dir", str(tmp_path / "out"), *more]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("refused: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err + shown.out
    assert list(tmp_path.iterdir()) == []


def test_batch_arithmetic_that_cannot_be_is_refused(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert run(toy, ["--output_dir", str(tmp_path / "out")]) == 2
    assert "launch at most 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_is_refused(toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(toy, ["--output_dir", str(tmp_path / "out")]) == 0
    assert run(toy, ["--output_dir", str(tmp_path / "out")]) == 2
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert summary(tmp_path / "out")["status"] == "completed"


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("failed", "the toy broke in step 3; mend it"),
        ("broken", "ValueError: an unexpected thing"),
        ("memory", "MemoryError. Lower tokens_per_microbatch"),
    ],
)
def test_failed_is_1_with_what_happened_and_what_is_left(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str, says: str
):
    out = tmp_path / "out"
    assert run(toy, ["--output_dir", str(out), "--end", end, "--save_steps", "2"]) == 1
    shown = capsys.readouterr()
    assert says in shown.err
    assert f"{out / 'checkpoints' / 'step_2'} is whole" in shown.err
    assert "Traceback (most recent call last)" not in shown.err
    assert "Traceback (most recent call last)" in (out / "error.log").read_text()
    assert summary(out)["status"] == "failed"
    assert says in summary(out)["reason"]
    assert summary(out)["steps"] == 3
    assert says.split(".")[0] in (out / "report.html").read_text()


def test_a_failed_run_goes_on_from_its_checkpoint(toy: ModuleType, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(toy, ["--output_dir", str(whole)]) == 0
    assert run(toy, ["--output_dir", str(broken), "--end", "broken", "--save_steps", "2"]) == 1
    assert run(toy, ["--output_dir", str(broken), "--resume_from_checkpoint", "latest", "--save_steps", "2"]) == 0
    assert (broken / "final/total.json").read_text() == (whole / "final/total.json").read_text()
    assert (broken / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (broken / "evals.json").read_text() == (whole / "evals.json").read_text()
    assert summary(broken)["status"] == "completed"


def test_another_rank_is_silent_with_the_same_code(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "out"
    assert run(toy, ["--output_dir", str(out)]) == 0
    assert run(toy, ["--output_dir", str(out), "--dry-run"]) == 0
    assert run(toy, ["--output_dir", str(out), "--end", "refused"]) == 2
    with pytest.raises(SystemExit):
        run(toy, ["--help"])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


@pytest.mark.parametrize(
    ("end", "says"), [("broken", "ValueError: an unexpected"), ("failed", "RunFailedError: the toy")]
)
def test_another_rank_that_fails_is_heard_as_it_may_be_the_only_one(
    toy: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    says: str,
):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(toy, ["--output_dir", str(out), "--end", end]) == 1
    assert f"rank 1 failed: {says}" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["error_rank1.log"]


def test_as_a_command_help_is_one_text_and_0():
    done = subprocess.run([sys.executable, str(RECIPE), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--step_seconds  a number (default 0.0)\n      How long a step takes." in done.stdout


def test_as_a_command_a_refusal_is_2(tmp_path: Path):
    words = [sys.executable, str(RECIPE), "--output_dir", str(tmp_path / "out"), "--learning_rte", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "`learning_rate`" in done.stderr
    assert "Traceback" not in done.stderr
