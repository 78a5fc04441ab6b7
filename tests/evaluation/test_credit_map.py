"""The map in the terminal and as a page, and what the command refuses."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.models import make_tiny_model
from support.words import word_tokenizer

from llmrl.cli import run
from llmrl.data.steps import LINES
from llmrl.evaluation.credit.answer import Credit
from llmrl.evaluation.credit.numbers import Pair, Scale, summary, visible
from llmrl.evaluation.credit.page import page
from llmrl.evaluation.credit.terminal import show

EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'\x1b[31m"
FACTS = {"model": EVIL, "reference": "r"}


def credit(words: list[str], rewards: list[float]) -> Credit:
    """An answer of these tokens with these rewards at beta 1; the last ends it."""
    ends = np.cumsum([len(word) for word in words]).tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    mine = np.array(rewards, np.float32) - 1
    return Credit("".join(words), np.arange(len(words)), spans, mine, np.full(len(words), -1, np.float32), 1.0, True)


def pairs() -> list[Pair]:
    return [
        Pair(7, EVIL, credit(["1=1", "\n", "ok", "<e>"], [0.5, 0.0, 0.25, 0.0]),
             credit(["1=2", "\n", EVIL, "<e>"], [-2.0, 0.5, 0.125, 0.0])),
        Pair(9, "twice", credit(["a", "<e>"], [-0.25, 0.0]), credit(["b", "<e>"], [0.25, 0.0])),
    ]  # fmt: skip


DRIFT = np.array([-0.5, -0.25], np.float32)


def test_the_summary_by_hand() -> None:
    numbers = summary(pairs(), DRIFT)
    assert numbers["rewards/chosen"] == pytest.approx((0.75 - 0.25) / 2)
    assert numbers["rewards/rejected"] == pytest.approx((-1.375 + 0.25) / 2)
    assert numbers["rewards/margins"] == pytest.approx((2.125 - 0.5) / 2)
    assert numbers["rewards/accuracies"] == 0.5
    assert numbers["rewards/chosen_per_token"] == pytest.approx(0.5 / 6)
    assert numbers["reference_drift"] == -0.375
    assert (numbers["accuracy_interval_low"] < 0.5 < numbers["accuracy_interval_high"], numbers["n"]) == (True, 2)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_inert_and_says_everything() -> None:
    shown = Page(page(pairs(), FACTS, summary(pairs(), DRIFT), LINES))
    assert not set(shown.tags) & {"script", "img", "a", "link", "iframe", "form"}
    names = {name for name, _ in shown.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in shown.attributes
    assert shown.text.count("<script>alert(1)</script>") == 4  # model, prompt, token, table of tokens
    assert "chosen reward +0.75 over 4 tokens" in shown.text
    assert "rejected reward -1.38 over 4 tokens" in shown.text
    hints = [value for name, value in shown.attributes if name == "title"]
    assert "reward -2.00 · log pi -3.000 · log pi_ref -1.000 · so far -2.00" in hints
    colours = [value for name, value in shown.attributes if name == "style"]
    assert "background:rgba(213,94,0,0.75)" in colours  # the lowest of all tokens, in full
    assert shown.text.count("◂ lowest") == 2  # of four answers: the two whose lowest step is below 0
    assert "1 ◂ lowest" in shown.text


def printed(width: int = 60, **options: object) -> str:
    stream = io.StringIO()
    show(pairs(), summary(pairs(), DRIFT), LINES, Console(file=stream, width=width, **options))  # type: ignore[arg-type]
    return stream.getvalue()


def test_the_terminal_without_colours_has_all_numbers() -> None:
    text = printed(color_system=None)
    assert "\x1b" not in text
    lines = text.splitlines()
    at = lines.index("rejected: reward -1.38 over 4 tokens")
    assert lines[at + 1].split() == ["1◂", "-1.50", "1=2", "↵"]
    assert lines[at + 2].split() == ["-2.00", "+0.50"]
    assert lines[at + 2].index("-2.00") == lines[at + 1].index("1=2")
    assert "chosen above rejected in 50%" in text


def test_the_terminal_with_colours_has_the_same_text() -> None:
    text = printed(force_terminal=True, color_system="truecolor")
    assert "\x1b[30;48;2;" in text or "\x1b[37;48;2;" in text
    without = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert without == printed(color_system=None)


def test_a_narrow_terminal_breaks_steps_and_loses_nothing() -> None:
    narrow, wide = (re.sub(r"\s+", "", printed(width, color_system=None)) for width in (20, 500))
    assert sorted(narrow) == sorted(wide)


@pytest.mark.parametrize(("largest", "digits"), [(3.0, 2), (0.02, 3), (0.0, 2), (0.0004, 5)])
def test_the_digits_follow_the_largest_reward(largest: float, digits: int) -> None:
    only = credit(["a", "b"], [largest, 0.0])
    assert Scale.of([Pair(1, "p", only, only)]).digits == digits


def test_control_characters_and_blanks_are_made_visible() -> None:
    assert visible("a\n\t\x1b ") == "a↵→\\x1b␣"


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("credit")
    for name, seed in (("policy", 0), ("reference", 1)):
        make_tiny_model(seed=seed).save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)
    rows = [
        {"prompt": "the cat", "chosen": " sees a dog", "rejected": " likes red"},
        {"prompt": "the cat", "chosen": " sees", "rejected": "  "},
        {"prompt": "one", "chosen": " two", "rejected": " three " * 300},
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "mine.py").write_text("def halves(text):\n    return [text[:3], text[4:]]\n")
    (root / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return {path.stem: str(path) for path in root.iterdir()} | {"root": str(root)}


def command(files: dict[str, str], *words: str) -> list[str]:
    given = [word.format(**files) for word in words]
    base = {"--model": files["policy"], "--reference": files["reference"], "--data": files["pairs"], "--rows": "1"}
    return ["credit", *(part for key, value in base.items() if key not in given for part in (key, value)), *given]


def test_the_command_shows_the_rows(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(files)) == 0
    text = capsys.readouterr().out
    assert "row 1: the cat" in text
    assert "sees" in text
    assert "reference drift -" in text


def test_the_command_writes_a_page(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(files, "--output", str(tmp_path / "map.html"))) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "map.html")
    assert "sees" in Page((tmp_path / "map.html").read_text()).text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--reference", "null"], "is a whole model and there is no reference"),
        (
            ["--model", "nobody/nothere", "--reference", "null"],
            "model: the model configuration of nobody/nothere cannot be loaded",
        ),
        (["--rows", "1,4"], "has 3 rows, so there is no row 4"),
        (["--rows", "0"], "key `rows`: expected a list (a whole number at least 1 each)"),
        (["--rows", "2"], "pairs.jsonl, row 2, column `rejected`: an empty completion"),
        (["--rows", "1,3"], "pairs.jsonl, row 3, answer 2: 30"),
        (["--data", "{other}"], "no column `chosen`"),
        (["--data", "{root}/nothing.jsonl"], "no such file"),
        (["--model", "{root}"], "model: the folder"),
        (["--beta", "0"], "key `beta`: expected a number greater than 0"),
        (["--step_delimiter", "("], "step_delimiter '(' is no regular expression"),
        (["--step_delimiter", "x*"], "matches the empty text"),
        (["--step_function", "{root}/mine.py:halves"], "mine.py:halves must give the "),
        (["--step_function", "{root}/mine.py:halves", "--step_delimiter", "x"], "leave step_delimiter out"),
        (["--output", "{root}"], "cannot be written"),
        (["--modle", "x"], "did you mean `model`"),
    ],
)
def test_the_command_refuses_with_2(
    files: dict[str, str], words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(files, *words)) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""
