"""What a report shows, read from a run directory that may be unfinished, torn, or from a killed process.

Invariant: whatever the files hold, reading them raises nothing; what is missing or not a number is left out.
"""

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmrl.files import read_json, read_lines
from llmrl.runs.curves import Series

FIRST = (
    "reward",
    "rewards/*/mean",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards",
    "logps",
    "entropy",
    "kl",
    "approx_kl",
    "clip_ratio/region_mean",
    "ratio/mean",
    "values/squared_error",
    "updates",
    "grad_norm",
    "learning_rate",
)
SAMPLES_SHOWN = 12
TIMING = ("seconds", "per_second")
NOT_CURVES = ("step", "num_tokens", "epoch")
PAIRED = ("/chosen", "/rejected")
OTHER_INTERVALS = {
    "accuracy": [("interval_low", "interval_high")],
    "rewards/accuracies": [("accuracy_interval_low", "accuracy_interval_high")],
}


@dataclass(frozen=True)
class Measured:
    """A value with its interval, where it has one, and how many rows it stands on."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt and what was answered: (label, text, right or wrong or unknown)."""

    prompt: str
    answer: str | None
    completions: list[tuple[str, str, bool | None]]


@dataclass(frozen=True)
class RunData:
    """Everything that the page is made from."""

    directory: Path
    summary: dict[str, Any]
    environment: dict[str, Any]
    config: str
    lines: list[dict[str, Any]]
    evaluations: list[tuple[int, str, dict[str, Measured]]]
    samples: list[Sample]
    stages: list[tuple[str, Measured]]
    notes: str
    error: str


def read_run(directory: Path) -> RunData:
    """Reads what is there."""
    status = read_json(directory / "summary.json", {})
    environment = read_json(directory / "environment.json", {})
    summary = status if isinstance(status, dict) else {}
    return RunData(
        directory=directory,
        summary=summary,
        environment=environment if isinstance(environment, dict) else {},
        config=_text(directory / "config.yaml"),
        lines=[line for line in read_lines(directory / "metrics.jsonl") if number(line.get("step")) is not None],
        evaluations=_evaluations(read_json(directory / "evals.json", [])),
        samples=_samples(read_json(directory / "samples.json", [])),
        stages=_stages(read_json(directory / "stages.json", [])),
        notes=_text(directory / "notes.log"),
        error=_text(directory / "error.log") if summary.get("status") == "failed" else "",
    )


def training_panels(lines: list[dict[str, Any]]) -> dict[str, list[Series]]:
    """Panel title -> its series, the important ones first; `x/chosen` and `x/rejected` share a panel."""
    names = dict.fromkeys(key for line in lines for key in line if key not in NOT_CURVES)
    panels: dict[str, list[Series]] = {}
    for name in names:
        points = [(float(line["step"]), value) for line in lines if (value := number(line.get(name))) is not None]
        if points:
            title = next((name.removesuffix(end) for end in PAIRED if name.endswith(end)), name)
            label = name.rsplit("/", 1)[-1] if title != name else name
            panels.setdefault(title, []).append(Series(label, [x for x, _ in points], [y for _, y in points]))
    return dict(sorted(panels.items(), key=lambda item: _rank(item[0])))


def says_little(title: str, series: list[Series]) -> bool:
    """Whether a panel is mere timing, or 0 all along. The important ones never: a reward that stays at 0 says much."""
    return _rank(title) == len(FIRST) and (title.endswith(TIMING) or not any(any(line.values) for line in series))


def _rank(title: str) -> int:
    """Place of the panel in FIRST, or its length."""
    return next((place for place, pattern in enumerate(FIRST) if fnmatchcase(title, pattern)), len(FIRST))


def evaluation_panels(evaluations: list[tuple[int, str, dict[str, Measured]]]) -> dict[str, list[Series]]:
    """Panel title -> one series for each metric that was evaluated more than once."""
    panels: dict[str, list[Series]] = {}
    for title in dict.fromkeys(f"{name}: {key}" for _, name, metrics in evaluations for key in metrics):
        found = [
            (step, m) for step, name, metrics in evaluations for key, m in metrics.items() if f"{name}: {key}" == title
        ]
        whole = all(m.low is not None and m.high is not None for _, m in found)
        if len({step for step, _ in found}) > 1:
            low = [m.low for _, m in found if m.low is not None] if whole else []
            high = [m.high for _, m in found if m.high is not None] if whole else []
            panels[title] = [Series(title, [float(s) for s, _ in found], [m.value for _, m in found], low, high)]
    return panels


def before_after(
    evaluations: list[tuple[int, str, dict[str, Measured]]],
) -> list[tuple[str, str, tuple[int, Measured], tuple[int, Measured] | None]]:
    """(evaluation, metric, (step, first), (step, last) or None where it was measured once)."""
    rows = []
    for name in dict.fromkeys(name for _, name, _ in evaluations):
        mine = [(step, metrics) for step, other, metrics in evaluations if other == name]
        for key in dict.fromkeys(key for _, metrics in mine for key in metrics):
            found = [(step, metrics[key]) for step, metrics in mine if key in metrics]
            rows.append((name, key, found[0], found[-1] if len(found) > 1 else None))
    return rows


def number(value: Any) -> float | None:
    """The value where it is a number that can be drawn, else None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return None


def _evaluations(stored: Any) -> list[tuple[int, str, dict[str, Measured]]]:
    found = []
    for item in stored if isinstance(stored, list) else []:
        if isinstance(item, dict) and number(item.get("step")) is not None and isinstance(item.get("metrics"), dict):
            found.append((int(item["step"]), str(item.get("name", "")), _measured(item["metrics"])))
    return sorted(found, key=lambda entry: entry[0])


def _stages(stored: Any) -> list[tuple[str, Measured]]:
    """`[{"label": ..., "metrics": {"accuracy": ..., ...}}, ...]`: one accuracy for each stage of a longer job."""
    found = []
    for item in stored if isinstance(stored, list) else []:
        if isinstance(item, dict) and isinstance(item.get("metrics"), dict):
            accuracy = _measured(item["metrics"]).get("accuracy")
            found += [(str(item.get("label", "")), accuracy)] if accuracy else []
    return found


def _measured(metrics: dict[str, Any]) -> dict[str, Measured]:
    """Numbers by name. An interval belongs to `accuracy`, or to `x` where it is called `x_low` and `x_high`, or
    `x_interval_low` and `x_interval_high`; `accuracy_interval_` without `accuracy` is that of `rewards/accuracies`."""
    count = number(metrics.get("n"))
    n = int(count) if count is not None else None
    found: dict[str, Measured] = {}
    used = {"n"}
    for key in metrics:
        value = number(metrics[key])
        for low, high in (
            (f"{key}_low", f"{key}_high"),
            (f"{key}_interval_low", f"{key}_interval_high"),
            *OTHER_INTERVALS.get(key, ()),
        ):
            ends = number(metrics.get(low)), number(metrics.get(high))
            if value is not None and None not in ends:
                found[key] = Measured(value, *ends, n)
                used |= {low, high}
                break
        else:
            if value is not None:
                found[key] = Measured(value, n=n)
    return {key: item for key, item in found.items() if key not in used}


def _samples(stored: Any) -> list[Sample]:
    """The first of each evaluation."""
    samples: list[Sample] = []
    shown: Counter[str] = Counter()
    for item in stored if isinstance(stored, list) else []:
        if isinstance(item, dict) and shown[evaluation := str(item.get("evaluation"))] < SAMPLES_SHOWN:
            shown[evaluation] += 1
            answer = item.get("answer")
            samples.append(
                Sample(_said(item.get("prompt")), None if answer is None else str(answer), _completions(item))
            )
    return samples


def _completions(item: dict[str, Any]) -> list[tuple[str, str, bool | None]]:
    stored = item.get("completions")
    if isinstance(stored, dict):
        stored = [{"label": label, "text": text} for label, text in stored.items()]
    found = []
    for entry in stored if isinstance(stored, list) else []:
        if isinstance(entry, dict):
            right, reward = entry.get("correct"), entry.get("reward")
            label = str(entry.get("label", "")) + (f", reward {reward:.4g}" if isinstance(reward, int | float) else "")
            found.append((label, _said(entry.get("text")), right if isinstance(right, bool) else None))
    return found


def _said(value: Any) -> str:
    """Text, or messages as `role: content` lines; one message alone is its content."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return str(value[0].get("content", ""))
    if isinstance(value, list):
        return "\n".join(
            f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in value
        )
    return "" if value is None else str(value)


def _text(path: Path, most: int = 40_000) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text if len(text) <= most else f"(the first {len(text) - most} characters are left out)\n{text[-most:]}"
