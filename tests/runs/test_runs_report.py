"""The page: what it shows, that it is inert, and that no state of a run directory breaks it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.errors import RefusedError
from llmrl.runs.curves import MOST_POINTS, Series, curve, smoothed, thinned
from llmrl.runs.report import write_report
from llmrl.runs.report_data import before_after, evaluation_panels, read_run, training_panels

EVIL = "</pre></td><script>alert('x')</script><img src=x onerror=alert(1)>\"'$x_1$"
VOID = {"meta", "img", "br", "path", "use", "line", "circle", "rect", "link", "input", "hr"}


class Checker(HTMLParser):
    """Collects tags and attributes, and makes sure that what is opened is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(directory: Path) -> Checker:
    """The page, parsed, after the checks that every page must pass."""
    checker = Checker()
    checker.feed(write_report(directory).read_text(encoding="utf-8"))
    assert checker.open == []
    assert not checker.tags & {"script", "img", "iframe", "object", "link", "a", "form"}
    for name, value in checker.attributes:
        assert not name.startswith("on"), name
        assert name not in ("src", "action", "formaction"), (name, value)
        assert "href" not in name or value.startswith("#"), (name, value)
        assert not re.search(r"url\((?!#)", value), value
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in checker.attributes
    return checker


def a_run(directory: Path, steps: int = 60, name: str = "loss", **summary: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": s, name: 1 / s, "grad_norm": 1.0, "learning_rate": 1e-4, "num_tokens": 10 * s,
         "rewards/chosen": 0.1 * s, "rewards/rejected": -0.1 * s, "rewards/margins": 0.2 * s, "rewards/accuracies": 0.5}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"accuracy": 0.13, "interval_low": 0.08, "interval_high": 0.2, "n": 200}
    after = {"accuracy": 0.52, "interval_low": 0.45, "interval_high": 0.59, "n": 200}
    evaluations = [
        (0, "task", task),
        (0, "heldout", {"loss": 0.69}),
        (steps, "task", after),
        (steps, "heldout", {"loss": 0.4}),
    ]
    items = [{"step": step, "name": label, "metrics": metrics} for step, label, metrics in evaluations]
    (directory / "evals.json").write_text(json.dumps(items))
    (directory / "config.yaml").write_text("method: dpo\nmodel_name_or_path: starter\nbeta: 0.1\n")
    if summary:
        (directory / "summary.json").write_text(
            json.dumps({"steps": steps, "seconds": 75.2, "num_tokens": 600, **summary})
        )
    return directory


def test_a_whole_run_shows_its_facts_its_gain_and_its_curves(tmp_path: Path):
    found = page(a_run(tmp_path / "my-run", status="completed"))
    for text in ("my-run", "completed", "dpo", "starter", "60", "600", "1:15", "rewards/margins", "learning_rate"):
        assert text in found.text
    assert "13.0% (8.0 to 20.0, n = 200)" in found.text
    assert "52.0% (45.0 to 59.0, n = 200)" in found.text
    assert "+39.0 points" in found.text
    assert "-0.29" in found.text
    assert "chosen" in found.text
    assert "svg" in found.tags


@pytest.mark.parametrize(
    ("key", "interval", "shown"),
    [("reward", "reward_interval", "0.5 (0.25 to 0.75, n = 6)"),
     ("rewards/accuracies", "accuracy_interval", "50.0% (25.0 to 75.0, n = 6)")],
)  # fmt: skip
def test_an_interval_is_shown_with_its_metric_and_not_as_one_of_its_own(
    tmp_path: Path, key: str, interval: str, shown: str
):
    metrics = {key: 0.5, f"{interval}_low": 0.25, f"{interval}_high": 0.75, "n": 6.0, "right": 0.5}
    items = [{"step": step, "name": "heldout", "metrics": metrics} for step in (0, 2)]
    (tmp_path / "evals.json").write_text(json.dumps(items))
    text = page(tmp_path).text
    assert shown in text
    assert "interval_low" not in text


def test_samples_stand_side_by_side(tmp_path: Path):
    directory = a_run(tmp_path / "run", status="completed")
    sample = {
        "prompt": [{"role": "user", "content": "What is 2+2?"}],
        "answer": "4",
        "completions": [
            {"label": "before", "text": "5", "correct": False},
            {"label": "after", "text": "2+2=4", "correct": True},
            {"label": "unjudged", "text": ""},
        ],
    }
    (directory / "samples.json").write_text(json.dumps([sample, {"prompt": "plain", "completions": {"only": "text"}}]))
    text = page(directory).text
    assert "What is 2+2? (answer: 4)" in text
    assert "before ✗ wrong" in text
    assert "after ✓ right" in text
    assert "(nothing)" in text
    assert "user:" not in text


def test_nothing_that_a_model_or_a_file_says_is_alive(tmp_path: Path):
    directory = a_run(tmp_path / "<script>run", name=f"loss{EVIL}", status=f"odd{EVIL}", reason=EVIL)
    (directory / "samples.json").write_text(
        json.dumps([{"prompt": EVIL, "answer": EVIL, "completions": [{"label": EVIL, "text": EVIL, "correct": True}]}])
    )
    evaluations = [{"step": s, "name": EVIL, "metrics": {EVIL: 0.1, "accuracy": 0.5}} for s in (0, 1)]
    (directory / "evals.json").write_text(json.dumps(evaluations))
    (directory / "config.yaml").write_text(f"method: {EVIL}\n")
    (directory / "environment.json").write_text(json.dumps({"time": EVIL, EVIL: EVIL}))
    (directory / "notes.log").write_text(EVIL)
    found = page(directory)
    assert found.text.count("alert('x')") >= 8


def test_a_failed_run_shows_why(tmp_path: Path):
    directory = a_run(tmp_path / "run", status="failed", reason="RunFailedError: the disk is full")
    (directory / "error.log").write_text("Traceback (most recent call last):\n  No space left on device\n")
    text = page(directory).text
    assert "RunFailedError: the disk is full" in text
    assert "No space left on device" in text


def test_an_old_error_is_not_shown_for_a_run_that_completed(tmp_path: Path):
    directory = a_run(tmp_path / "run", status="completed")
    (directory / "error.log").write_text("Traceback of an earlier attempt")
    assert "earlier attempt" not in page(directory).text


def test_a_run_that_was_killed_has_no_end(tmp_path: Path):
    directory = a_run(tmp_path / "run")
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "lo')
    text = page(directory).text
    assert "no end recorded (running, or killed)" in text
    assert "60" in text


def test_one_file_is_enough_and_none_is_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("method: dpo\n")
    text = page(tmp_path / "a").text
    assert "No evaluation was recorded" in text
    assert "No step was logged" in text
    with pytest.raises(RefusedError, match="is not a run directory"):
        write_report(tmp_path / "nowhere")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=12,
)
MEASURED = ["step", "name", "metrics", "loss", "accuracy", "interval_low", "interval_high", "n"]
SAID = ["prompt", "completions", "label", "text", "correct", "answer", "status", "reason", "steps", "seconds"]
KEYS = st.sampled_from([*MEASURED, *SAID])
SHAPED = st.one_of(JSON, st.dictionaries(KEYS, JSON), st.lists(st.dictionaries(KEYS, JSON), max_size=3))


@settings(max_examples=40, deadline=None)
@given(summary=SHAPED, evals=SHAPED, samples=SHAPED, environment=SHAPED, lines=st.lists(SHAPED, max_size=4))
def test_no_content_of_the_files_breaks_the_page(
    tmp_path_factory: pytest.TempPathFactory, summary: Any, evals: Any, samples: Any, environment: Any, lines: list[Any]
):
    directory = tmp_path_factory.mktemp("run")
    for name, value in (("summary", summary), ("evals", evals), ("samples", samples), ("environment", environment)):
        (directory / f"{name}.json").write_text(json.dumps(value))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page(directory)


# ---- the parts


def test_chosen_and_rejected_share_a_panel_and_the_loss_comes_first():
    lines = [
        {"step": s, "zeta": 1.0, "logps/rejected": 1.0, "logps/chosen": 2.0, "loss": 0.5, "num_tokens": 3}
        for s in (1, 2)
    ]
    panels = training_panels(lines)
    assert list(panels) == ["loss", "logps", "zeta"]
    assert [series.label for series in panels["logps"]] == ["rejected", "chosen"]


def test_a_method_that_samples_shows_its_rewards_and_folds_what_is_0_or_timing_away(tmp_path: Path):
    always_0 = ["rewards/right/no_score", "verifier/killed", "reward", "loss"]
    timing = ["rewards/right/seconds", "rollout_seconds", "sampled_tokens_per_second"]
    telling = ["ratio/mean", "completions/clipped_ratio", "frac_reward_zero_std", "rewards/right/mean", "grad_norm"]
    line = dict.fromkeys(always_0, 0.0) | dict.fromkeys([*timing, *telling], 0.5)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, **line}) + "\n" for s in (1, 2)))
    shown, folded = page(tmp_path).text.split("5 more metrics")
    found = {name: shown.index(name) for name in [*telling, "loss"]}
    assert sorted(found, key=found.__getitem__) == [
        "rewards/right/mean", "frac_reward_zero_std", "completions/clipped_ratio", "loss", "ratio/mean", "grad_norm"
    ]  # fmt: skip
    assert next(iter(training_panels([{"step": 1, **line}]))) == "reward"
    for name in ["rewards/right/no_score", "verifier/killed", *timing]:
        assert name in folded
        assert name not in shown


def test_null_values_leave_a_gap_and_no_panel_of_their_own():
    panels = training_panels([{"step": 1, "loss": None, "x": None}, {"step": 2, "loss": 0.5, "x": None}])
    assert panels["loss"] == [Series("loss", [2.0], [0.5])]
    assert "x" not in panels


def test_before_and_after_are_the_first_and_the_last(tmp_path: Path):
    directory = tmp_path / "run"
    directory.mkdir()
    items = [{"step": s, "name": "task", "metrics": {"accuracy": s / 10, "interval": [0, 1]}} for s in (4, 0, 2)]
    (directory / "evals.json").write_text(json.dumps([*items, {"step": 4, "name": "late", "metrics": {"x": 1}}]))
    rows = before_after(read_run(directory).evaluations)
    assert [(name, key, first[0], first[1].value, last and last[1].value) for name, key, first, last in rows] == [
        ("task", "accuracy", 0, 0.0, 0.4),
        ("late", "x", 4, 1.0, None),
    ]
    assert list(evaluation_panels(read_run(directory).evaluations)) == ["task: accuracy"]


def test_smoothing_keeps_a_constant_and_the_length():
    assert smoothed([2.0] * 50, 7) == pytest.approx([2.0] * 50)
    assert smoothed([0.0, 3.0, 6.0], 2) == pytest.approx([1.5, 3.0, 4.5])
    assert len(smoothed([1.0] * 3, 99)) == 3


def test_long_curves_are_thinned_by_means():
    steps, values = thinned([float(s) for s in range(10_000)], [float(s % 2) for s in range(10_000)])
    assert len(steps) == len(values) <= MOST_POINTS
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [1e300, -1e300], [0.0] * 100, [1e-12, 2e-12, 3e-12]], ids=str)
def test_any_values_can_be_drawn_in_the_pages_colours(values: list[float]):
    svg = curve([Series("a", [float(i) for i in range(len(values))], values), Series("b", [0.0], [0.0])])
    assert svg.startswith("<svg role=")
    assert "var(--series-1)" in svg
    assert "#0303" not in svg
    assert "<metadata" not in svg
    assert "http" not in svg.replace("http://www.w3.org", "")
