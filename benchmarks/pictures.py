"""Lines with intervals as an SVG: what a study's table says, at a glance. Colours as in the report of a run."""

from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log, log10

COLOURS = ("#0072b2", "#d55e00", "#00805c", "#a8488a")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 250, 46, 30, 42
INSET, APART = 12, 5
"""Pixels between the first and last points and the ends of the axis, and between the bars of two lines."""
Point = tuple[float, float, float, float]
"""x, and y with its interval: value, low, high."""


@dataclass
class Panel:
    """A diagram: its title, and its lines by name."""

    title: str
    lines: dict[str, list[Point]] = field(default_factory=dict)


def drawn(panels: list[Panel], x_title: str, bars: str) -> str:
    """The panels side by side, x logarithmic, the names of the lines below. `bars`: what the vertical ones are."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    rows = (len(names) + 1) // 2
    height = HEIGHT + 18 * rows + 26
    bodies = "".join(_panel(panel, names, i * WIDTH, x_title) for i, panel in enumerate(panels))
    keys = "".join(_key(name, i, WIDTH * (i // rows), HEIGHT + 8 + 18 * (i % rows)) for i, name in enumerate(names))
    note = f'<text x="{LEFT}" y="{height - 10}" fill="#61666e">bars: {escape(bars)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(panels)} {height}" '
        f'width="{WIDTH * len(panels)}" height="{height}" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="#23262b"><rect width="100%" height="100%" fill="#ffffff"/>{bodies}{keys}{note}</svg>\n'
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to seven, the first at or below `low` and the last at or above `high`."""
    rough = (high - low) / 4 or 1.0
    unit = 10 ** floor(log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first, last = floor(low / step), ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _key(name: str, index: int, left: int, y: int) -> str:
    return (
        f'<line x1="{left + LEFT}" x2="{left + LEFT + 22}" y1="{y}" y2="{y}" stroke="{_colour(index)}" '
        f'stroke-width="2.4"{_dash(index)}/><text x="{left + LEFT + 30}" y="{y + 4}">{escape(name)}</text>'
    )


def _panel(panel: Panel, names: list[str], offset: int, x_title: str) -> str:
    points = [point for line in panel.lines.values() for point in line]
    if not points:
        return ""
    xs = sorted({x for x, *_ in points})
    marks = ticks(min(p[2] for p in points), max(p[3] for p in points))
    span = (log(xs[-1]) - log(xs[0])) or 1.0
    left, right = offset + LEFT, offset + WIDTH - 24

    def across(x: float) -> float:
        return left + INSET + (log(x) - log(xs[0])) / span * (right - left - 2 * INSET)

    def up(y: float) -> float:
        return TOP + (marks[-1] - y) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM)

    grid = "".join(
        f'<line x1="{left}" x2="{right}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="#dfe1e4"/>'
        f'<text x="{left - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        for y in marks
    )
    grid += "".join(
        f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>' for x in xs
    )
    titles = (
        f'<text x="{left}" y="18" font-weight="600">{escape(panel.title)}</text>'
        f'<text x="{(left + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    )
    lines = ""
    for name, points_of in panel.lines.items():
        beside = APART * (names.index(name) - (len(names) - 1) / 2)  # so that no bar hides another
        lines += _line([(across(x) + beside, up(y), up(a), up(b)) for x, y, a, b in points_of], names.index(name))
    return grid + titles + lines


def _line(places: list[Point], index: int) -> str:
    """A line through places in the picture: x, y, and both ends of the bar."""
    colour = _colour(index)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    marks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" '
        f'stroke-opacity=".45" stroke-width="2"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        for x, y, low, high in places
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{_dash(index)}/>{marks}'


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _dash(index: int) -> str:
    return ' stroke-dasharray="5 3"' if index % 2 else ""
