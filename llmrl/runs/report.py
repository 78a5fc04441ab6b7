"""`report.html`: one self-contained page about a run, whole, interrupted or failed.

Invariants: every word that comes from files is escaped, and the page forbids scripts and anything from the network by
its own policy as well; a file that is missing or torn leaves its part out and stops nothing.

`samples.json`, where a trainer writes it, is a list of `{"evaluation": name (optional), "prompt": text or messages,
"answer": text (optional), "completions": [{"label": "before", "text": text or messages, "correct": true | false |
null, "reward": number (optional)}, ...]}`; the page shows the first ones of each evaluation.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from llmrl.errors import RefusedError
from llmrl.files import write_text
from llmrl.runs.curves import Series, curve
from llmrl.runs.progress import clock
from llmrl.runs.report_data import (
    Measured,
    RunData,
    Sample,
    before_after,
    evaluation_panels,
    number,
    read_run,
    says_little,
    training_panels,
)
from llmrl.runs.report_style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SHOWN_PANELS = 12
DASH_STROKES = ("", "5 2", "1.5 1.5", "7 2 1.5 2")


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` and returns it. Raises RefusedError where there is no run."""
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "evals.json", "summary.json")):
        raise RefusedError(
            f"{run_dir} is not a run directory: it has none of config.yaml, metrics.jsonl, evals.json, summary.json. "
            "Give the output_dir of a run"
        )
    page = run_dir / "report.html"
    write_text(page, page_text(read_run(run_dir)))
    return page


def page_text(run: RunData) -> str:
    """The page as HTML."""
    title = run.directory.resolve().name
    parts = (
        _header(run, title),
        _stages(run.stages),
        _evaluations(run),
        _curves(run),
        _samples(run.samples),
        _background(run),
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}"
        f"<footer>{escape(str(run.directory))}</footer></main></body></html>\n"
    )


def _header(run: RunData, title: str) -> str:
    summary = run.summary
    status = str(summary.get("status", ""))
    shown = status if status in ("completed", "interrupted", "failed") else "no end recorded (running, or killed)"
    steps = summary.get("steps", run.lines[-1]["step"] if run.lines else None)
    tokens = summary.get("num_tokens", run.lines[-1].get("num_tokens") if run.lines else None)
    seconds = number(summary.get("seconds"))
    settings = dict(line.split(": ", 1) for line in run.config.splitlines() if ": " in line and line[:1].isalpha())
    facts = {
        "method": settings.get("method"),
        "model": settings.get("model_name_or_path"),
        "data": settings.get("dataset_name"),
        "steps": _count(steps),
        "tokens": _count(tokens),
        "time": None if seconds is None else clock(seconds),
        "started": run.environment.get("time"),
    }
    entries = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in facts.items()
        if value is not None
    )
    reason = f'<p class="reason">{escape(str(summary["reason"]))}</p>' if summary.get("reason") else ""
    badge = f'<span class="status {escape(status) or "unknown"}">{escape(shown)}</span>'
    return f'<header><h1>{escape(title)}</h1>{badge}</header>{reason}<dl class="facts">{entries}</dl>'


def _stages(stages: list[tuple[str, Measured]]) -> str:
    """The accuracy after each stage of a job that has several, in their order."""
    rows = "".join(
        f'<tr><td>{escape(label)}</td><td class="number">{_cell("accuracy", accuracy)}</td>'
        f'<td class="range">{_range(accuracy, None)}</td></tr>'
        for label, accuracy in stages
    )
    head = '<th>stage</th><th class="number">accuracy</th><th>95% interval</th>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>Stages</h2><div class="card scroll">{table}</div>' if rows else ""


def _evaluations(run: RunData) -> str:
    rows = before_after(run.evaluations)
    if not rows:
        return '<h2>Before and after</h2><p class="card empty">No evaluation was recorded.</p>'
    ranged = any(m is not None and m[1].low is not None for _, _, first, last in rows for m in (first, last))
    body = "".join(_evaluation_row(*row, ranged=ranged) for row in rows)
    head = "<th>evaluation</th><th>metric</th>" + "".join(
        f'<th class="number">{t}</th>' for t in ("before", "after", "change")
    )
    head += "<th>intervals: before above, after below</th>" if ranged else ""
    return (
        f'<h2>Before and after</h2><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _evaluation_row(
    name: str, key: str, first: tuple[int, Measured], last: tuple[int, Measured] | None, ranged: bool
) -> str:
    before, after = first[1], last[1] if last else None
    change = "" if after is None else _change(key, before.value, after.value)
    cells = "".join(
        f'<td class="number">{cell}</td>' for cell in (_cell(key, before), _cell(key, after) if after else "", change)
    )
    picture = f'<td class="range">{_range(before, after)}</td>' if ranged else ""
    return f"<tr><td>{escape(name)}</td><td>{escape(key)}</td>{cells}{picture}</tr>"


def _cell(key: str, measured: Measured) -> str:
    if measured.low is None or measured.high is None:
        return _value(key, measured.value)
    count = f", n = {measured.n}" if measured.n else ""
    low, high = (_value(key, end).removesuffix("%") for end in (measured.low, measured.high))
    return f'{_value(key, measured.value)} <span class="interval">({low} to {high}{count})</span>'


def _range(before: Measured, after: Measured | None) -> str:
    """Both intervals on one axis from 0 to 1 (or as wide as they need)."""
    shown = [m for m in (before, after) if m is not None and m.low is not None and m.high is not None]
    if not shown:
        return ""
    least = min(0.0, *(m.low for m in shown if m.low is not None))
    most = max(1.0, *(m.high for m in shown if m.high is not None))

    def x(value: float | None) -> str:
        return f"{5 + 190 * ((value or 0.0) - least) / (most - least):.1f}"

    marks = [f'<line x1="5" x2="195" y1="{y}" y2="{y}" stroke="var(--faint)"/>' for y in (9, 21)]
    for measured, y, color in ((before, 9, "var(--soft)"), (after, 21, "var(--series-1)")):
        if measured in shown and measured is not None:
            marks.append(
                f'<line x1="{x(measured.low)}" x2="{x(measured.high)}" y1="{y}" y2="{y}" stroke="{color}" '
                'stroke-width="2.5" stroke-linecap="round"/>'
                f'<circle cx="{x(measured.value)}" cy="{y}" r="4" fill="{color}"/>'
            )
    return f'<svg viewBox="0 0 200 30" role="img" aria-label="intervals">{"".join(marks)}</svg>'


def _curves(run: RunData) -> str:
    training = training_panels(run.lines)
    over_time = evaluation_panels(run.evaluations)
    if not training:
        return '<h2>Training</h2><p class="card empty">No step was logged.</p>' + _grid(
            "Evaluations over time", over_time
        )
    telling = [title for title, series in training.items() if not says_little(title, series)]
    shown = {title: training[title] for title in telling[:SHOWN_PANELS]}
    rest = {title: series for title, series in training.items() if title not in shown}
    more = "".join(_figure(title, series) for title, series in rest.items())
    more = f'<details class="card"><summary>{len(rest)} more metrics</summary><div class="grid">{more}</div></details>'
    return _grid("Training, by step", shown) + (more if rest else "") + _grid("Evaluations over time", over_time)


def _grid(title: str, panels: dict[str, list[Series]]) -> str:
    figures = "".join(_figure(name, series) for name, series in panels.items())
    return f'<h2>{escape(title)}</h2><div class="grid">{figures}</div>' if panels else ""


def _figure(title: str, series: list[Series]) -> str:
    keys = last = ""
    if len(series) > 1:
        keys = "".join(
            f'<span class="key"><svg viewBox="0 0 22 8"><line x1="1" x2="21" y1="4" y2="4" '
            f'stroke="var(--series-{i + 1})" stroke-width="2.4" stroke-dasharray="{dash}"/></svg>'
            f"{escape(line.label)}</span>"
            for i, (line, dash) in enumerate(zip(series, DASH_STROKES, strict=False))
        )
    else:
        last = f'<span class="last">{_value(title, series[0].values[-1])}</span>'
    return f'<figure class="card"><figcaption>{escape(title)}{keys}{last}</figcaption>{curve(series)}</figure>'


def _samples(samples: list[Sample]) -> str:
    cards = []
    for sample in samples:
        answer = (
            f' <span class="interval">(answer: {escape(sample.answer)})</span>' if sample.answer is not None else ""
        )
        columns = "".join(_completion(*completion) for completion in sample.completions)
        cards.append(
            f'<div class="card sample"><p class="prompt">{escape(sample.prompt)}{answer}</p>'
            f'<div class="answers">{columns}</div></div>'
        )
    return f"<h2>Samples</h2>{''.join(cards)}" if cards else ""


def _completion(label: str, text: str, right: bool | None) -> str:
    verdict = {True: ' <span class="right">✓ right</span>', False: ' <span class="wrong">✗ wrong</span>', None: ""}[
        right
    ]
    return f'<div><h3>{escape(label)}{verdict}</h3><div class="text">{escape(text) or "(nothing)"}</div></div>'


def _background(run: RunData) -> str:
    """Configuration, environment, notes and the error, folded away except the error."""
    environment = json.dumps(run.environment, indent=1, ensure_ascii=False) if run.environment else ""
    texts = (("Error", run.error), ("Notes", run.notes), ("Configuration", run.config), ("Environment", environment))
    shown = "".join(
        f'<details class="card"{" open" if name == "Error" else ""}><summary>{name}</summary>'
        f"<pre>{escape(text)}</pre></details>"
        for name, text in texts
        if text
    )
    return f"<h2>Background</h2>{shown}" if shown else ""


def _value(key: str, value: float) -> str:
    if "accurac" in key and 0 <= value <= 1:
        return f"{100 * value:.1f}%"
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def _change(key: str, before: float, after: float) -> str:
    if before == after:
        return "0"
    if _value(key, before).endswith("%") and _value(key, after).endswith("%"):
        return f"{100 * (after - before):+.1f} points"
    return f"{after - before:+.4g}"


def _count(value: Any) -> str | None:
    counted = number(value)
    return None if counted is None else f"{int(counted):,}"
