"""The picture of a comparison: each method's held-out accuracy, seed by seed, and its mean with an interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from llmrl.evaluation.intervals import student_interval


def draw(path: Path, accuracies: Mapping[str, Sequence[float]], start: float, title: str) -> None:
    """Write a PNG or SVG (by the name's ending): a line a method, from above in the order given.

    accuracies: of each method, one number in [0, 1] a seed. start: of the model that all of them began with.
    """
    figure = Figure(figsize=(6.4, 0.8 + 0.42 * len(accuracies)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(100 * start, color="0.6", linewidth=1, linestyle=(0, (4, 2)))
    axes.text(100 * start, -0.72, " start", color="0.4", fontsize=8, va="center")
    for place, seeds in enumerate(accuracies.values()):
        mean, low, high = student_interval(seeds)
        axes.plot([100 * seed for seed in seeds], [place] * len(seeds), "o", color="0.7", markersize=4, zorder=1)
        if low == low:  # a single seed has no interval
            axes.plot([100 * low, 100 * min(high, 1.0)], [place] * 2, color="#1f5f99", linewidth=2, zorder=2)
        axes.plot([100 * mean], [place], "D", color="#1f5f99", markersize=6, zorder=3)
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.set_ylim(len(accuracies) - 0.4, -1.0)
    axes.set_xlabel("held-out problems answered right, greedily (%): seeds, mean, 95% interval of the mean")
    axes.xaxis.label.set_fontsize(8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=160, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})
