"""The `llmrl` command: what it lists, what it refuses, and `check` through a recipe's module."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmrl import cli
from llmrl.cli import run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the recipe `toy`, whose trainer is found as those of llmrl are."""
    (tmp_path / "toy_trainer.py").write_text(
        textwrap.dedent(
            """
            from typing import Literal
            from llmrl.config import DataKeys, ModelKeys, OptimizationKeys, RunKeys
            from llmrl.errors import RefusedError

            class ToyConfig(ModelKeys, DataKeys, OptimizationKeys, RunKeys):
                method: Literal["toy"] = "toy"
                beta: float = 0.1

            Config = ToyConfig

            def check(config):
                if config.dataset_name == "bad.jsonl":
                    raise RefusedError("bad.jsonl, row 6, column chosen: empty")
                return [f"{type(config).__name__} with beta {config.beta}", "1,024 rows"]
            """
        )
    )
    folder = tmp_path / "recipes" / "toy"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: o\nlearning_rate: 1e-4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("llmrl.trainers.METHODS", {"toy": "toy_trainer"})
    yield tmp_path
    sys.modules.pop("toy_trainer", None)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(words) == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in text


def test_each_command_explains_itself(capsys: pytest.CaptureFixture[str]):
    for name in cli.COMMANDS:
        assert run([name, "--help"]) == 0
        assert f"llmrl {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chek"], "unknown command `chek`; did you mean `check`"),
        (["report"], "name one run directory"),
        (["report", "a", "b"], "name one run directory"),
        (["report", "/nonexistent/run"], "is not a run directory"),
        (["model"], "llmrl model smollm2"),
        (["model", "gpt2"], "`gpt2` is not one of smollm2"),
        (["check"], "name a recipe or a YAML file"),
        (["check", "--seed", "1"], "name a recipe or a YAML file"),
    ],
)
def test_a_mistake_is_one_message_and_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert run(words) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.err.startswith("refused: ")
    assert shown.out == ""


@pytest.mark.parametrize("name", ["toy", "recipes/toy", "recipes/toy/tiny.yaml"])
def test_check_takes_a_recipe_its_folder_or_a_file(recipe: Path, name: str, capsys: pytest.CaptureFixture[str]):
    assert run(["check", name]) == 0
    text = capsys.readouterr().out
    assert "ToyConfig with beta 0.1\n1,024 rows\n" in text
    assert "recipes/toy/tiny.yaml: no mistake found" in text
    assert not (recipe / "o").exists()


def test_check_takes_overrides_and_the_method_of_the_file(recipe: Path, capsys: pytest.CaptureFixture[str]):
    elsewhere = recipe / "mine.yaml"
    elsewhere.write_text("method: toy\n" + (recipe / "recipes/toy/tiny.yaml").read_text())
    assert run(["check", str(elsewhere), "--beta", "0.5"]) == 0
    assert "beta 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["toy", "--dataset_name", "bad.jsonl"], "row 6, column chosen"),
        (["toy", "--betta", "1"], "did you mean `beta`"),
        (["toyy"], "recipes here: toy"),
        (["nowhere.yaml"], "nowhere.yaml does not exist"),
        (["toy", "--output_dir", "/dev/null/x"], "output_dir /dev/null/x cannot be used"),
        (["toy", "--resume_from_checkpoint", "/nope"], "/nope"),
        (["toy", "--report_to", "aim"], "report_to names aim, but the package aim is not installed"),
    ],
)
def test_check_refuses_with_2(recipe: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    before = sorted(recipe.rglob("*"))
    assert run(["check", *words]) == 2
    assert sorted(p for p in recipe.rglob("*") if "__pycache__" not in p.parts) == before
    assert says in capsys.readouterr().err


def test_check_looks_at_the_rest_where_the_output_dir_is_taken(recipe: Path, capsys: pytest.CaptureFixture[str]):
    (recipe / "held").mkdir()
    (recipe / "held" / "config.yaml").write_text("method: toy\n")
    assert run(["check", "toy", "--output_dir", "held"]) == 2
    shown = capsys.readouterr()
    assert "1,024 rows\ndata, model, memory and disk: no mistake found" in shown.out
    assert "output_dir held already holds a run (config.yaml)" in shown.err
    assert run(["check", "toy", "--output_dir", "held", "--dataset_name", "bad.jsonl", "--report_to", "aim"]) == 2
    err = capsys.readouterr().err
    assert [word in err for word in ("output_dir held", "package aim", "row 6, column chosen")] == [True] * 3


def test_check_names_the_nearest_method(recipe: Path, capsys: pytest.CaptureFixture[str]):
    (recipe / "x.yaml").write_text("method: tooy\n")
    assert run(["check", "x.yaml"]) == 2
    assert "there is no method `tooy`; did you mean `toy`" in capsys.readouterr().err


def test_report_prints_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text("method: dpo\n")
    assert run(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()


def test_model_prints_the_folder_alone_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fetch(say: Callable[[str], None]) -> Path:
        say("fetching 98 MB")
        return Path("/cache/smollm2")

    monkeypatch.setattr("llmrl.models.BUNDLED", {"smollm2": fetch})
    assert run(["model", "smollm2"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "/cache/smollm2\n"
    assert "fetching 98 MB" in shown.err


def test_as_a_module_it_is_the_command():
    done = subprocess.run([sys.executable, "-m", "llmrl.cli", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.startswith("llmrl ")) == (0, True)
