"""Small curves as inline SVG, drawn by matplotlib, coloured by the page they stand in.

Invariants: colours are CSS variables (so that a dark page gets light ink), text is text in the page's font, series are
told apart by dash as well as by colour, and nothing in a picture refers outside the page.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Drawn in these, replaced by the page's variables: matplotlib itself knows no CSS.
STAND_INS = {
    "#010101": "var(--ink)", "#020202": "var(--faint)",
    "#030301": "var(--series-1)", "#030302": "var(--series-2)",
    "#030303": "var(--series-3)", "#030304": "var(--series-4)",
}  # fmt: skip
INK, FAINT, *SERIES = STAND_INS
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MOST_POINTS = 600
SMOOTH_FROM = 40


@dataclass(frozen=True)
class Series:
    """One line of a panel: its steps and values, and half-open intervals where it has them."""

    label: str
    steps: list[float]
    values: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


def curve(series: Sequence[Series]) -> str:
    """The panel as an `<svg>` element; at most as many series as there are colours are drawn."""
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "llmrl", "font.size": 8, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(3.7, 1.9), layout="constrained")
        axes = figure.add_subplot()
        for line, color, dash in zip(series, SERIES, DASHES, strict=False):
            _draw(axes, line, color, dash)
        _dress(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def _draw(axes: Axes, line: Series, color: str, dash: object) -> None:
    if line.low:
        below = [max(v - low, 0.0) for v, low in zip(line.values, line.low, strict=True)]
        above = [max(high - v, 0.0) for v, high in zip(line.values, line.high, strict=True)]
        axes.errorbar(
            line.steps, line.values, yerr=[below, above], color=color, linestyle=dash, linewidth=1.2, marker="o",
            markersize=3.2, capsize=2.5, elinewidth=0.9,
        )  # fmt: skip
        return
    steps, values = thinned(line.steps, line.values)
    if len(values) < SMOOTH_FROM:
        marker = "o" if len(values) <= 15 else None
        axes.plot(steps, values, color=color, linestyle=dash, linewidth=1.3, marker=marker, markersize=2.6)
    else:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
        axes.plot(steps, smoothed(values, len(values) // 20), color=color, linestyle=dash, linewidth=1.5)


def _dress(axes: Axes) -> None:
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=2.5, width=0.5, labelsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.get_offset_text().set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    axes.margins(x=0.02, y=0.08)


def _inline(svg: str) -> str:
    """The element alone, without what only a file of its own needs, scaling with the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([0-9.]+)px [^\";]*", r"font: \1px var(--font)", svg)
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", '<svg role="img" ', 1)


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points, each the mean of a run of neighbours."""
    width = -(-len(values) // MOST_POINTS) or 1
    return [mean(part) for part in _runs(steps, width)], [mean(part) for part in _runs(values, width)]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Centred moving average over about `width` values, over those that there are at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = max(width // 2, 1)
    spans = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _runs(values: Sequence[float], width: int) -> Iterator[Sequence[float]]:
    return (values[i : i + width] for i in range(0, len(values), width))
