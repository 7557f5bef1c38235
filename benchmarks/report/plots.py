"""The plots of a benchmark, as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import cycle

import matplotlib

from ..quality.quality import Quality
from ..speed.throughput import Speed
from ..stats import Estimate
from ..table1 import Cell, Grid
from .tables import MODE_NAMES

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Names may hold paths, and a pair of "$" in one is no formula.
matplotlib.rcParams["text.parse_math"] = False

COLORS = {"teacher": "#8a8f98", "reseeded": "#8a8f98", "student": "#2f6fed", "unguided": "#c9cdd3"}
_INK = "#1e1e24"
_STYLES = ("-", "--", ":", "-.", (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*")


def svg_of(figure: plt.Figure) -> bytes:
    """A figure as SVG, the same bytes each time; it is closed."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "boostdiff"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue()


def speed_plot(speed: Speed) -> plt.Figure:
    """Images per second with their intervals: bars for each runner and batch size."""
    groups = list(dict.fromkeys((row.runner, row.batch_size) for row in speed.rows))
    figure, axes = plt.subplots(figsize=(6, 1.1 + 0.8 * len(groups)), layout="constrained")
    for mode, offset in zip(MODE_NAMES, (-0.27, 0, 0.27), strict=True):
        rows = [row for row in speed.rows if row.mode == mode]
        rates = [row.images_per_second for row in rows]
        axes.barh(
            [groups.index((row.runner, row.batch_size)) + offset for row in rows],
            [rate.value for rate in rates],
            0.25,
            color=COLORS[mode],
            xerr=[[r.value - r.low for r in rates], [r.high - r.value for r in rates]],
            capsize=2,
            label=MODE_NAMES[mode],
        )
    axes.set_yticks(range(len(groups)), [f"{runner}, batch {size}" for runner, size in groups])
    axes.invert_yaxis()
    axes.set_xlabel("images per second")
    return finished(figure, axes, columns=3)


def _half(figure: Estimate | float | None) -> float:
    return figure.high - figure.value if isinstance(figure, Estimate) else 0.0


def quality_plot(quality: Quality) -> plt.Figure:
    """Fréchet distance of each row with its interval, and the real-vs-real distance as a line."""
    rows = [row for row in quality.main_rows() if row.distance is not None]
    figure, axes = plt.subplots(figsize=(6, 0.9 + 0.5 * len(rows)), layout="constrained")
    values, halves = [row.distance or 0.0 for row in rows], [_half(row.distance_interval) for row in rows]
    axes.barh([row.name for row in rows], values, xerr=halves, capsize=2, color=[COLORS[row.role] for row in rows])
    for index, (value, half) in enumerate(zip(values, halves, strict=True)):
        axes.annotate(f"{value:.0f}", (value + half, index), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    if quality.real_vs_real_distance is not None:
        axes.axvline(quality.real_vs_real_distance, color=_INK, linestyle=":", label="real images")
    axes.set_xlabel(f"{quality.features} to real images (lower is better)")
    axes.margins(x=0.12)
    return finished(figure, axes)


def sweep_plot(grid: Grid) -> plt.Figure:
    """Fréchet distance over the guidance scale, and the caption score beside it, with intervals."""
    figures: dict[str, Callable[[Cell], tuple[float, Estimate | float | None]]] = {
        f"{grid.features} (lower is better)": lambda cell: (
            cell.quality.distance or 0.0,
            cell.quality.distance_interval,
        )
    }
    if grid.caption_label:
        figures[grid.caption_label] = lambda cell: (
            float("nan") if cell.quality.caption_value is None else cell.quality.caption_value,
            cell.quality.caption_score,
        )
    figure, panels = plt.subplots(1, len(figures), figsize=(6 * len(figures), 3.8), layout="constrained", squeeze=False)
    for axes, (heading, figure_of) in zip(panels[0], figures.items(), strict=True):
        rows = dict.fromkeys(cell.quality.name for cell in grid.cells)
        for row, style, marker in zip(rows, cycle(_STYLES), cycle(_MARKERS), strict=False):
            cells = sorted((cell for cell in grid.cells if cell.quality.name == row), key=lambda cell: cell.guidance)
            values, intervals = zip(*map(figure_of, cells), strict=True)
            axes.errorbar(
                [cell.guidance for cell in cells],
                values,
                yerr=[_half(interval) for interval in intervals],
                color=COLORS["teacher" if row == "teacher" else "student"],
                linestyle=style,
                marker=marker,
                markersize=5,
                capsize=2,
                label=row,
            )
        axes.set(xlabel="guidance scale w", ylabel=heading)
        finished(figure, axes)
    return figure


def finished(figure: plt.Figure, axes: plt.Axes, *, columns: int = 2) -> plt.Figure:
    """The figure without a box, its legend above the plot."""
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        # Above the plot, where no bar reaches.
        axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    return figure
