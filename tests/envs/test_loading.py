"""From a name to an environment, and every mistake on the way named."""

import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl import envs
from llmrl.errors import RefusedError

OWN = """
from dataclasses import dataclass

import neighbour_of_echo


@dataclass
class Note:
    text: str


class Echo:
    def __init__(self, row, seed, times: int = 1, loud: bool = False):
        self.note = Note(row["word"] * times)
        self.types = type(times), type(loud)

    def init(self):
        return [{"role": "user", "content": self.note.text}]

    async def step(self, message):
        return [], True, {"same": float(message["content"] == self.note.text)}

    def close(self):
        pass

    @classmethod
    def rows(cls, split, count, seed):
        return [{"word": neighbour_of_echo.WORD, "n": n} for n in range(count)]


class Silent:
    def __init__(self, row, seed):
        pass

    def init(self):
        return []


def make(row, seed):
    return Echo(row, seed)


VALUE = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_echo.py").write_text("WORD = 'ab'\n")
    path = tmp_path / "echo.py"
    path.write_text(OWN)
    return path


def test_a_class_in_a_file_with_typed_options_and_rows(file: Path, play: Any) -> None:
    before = list(sys.path)
    kind = envs.load(f"{file}:Echo", {"times": "2", "loud": "true"})
    assert kind.rows is not None
    row = kind.rows("train", 3, 0)[2]
    environment = kind.make(row, 7)
    assert environment.types == (int, bool)  # type: ignore[attr-defined]
    assert play(environment, lambda dialogue: dialogue[0]["content"])[1:] == ({"same": 1.0}, True)
    assert sys.path == [*before, str(file.parent)]
    envs.load(f"{file}:Echo")
    assert sys.path == [*before, str(file.parent)]
    assert "echo" not in sys.modules


def test_a_factory_and_a_module(file: Path, play: Any) -> None:
    kind = envs.load(f"{file}:make")
    assert kind.rows is None
    assert play(kind.make({"word": "x"}, 0), lambda _: "x")[1] == {"same": 1.0}
    sys.path.append(str(file.parent))
    try:
        assert envs.load("echo:Echo").make({"word": "x"}, 0)
    finally:
        sys.modules.pop("echo", None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("number_gessing", {}, "did you mean `number_guessing`"),
        ("", {}, "unknown environment"),
        ("FILE:", {}, "unknown environment"),
        ("FILE:Eco", {}, "has no class `Eco`; did you mean `Echo`"),
        ("FILE:VALUE", {}, "has no class `VALUE`"),
        ("FILE:Silent", {}, "has no method `step`"),
        ("FILE:Echo", {"time": 2}, r"`environment_options.time` of .*Echo; did you mean `times`"),
        ("FILE:Echo", {"times": "two"}, r"`environment_options.times` of .*valid integer"),
        ("FILE:make", {"times": 2}, "`environment_options.times`"),
        ("no/such/file.py:Echo", {}, "does not exist"),
        ("FOLDER/ech.py:Echo", {}, r"ech.py does not exist; .* has echo.py"),
        ("no_such_package.envs:Echo", {}, "no module named `no_such_package`"),
        ("number_guessing", {"numbrs": 3}, "`environment_options.numbrs` of number_guessing; did you mean `numbers`"),
        ("number_guessing", {"numbers": 1}, "`environment_options.numbers`"),
        ("number_guessing", {"wording": "short"}, "`environment_options.wording`"),
        ("wordle", {"guesses": 0}, "`environment_options.guesses`"),
        ("question_answer", {"prompt_column": None}, "`environment_options.prompt_column`"),
        ("calculator", {"max_calls": -1}, "`environment_options.max_calls`"),
    ],
)
def test_mistakes_are_named(file: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        envs.load(name.replace("FILE", str(file)).replace("FOLDER", str(file.parent)), options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(:\n", r"broken.py, line 2: SyntaxError"),
        ("x = 1\n\ny = 1 / 0\n", r"broken.py, line 3: ZeroDivisionError"),
        ("import no_such_module\n", r"broken.py, line 1: ModuleNotFoundError.*no_such_module"),
        ("from llmrl.envs.tools import ToolEnvironment\nclass A(ToolEnvironment):\n    def f(self): pass\n",
         r"broken.py, line 2: TypeError: the tool f has no docstring"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_imported_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(RefusedError, match=message):
        envs.load(f"{path}:A")


def test_a_required_option_and_empty_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "needs.py"
    path.write_text(
        "class Needs:\n"
        "    def __init__(self, row, seed, *, size): pass\n"
        "    def init(self): return []\n    def step(self, message): return []\n    def close(self): pass\n"
        "    @staticmethod\n    def rows(split, count, seed): return []\n"
    )
    with pytest.raises(RefusedError, match=r"needs the option `environment_options\.size`"):
        envs.load(f"{path}:Needs")
    rows = envs.load(f"{path}:Needs", {"size": 1}).rows
    assert rows is not None
    with pytest.raises(RefusedError, match="at least one"):
        rows("test", 2, 0)


def test_two_files_of_one_name_are_two_modules(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "echo.py"
    other.parent.mkdir()
    other.write_text(OWN.replace('"same"', '"equal"').replace("import neighbour_of_echo\n", ""))
    first, second = envs.load(f"{file}:Echo").make({"word": ""}, 0), envs.load(f"{other}:Echo").make({"word": ""}, 0)
    assert type(first).__module__ != type(second).__module__


def test_environments_say_whether_an_episode_takes_several_messages(tmp_path: Path) -> None:
    said = {name: envs.load(name).multi_turn for name in ("calculator", "number_guessing", "question_answer", "wordle")}
    assert said == {"calculator": True, "number_guessing": True, "question_answer": False, "wordle": True}
    single = {"calculator": {"max_calls": "0"}, "number_guessing": {"guesses": "1"}, "wordle": {"guesses": "1"}}
    assert not any(envs.load(name, options).multi_turn for name, options in single.items())
    methods = "".join(f"    def {name}(self, *message): pass\n" for name in ("init", "step", "close"))
    for line, expected in (("multi_turn = True", True), ("multi_turn = False", False), ("other = 1", False)):
        file = tmp_path / f"own_{line[:3]}{expected}.py"
        file.write_text(f"class Own:\n    {line}\n    def __init__(self, row, seed): pass\n{methods}")
        assert envs.load(f"{file}:Own").multi_turn is expected
