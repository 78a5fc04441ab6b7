"""The studies of token credit and of search: what they plant, what they measure, and that their tables say it."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("kind", ["follow", "stand"])
def test_exactly_the_named_line_is_wrong_and_later_ones_follow_or_stand(kind: str) -> None:
    import credit

    cases = credit.planted(kind, 4)
    assert len(cases) == 20
    for case in cases:
        right, wrong = case.right.split("\n"), case.wrong.split("\n")
        assert right[: case.step] == wrong[: case.step]
        assert right[case.step] != wrong[case.step]
        assert (right[case.step + 1 :] == wrong[case.step + 1 :]) == (kind == "stand")


def test_held_out_problems_are_not_those_of_the_training_pairs() -> None:
    import credit

    lines = (ROOT / "data/arithmetic/pairs/train.jsonl").read_text().splitlines()
    trained = {json.loads(line)["chosen"][0]["content"] for line in lines}
    assert not trained & {case.right for case in credit.planted("follow", 40)}


@pytest.mark.parametrize(
    ("right", "wrong", "marked"),
    [
        ("7 + 6 = 13", "7 + 6 = 3", "........x"),
        ("40 + 20 = 60", "40 + 20 = 70", "..........x."),
        ("5 + 1 = 6", "6 + 1 = 7", "x.......x"),
        ("1 = 12", "1 = 1", "xxxxx"),
    ],
)
def test_the_wrong_characters_of_a_line(right: str, wrong: str, marked: str) -> None:
    import credit

    assert "".join(".x"[flag] for flag in credit.wrong_characters(right, wrong)) == marked


def answers(found: bool, auroc: float) -> list[dict[str, Any]]:
    one = {score: {"found": found, "auroc": auroc} for score in ("reward", "logprob", "reference_logprob")}
    return [{"lines": 4, "error": "off_by_one", **one} for _ in range(8)]


CONDITIONS = {"date": "2025-01-31", "machine": "two cores", "versions": "torch 1", "threads": 1, "load": 1.5}


def results(**of: dict[str, Any]) -> Any:
    import studies

    made = studies.Results(None)
    made.of |= of
    return made


def one_credit(found: bool) -> dict[str, Any]:
    return {"answers": answers(found, 0.75), "right_above_wrong": [True] * 8, "conditions": CONDITIONS}


def test_the_table_of_credit_says_what_was_measured() -> None:
    import credit

    text = credit.report(results(starter={"follow": one_credit(True)}))
    (row,) = [line for line in text.splitlines() if line.startswith("| starter") and "%" in line]
    assert "| 8 | 25% | 100% (68% to 100%) |" in row
    assert "0.75 (0.75 to 0.75)" in text
    assert "recipes/dpo/tiny.yaml" in text
    assert "2025-01-31. two cores; threads: 1; load average 1.5 to 1.5. torch 1." in text


def test_a_study_of_one_policy_keeps_the_other_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import credit
    import dpo_policies

    measured = []

    def measure(name: str, final: Path, per_level: int) -> dict[str, Any]:
        measured.append((name, per_level))
        return {kind: one_credit(name == "starter") for kind in credit.KINDS}

    monkeypatch.setattr(credit, "measured", measure)
    monkeypatch.setattr(dpo_policies, "policy", lambda name, folder: folder / name)
    kept, page = tmp_path / "results.json", tmp_path / "page.md"

    def study(*words: str) -> str:
        paths = ["--measurements", str(kept), "--document", str(page)]
        monkeypatch.setattr("sys.argv", ["credit.py", "--policies", *words, *paths])
        credit.main()
        return page.read_text()

    assert "SmolLM2" not in study("starter")
    assert "SmolLM2" in study("smollm2")
    assert "| 8 | 25% | 100%" in page.read_text()  # the starter's row is still there
    before = kept.read_text()
    study("starter", "smollm2")
    assert measured == [("starter", 80), ("smollm2", 24)]
    study("starter", "--quick")
    assert (measured[2:], kept.read_text()) == ([("starter", 2)], before)
    study("smollm2", "--again")
    assert measured[3:] == [("smollm2", 24)]


def test_the_table_and_picture_of_widths_say_what_was_measured() -> None:
    import beam_width

    def one(width: int, right: int, length: int) -> dict[str, Any]:
        same = {"ended": [True] * 10, "logprobs": [-1.0] * 10, "rewards": [0.5] * 10, "conditions": CONDITIONS}
        return {
            "by": "likelihood", "width": width, "correct": [i < right for i in range(10)],
            "lengths": [length, length + 2] * 5, **same,
        }  # fmt: skip

    label = beam_width.label
    done = results(starter={label("likelihood", 10): one(10, 8, 30), label("likelihood", 1): one(1, 5, 20)})
    text = beam_width.report(done, "picture.svg")
    rows = [line for line in text.splitlines() if line.startswith("| starter")]
    assert "| likelihood | 1 | 10 | 50.0% (24% to 76%) | - | 21.0 |" in rows[0]
    assert "| 10 | 10 | 80.0% (49% to 94%) | +30.0 (" in rows[1]
    drawn = ET.fromstring(beam_width.picture(done))
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "starter, by likelihood" in texts
    assert {"20", "40", "60", "80", "100", "bars: 95% intervals"} <= set(texts)  # accuracy's ticks are round
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 4


@pytest.mark.slow
def test_a_policy_that_is_its_own_reference_has_no_credit_and_searches_greedily(tmp_path: Path) -> None:
    import beam_width
    import credit

    from llmrl import models

    starter = Path(models.resolve("starter"))
    found = credit.measured("starter", starter, 2)
    for kind in ("follow", "stand"):
        scored = found[kind]["answers"]
        assert len(scored) == 10
        assert all(answer["reward"]["auroc"] == 0.5 for answer in scored)
        assert all(answer["logprob"] == answer["reference_logprob"] for answer in scored)
    assert sum(answer["logprob"]["found"] for answer in found["follow"]["answers"]) > 2
    (tmp_path / "starter").mkdir()
    (tmp_path / "starter" / "summary.json").write_text('{"status": "completed"}')
    (tmp_path / "starter" / "final").symlink_to(starter)
    study = beam_width.Study("starter", tmp_path, 6)
    greedy, wide = study.measured("likelihood", 1), study.measured("likelihood", 4)
    assert sum(wide["logprobs"]) > sum(greedy["logprobs"])
    assert any(greedy["correct"])
    assert set(wide["rewards"]) == {0.0}
