"""The examples of docs/environments.md are played, and its lists are complete."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl import envs
from llmrl.envs import calculator, number_guessing, question_answer, reasoning_tasks, wordle

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
OPTIONS = {
    "question_answer": question_answer.QuestionAnswerOptions,
    "number_guessing": number_guessing.NumberGuessingOptions,
    "wordle": wordle.WordleOptions,
    "calculator": calculator.CalculatorOptions,
    "reasoning_gym:TASK": reasoning_tasks.ReasoningOptions,
}


def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    block = next(text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"class {name}" in text)
    file = tmp_path / f"{name.lower()}.py"
    file.write_text(block)
    return file


def test_the_countdown_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Any) -> None:
    kind = envs.load(f"{example(tmp_path, monkeypatch, 'Countdown')}:Countdown", {"patience": "3"})
    assert kind.rows is not None
    train, test = kind.rows("train", 100, 0), kind.rows("test", 100, 0)
    assert train
    assert test
    assert not [row for row in train if row in test]
    answers = iter(["2", "x", "1", "0"])
    dialogue, rewards, done = play(kind.make({"start": 2}, 0), lambda _: next(answers))
    assert done
    assert rewards == {"mistakes": -1.0, "finished": 1.0}
    assert dialogue[4]["content"] == "No: 1."
    assert play(kind.make({"start": 2}, 0), lambda _: "5")[1:] == ({"mistakes": -3.0}, True)


def test_the_tool_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Any) -> None:
    kind = envs.load(f"{example(tmp_path, monkeypatch, 'Stock')}:Stock")
    call = {"type": "function", "function": {"name": "count", "arguments": {"item": "pens"}}}
    answers = iter([{"role": "assistant", "content": "", "tool_calls": [call]}, "There are 3 left"])
    dialogue, rewards, done = play(kind.make({"item": "pens", "left": 3}, 0), lambda _: next(answers))
    assert dialogue[2] == {"role": "tool", "name": "count", "content": "3"}
    assert (rewards, done) == ({"correct": 1.0}, True)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_environment_and_every_option_is_on_the_page(name: str) -> None:
    assert f"| `{name}` |" in PAGE
    section = PAGE.split(f"**{name}**", 1)[1].split("\n\n**")[0]
    for key in OPTIONS[name].model_fields:
        assert f"`{key}`" in section


def test_nothing_is_left_off_the_page() -> None:
    assert set(envs.BUILT_IN) == OPTIONS.keys() - {"reasoning_gym:TASK"}
