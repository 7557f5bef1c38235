"""The plots of a benchmark, as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib

from ..quality.quality import Quality
from ..speed.throughput import Speed
from ..stats import Estimate
from ..table1 import Grid
from .tables import MODE_NAMES

matplotlib.use("Agg")

import matplotlib.pyplot as plt

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
    return _finished(figure, axes, columns=3)


def _half(estimate: Estimate | None) -> float:
    return 0.0 if estimate is None else estimate.high - estimate.value


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
    return _finished(figure, axes)


def sweep_plot(grid: Grid) -> plt.Figure:
    """Fréchet distance over the guidance scale, and the caption score beside it, with intervals."""
    panels = 1 if grid.caption_label is None else 2
    figure, all_axes = plt.subplots(1, panels, figsize=(6 * panels, 3.8), layout="constrained", squeeze=False)
    panel, *beside = all_axes[0]
    rows = dict.fromkeys(cell.row for cell in grid.cells)
    for row, style, marker in zip(rows, cycle(_STYLES), cycle(_MARKERS), strict=False):
        cells = sorted((cell for cell in grid.cells if cell.row == row), key=lambda cell: cell.guidance)
        scales = [cell.guidance for cell in cells]
        look = (row, COLORS["teacher" if row == "teacher" else "student"], style)
        _line(panel, scales, [cell.distance for cell in cells], [cell.interval for cell in cells], *look, marker)
        for axes in beside:
            scores = [cell.caption_score for cell in cells]
            values = [float("nan") if score is None else score.value for score in scores]
            _line(axes, scales, values, scores, *look, marker)
    for axes, heading in zip(
        (panel, *beside), (f"{grid.features} (lower is better)", grid.caption_label), strict=False
    ):
        axes.set_xlabel("guidance scale w")
        axes.set_ylabel(str(heading))
        _finished(figure, axes)
    return figure


def _line(
    axes: plt.Axes,
    x: Sequence[float],
    y: Sequence[float],
    intervals: Sequence[Estimate | None],
    label: str,
    color: str,
    style: Any,
    marker: str = "o",
) -> None:
    halves = [_half(interval) for interval in intervals]
    axes.errorbar(x, y, yerr=halves, color=color, linestyle=style, marker=marker, markersize=5, capsize=2, label=label)


def _finished(figure: plt.Figure, axes: plt.Axes, *, columns: int = 2) -> plt.Figure:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        # Above the plot, where no bar reaches.
        axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)
    return figure
