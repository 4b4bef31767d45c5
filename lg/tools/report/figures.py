"""Charts of the report as inline SVG, whose colours the page sets for light and dark screens.

Lines are drawn by run: the first run has the same colour in every chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from lg.logs import plots
from lg.tools.report.attention import BlockDistance
from lg.tools.report.results import Reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.5, 2.8  # inches of a chart; the page scales it
# Colours of lg.logs.plots -> properties of the page's style.
_PROPERTIES = {plots.INK: "var(--ink-2)", plots.RULE: "var(--rule)"} | {
    color: f"var(--run-{number})" for number, color in enumerate(plots.COLORS)
}

Lines = Mapping[int, tuple[Sequence[float], Sequence[float]]]  # number of the run -> x and y


def color(run: int) -> str:
    """Return the colour of a run (counted from 0)."""
    return plots.COLORS[run % len(plots.COLORS)]


def svg(label: str, draw: Any, *args: Any, width: float = WIDTH, height: float = HEIGHT) -> str:
    """Draw with `draw(figure, *args)` and return an <svg> element.

    Args:
        label: What a screen reader says.
        draw: Takes a matplotlib figure and `args`.
        *args: Passed to `draw`.
        width: Inches.
        height: Inches.
    """
    stream = io.BytesIO()
    options: dict[str, Any] = {"format": "svg", "transparent": True, "metadata": {"Date": None}}
    if width != WIDTH:  # charts of other shapes have no neighbours to line up with
        options |= {"bbox_inches": "tight", "pad_inches": 0.06}
    plots.save_figure(stream, width, height, draw, *args, **options)
    text = stream.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick)[^"]*"', "", text)
    for fixed, variable in _PROPERTIES.items():
        text = text.replace(fixed, variable)
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head[0])
    assert box is not None
    opening = (
        f'<svg role="img" aria-label="{escape(label)}" {box[0]} '
        f'style="max-width:{108 * width:.0f}px" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + text[head.end() :].strip()


def lines(title: str, series: Lines, *, percent: bool = False) -> str:
    """Return a chart of lines over epochs."""
    return svg(title, _draw_lines, title, series, percent)


def _draw_lines(figure: Figure, title: str, series: Lines, percent: bool) -> None:
    axes = figure.subplots()
    named = {str(run): line for run, line in series.items()}
    plots.draw_lines(axes, named, title=title, colors=[*map(color, series)], legend=False)
    if percent:
        axes.set_ylim(0, 100)


def reliability_plot(runs: Sequence[tuple[int, Reliability]]) -> str:
    """Return the plot of accuracy over confidence; the area of a point grows with its images."""
    title = "Accuracy over confidence, %"
    return svg(title, _draw_reliability, title, runs, width=3.6, height=3.4)


def _draw_reliability(figure: Figure, title: str, runs: Sequence[tuple[int, Reliability]]) -> None:
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=plots.RULE, linestyle="--", linewidth=1)
    for run, bins in runs:
        area = 12 + 140 * bins.counts / bins.counts.sum()
        axes.plot(bins.confidence, bins.accuracy, color=color(run), linewidth=1.2)
        axes.scatter(bins.confidence, bins.accuracy, area, color=color(run), alpha=0.75)
    axes.set(xlim=(0, 102), ylim=(0, 104), xlabel="confidence, %", aspect="equal")
    axes.set_title(title, loc="left")


def confusion_plot(confusion: np.ndarray, names: Sequence[str], run: int) -> str:
    """Return the plot of a confusion matrix [K, K] in the run's colour."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    # A transparent background suits light and dark screens.
    full = to_rgba(color(run))
    colors = LinearSegmentedColormap.from_list("share", [(*full[:3], 0.0), full])
    size = 3.4 + 0.22 * len(names) if len(names) <= plots.READABLE_CLASSES else 5.0
    return svg(
        "Confusion matrix",
        lambda figure: plots.draw_confusion(figure, confusion, names, colors=colors),
        width=size + 0.6,
        height=size,
    )


def distance_plot(runs: Sequence[tuple[int, Sequence[BlockDistance]]]) -> str:
    """Return the plot of attention distances: a dot a head, a line the means of a run."""
    title = "Mean attention distance, pixels"
    return svg(title, _draw_distances, title, runs, width=4.8, height=3.4)


def _draw_distances(
    figure: Figure, title: str, runs: Sequence[tuple[int, Sequence[BlockDistance]]]
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    width = 0.16  # between the dots of two runs
    for place, (run, found) in enumerate(runs):
        shift = width * (place - (len(runs) - 1) / 2)
        blocks = [each.block for each in found]
        axes.plot(blocks, [each.uniform for each in found], color=plots.RULE, linestyle=":")
        dots = [(each.block + shift, head) for each in found for head in each.heads]
        x, y = zip(*dots, strict=True)
        axes.scatter(x, y, 14, color=color(run), alpha=0.45, linewidths=0)
        axes.plot(blocks, [each.mean for each in found], color=color(run), linewidth=1.8)
    axes.set_title(title, loc="left")
    axes.set_xlabel("block")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
