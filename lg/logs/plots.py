"""Figures of training and of reports, drawn with matplotlib's Agg canvas, without pyplot.

K counts classes. Each function takes a matplotlib `Figure` to draw on.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READABLE_CLASSES = 30  # up to here a confusion matrix shows names and counts
COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#64748b")
INK = "#334155"
RULE = "#94a3b8"  # of axes and grid
_RC: Any = {  # any: mypy would want a literal type of every key
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.alpha": 0.25,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # class names may have dollar signs
}

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label -> x and y


def save_figure(
    stream: Any, width: float, height: float, draw: Any, *args: Any, **options: Any
) -> None:
    """Draw a figure of a size in inches with `draw(figure, *args)` and write it to a stream.

    Args:
        stream: Binary stream.
        width: Inches.
        height: Inches.
        draw: Takes the figure and `args`.
        *args: Passed to `draw`.
        **options: Of `Figure.savefig`, such as `format`.
    """
    import matplotlib  # slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, *args)
        figure.savefig(stream, **options)


def draw_lines(
    axes: Axes,
    series: Series,
    *,
    title: str,
    xlabel: str = "epoch",
    colors: Sequence[str] = COLORS,
    legend: bool = True,
) -> None:
    """Draw one line per series; a series of few points gets markers."""
    for number, (label, (x, y)) in enumerate(series.items()):
        axes.plot(
            x,
            y,
            label=label,
            color=colors[number % len(colors)],
            linestyle="-" if number < len(colors) else "--",
            marker="o" if len(x) < 5 else None,
            markersize=3,
        )
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel)
    if legend and len(series) > 1:
        axes.legend()


def draw_curves(figure: Figure, panels: Mapping[str, Series]) -> None:
    """Draw panels of lines side by side; title -> series."""
    for axes, (title, series) in zip(
        np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels.items(), strict=True
    ):
        draw_lines(axes, series, title=title)
        if title.endswith("%"):
            axes.set_ylim(0, 100)


def draw_mixture(figure: Figure, weights: np.ndarray, epochs: Sequence[int]) -> None:
    """Draw the mixtures of INTER_STUDENT_INDEX mix: now, and over the epochs.

    Args:
        figure: The figure.
        weights: [E, T, B], the weight of each of B blocks for each of T guide stages.
        epochs: E epochs.
    """
    _, stages, blocks = weights.shape
    last, *panels = np.ravel(figure.subplots(1, 1 + stages, squeeze=False))
    for stage in range(stages):
        x = np.arange(blocks) + (stage - (stages - 1) / 2) * 0.8 / stages
        color = COLORS[stage % len(COLORS)]
        last.bar(x, 100 * weights[-1, stage], 0.8 / stages, color=color, label=f"stage {stage}")
    last.axhline(100 / blocks, color=INK, linestyle=":", linewidth=1)  # equal weights
    last.set(xlabel="block", title=f"weights in epoch {epochs[-1]}, %")
    last.set_xticks(range(blocks))
    last.legend()
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, -0.5, blocks - 0.5)
    for stage, axes in enumerate(panels):
        image = axes.imshow(
            100 * weights[:, stage].T,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="Blues",
            vmin=0,
            vmax=100 * weights.max(),
            interpolation="nearest",
        )
        axes.grid(visible=False)
        axes.set(xlabel="epoch", ylabel="block", title=f"guide stage {stage}, weights in %")
        axes.set_yticks(range(blocks))
    figure.colorbar(image, ax=panels, shrink=0.8)


def draw_confusion(
    figure: Figure,
    confusion: np.ndarray,
    names: Sequence[str],
    title: str = "",
    colors: Any = "Blues",
) -> None:
    """Draw a confusion matrix: rows are labels, colours the share of the label's images.

    Args:
        figure: The figure.
        confusion: [K, K], counts.
        names: K class names; shown with the counts up to READABLE_CLASSES classes.
        title: Above the matrix.
        colors: Colormap of matplotlib.
    """
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(100 * shares, cmap=colors, vmin=0, vmax=100, interpolation="nearest")
    axes.grid(visible=False)
    axes.set(xlabel="predicted class", ylabel="label")
    axes.set_title(title, loc="left")
    figure.colorbar(image, ax=axes, label="% of the label's images", shrink=0.8)
    if len(names) > READABLE_CLASSES:
        return
    short = [textwrap.shorten(name, 18, placeholder="…") or name[:17] + "…" for name in names]
    upright = max(map(len, short)) <= 3
    axes.set_xticks(range(len(names)), short, rotation=0 if upright else 90)
    axes.set_yticks(range(len(names)), short)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        axes.text(
            column,
            row,
            str(confusion[row, column]),
            ha="center",
            va="center",
            fontsize=9 if len(names) <= 12 else 6,
            color="white" if shares[row, column] > 0.55 else INK,
        )


def draw_images(figure: Figure, images: np.ndarray, captions: Sequence[str]) -> None:
    """Draw rows of four images with captions.

    Args:
        figure: The figure.
        images: [n, S, S, 3], uint8.
        captions: n texts.
    """
    grid = np.ravel(figure.subplots(-(-len(images) // 4), 4, squeeze=False))
    for axes in grid:
        axes.axis("off")
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=8)
