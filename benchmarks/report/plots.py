"""The plots of a benchmark, as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib

from ..quality.quality import Quality, QualityRow
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
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": "small",
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "ncols": 2,
}
"""Above the plot, where no bar reaches."""


def rendered(figure: plt.Figure, kind: str) -> bytes:
    """A figure as "svg" or "png"; it is closed."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else None
    with plt.rc_context({"svg.hashsalt": "boostdiff"}):
        figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    plt.close(figure)
    return buffer.getvalue()


def speed_plot(speed: Speed) -> plt.Figure:
    """Images per second with their intervals: lines over the batch size, or bars where there is but one."""
    several = len({row.batch_size for row in speed.rows}) > 1
    return _throughput_lines(speed) if several else _throughput_bars(speed)


def _throughput_bars(speed: Speed) -> plt.Figure:
    runners = list(dict.fromkeys(row.runner for row in speed.rows))
    figure, axes = plt.subplots(figsize=(6, 1.1 + 0.9 * len(runners)), layout="constrained")
    for mode, offset in zip(MODE_NAMES, (-0.27, 0, 0.27), strict=True):
        rows = [row for row in speed.rows if row.mode == mode]
        rates = [row.images_per_second for row in rows]
        axes.barh(
            [runners.index(row.runner) + offset for row in rows],
            [rate.value for rate in rates],
            0.25,
            color=COLORS[mode],
            xerr=[[r.value - r.low for r in rates], [r.high - r.value for r in rates]],
            capsize=2,
            label=MODE_NAMES[mode],
        )
    axes.set_yticks(range(len(runners)), runners)
    axes.invert_yaxis()
    axes.set_xlabel(f"images per second, batch {speed.rows[0].batch_size}")
    return _finished(figure, axes, columns=3)


def _throughput_lines(speed: Speed) -> plt.Figure:
    runners = list(dict.fromkeys(row.runner for row in speed.rows))
    lines = len({(row.runner, row.mode) for row in speed.rows})
    # Room for the legend above.
    figure, axes = plt.subplots(figsize=(6, max(3.8, 2.4 + 0.12 * lines)), layout="constrained")
    # Together, the two repeat after forty runners.
    for runner, style, marker in zip(runners, cycle(_STYLES), cycle(_MARKERS), strict=False):
        for mode in MODE_NAMES:
            rows = sorted((r for r in speed.rows if (r.runner, r.mode) == (runner, mode)), key=lambda r: r.batch_size)
            if not rows:
                continue
            rates = [row.images_per_second for row in rows]
            axes.errorbar(
                [row.batch_size for row in rows],
                [rate.value for rate in rates],
                yerr=[[r.value - r.low for r in rates], [r.high - r.value for r in rates]],
                color=COLORS[mode],
                linestyle=style,
                marker=marker,
                markersize=4,
                capsize=2,
                label=f"{runner}, {MODE_NAMES[mode]}",
            )
    batches = sorted({row.batch_size for row in speed.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    return _finished(figure, axes, columns=2)


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
    return _finished(figure, axes, columns=2)


def cost_plot(quality: Quality) -> plt.Figure:
    """Fréchet distance over UNet passes per image: teacher, students, and the best settings of what needs no training.

    Settings that were tried and are not the best are faint.
    """
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    rows = [row for row in quality.rows if row.distance is not None and row.role != "reseeded"]
    tried = [row for row in rows if row.role == "alternative"]
    axes.plot([r.cost for r in tried], [r.distance or 0.0 for r in tried], ".", color="#d9dbe0", zorder=1)
    best = sorted(quality.best_alternatives(), key=lambda row: row.cost)
    for method, color, style in zip(dict.fromkeys(row.method for row in best), _METHODS, _STYLES, strict=False):
        _points(axes, [row for row in best if row.method == method], str(method), color, style)
    for row in rows:
        if row.role != "alternative":
            _points(axes, [row], row.name, COLORS[row.role], "")
    axes.set_xlabel("UNet passes per image")
    axes.set_ylabel(f"{quality.features} (lower is better)")
    return _finished(figure, axes, columns=2)


def _points(axes: plt.Axes, rows: list[QualityRow], label: str, color: str, style: Any) -> None:
    values, halves = [row.distance or 0.0 for row in rows], [_half(row.distance_interval) for row in rows]
    _line(axes, [row.cost for row in rows], values, halves, label=label, color=color, style=style)


def _line(
    axes: plt.Axes,
    x: Sequence[float],
    values: Sequence[float],
    halves: Sequence[float],
    *,
    label: str,
    color: str,
    style: Any,
    marker: str = "o",
) -> None:
    axes.errorbar(
        x, values, yerr=halves, color=color, linestyle=style, marker=marker, markersize=5, capsize=2, label=label
    )


def sweep_plot(grid: Grid) -> plt.Figure:
    """Fréchet distance over the guidance scale, and the caption score beside it, with intervals."""
    panels = 1 if grid.caption_label is None else 2
    figure, all_axes = plt.subplots(1, panels, figsize=(6 * panels, 3.8), layout="constrained", squeeze=False)
    rows = list(dict.fromkeys(cell.row for cell in grid.cells))
    for axes, heading in zip(all_axes[0], (f"{grid.features} (lower is better)", grid.caption_label), strict=False):
        for row, style, marker in zip(rows, cycle(_STYLES), cycle(_MARKERS), strict=False):
            cells = sorted((cell for cell in grid.cells if cell.row == row), key=lambda cell: cell.guidance)
            if axes is all_axes[0][0]:
                figures, values = [cell.interval for cell in cells], [cell.distance for cell in cells]
            else:
                figures = [cell.caption_score for cell in cells]
                values = [float("nan") if estimate is None else estimate.value for estimate in figures]
            color = COLORS["teacher" if row == "teacher" else "student"]
            scales, halves = [cell.guidance for cell in cells], [_half(estimate) for estimate in figures]
            _line(axes, scales, values, halves, label=row, color=color, style=style, marker=marker)
        axes.set_xlabel("guidance scale w")
        axes.set_ylabel(str(heading))
        _finished(figure, axes, columns=2)
    return figure


_METHODS = ("#c2543a", "#3a8f5c", "#8a5cc2")


def _finished(figure: plt.Figure, axes: plt.Axes, *, columns: int) -> plt.Figure:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**_LEGEND | {"ncols": columns})
    return figure
