"""Lines with intervals as an SVG: what a study's table says, at a glance. Colours as in the report of a run."""

from dataclasses import dataclass, field
from html import escape
from math import log

COLOURS = ("#0072b2", "#d55e00", "#00805c", "#a8488a")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 250, 46, 30, 42
Point = tuple[float, float, float, float]
"""x, and y with its interval: value, low, high."""


@dataclass
class Panel:
    """A diagram: its title, and its lines by name."""

    title: str
    lines: dict[str, list[Point]] = field(default_factory=dict)


def drawn(panels: list[Panel], x_title: str) -> str:
    """The panels side by side, x logarithmic, the names of the lines below."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    height = HEIGHT + 18 * len(names) + 8
    bodies = "".join(_panel(panel, names, i * WIDTH, x_title) for i, panel in enumerate(panels))
    keys = "".join(
        f'<line x1="{LEFT}" x2="{LEFT + 22}" y1="{HEIGHT + 18 * i + 8}" y2="{HEIGHT + 18 * i + 8}" '
        f'stroke="{_colour(i)}" stroke-width="2.4"/>'
        f'<text x="{LEFT + 30}" y="{HEIGHT + 18 * i + 12}">{escape(name)}</text>'
        for i, name in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(panels)} {height}" '
        f'width="{WIDTH * len(panels)}" height="{height}" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="#23262b"><rect width="100%" height="100%" fill="#ffffff"/>{bodies}{keys}</svg>\n'
    )


def _panel(panel: Panel, names: list[str], offset: int, x_title: str) -> str:
    points = [point for line in panel.lines.values() for point in line]
    if not points:
        return ""
    xs = sorted({x for x, *_ in points})
    low, high = min(p[2] for p in points), max(p[3] for p in points)
    low, high = (low, high) if high > low else (low - 1, high + 1)
    span = (log(xs[-1]) - log(xs[0])) or 1.0

    def across(x: float) -> float:
        return offset + LEFT + (log(x) - log(xs[0])) / span * (WIDTH - LEFT - 24)

    def up(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    ticks = [low + (high - low) * i / 4 for i in range(5)]
    grid = "".join(
        f'<line x1="{offset + LEFT}" x2="{offset + WIDTH - 24}" y1="{up(y):.1f}" y2="{up(y):.1f}" stroke="#dfe1e4"/>'
        f'<text x="{offset + LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        for y in ticks
    )
    grid += "".join(
        f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>' for x in xs
    )
    titles = (
        f'<text x="{offset + LEFT}" y="18" font-weight="600">{escape(panel.title)}</text>'
        f'<text x="{offset + WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    )
    lines = "".join(_line(panel.lines[name], _colour(names.index(name)), across, up) for name in panel.lines)
    return grid + titles + lines


def _line(points: list[Point], colour: str, across, up) -> str:  # type: ignore[no-untyped-def]
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _, _ in points)
    marks = "".join(
        f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{up(low):.1f}" y2="{up(high):.1f}" stroke="{colour}" '
        f'stroke-opacity=".45" stroke-width="2"/><circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>'
        for x, y, low, high in points
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{marks}'


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
