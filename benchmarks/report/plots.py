"""The plots of a benchmark, as SVG for the page."""

from __future__ import annotations

import io
from itertools import cycle
from typing import Any

import matplotlib

from ..bench import BenchResult
from ..quality.quality import Quality, QualityRow
from ..speed.throughput import Speed
from .tables import WAY_NAMES

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLOURS = {"teacher": "#8a8f98", "student": "#2f6fed", "unguided": "#c9cdd3"}
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
    for way, offset in zip(WAY_NAMES, (-0.27, 0, 0.27), strict=True):
        rows = [row for row in speed.rows if row.way == way]
        rates = [row.images_per_second for row in rows]
        axes.barh(
            [runners.index(row.runner) + offset for row in rows],
            [rate.value for rate in rates],
            0.25,
            color=COLOURS[way],
            xerr=[[r.value - r.low for r in rates], [r.high - r.value for r in rates]],
            capsize=2,
            label=WAY_NAMES[way],
        )
    axes.set_yticks(range(len(runners)), runners)
    axes.invert_yaxis()
    axes.set_xlabel(f"images per second, batch {speed.rows[0].batch_size}")
    return _finished(figure, axes, columns=3)


def _throughput_lines(speed: Speed) -> plt.Figure:
    runners = list(dict.fromkeys(row.runner for row in speed.rows))
    lines = len({(row.runner, row.way) for row in speed.rows})
    # Room for the legend above.
    figure, axes = plt.subplots(figsize=(6, max(3.8, 2.4 + 0.12 * lines)), layout="constrained")
    # Together, the two repeat after forty runners.
    for runner, style, marker in zip(runners, cycle(_STYLES), cycle(_MARKERS), strict=False):
        for way in WAY_NAMES:
            rows = sorted((r for r in speed.rows if (r.runner, r.way) == (runner, way)), key=lambda r: r.batch_size)
            if not rows:
                continue
            rates = [row.images_per_second for row in rows]
            axes.errorbar(
                [row.batch_size for row in rows],
                [rate.value for rate in rates],
                yerr=[[r.value - r.low for r in rates], [r.high - r.value for r in rates]],
                color=COLOURS[way],
                linestyle=style,
                marker=marker,
                markersize=4,
                capsize=2,
                label=f"{runner}, {WAY_NAMES[way]}",
            )
    batches = sorted({row.batch_size for row in speed.rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images per second")
    return _finished(figure, axes, columns=2)


def quality_plot(result: BenchResult) -> plt.Figure:
    """Fréchet distance of each row with its interval, and the real images' floor as a line."""
    assert result.quality is not None
    rows = [row for row in result.quality.main_rows() if row.distance is not None]
    ways = ["teacher" if row.kind == "control" else row.kind for row in rows]
    figure, axes = plt.subplots(figsize=(6, 0.9 + 0.5 * len(rows)), layout="constrained")
    values = [row.distance or 0.0 for row in rows]
    halves = [0.0 if (i := row.distance_interval) is None else i.high - i.value for row in rows]
    axes.barh([row.name for row in rows], values, xerr=halves, capsize=2, color=[COLOURS[way] for way in ways])
    for index, (value, half) in enumerate(zip(values, halves, strict=True)):
        axes.annotate(f"{value:.0f}", (value + half, index), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    if result.quality.floor is not None:
        axes.axvline(result.quality.floor, color=_INK, linestyle=":", label="real images")
    axes.set_xlabel(f"{result.quality.features} to real images (lower is better)")
    axes.margins(x=0.12)
    return _finished(figure, axes, columns=2)


def cost_plot(quality: Quality) -> plt.Figure:
    """Fréchet distance over UNet passes an image: teacher, students, and the best settings of what needs no training.

    Settings that were tried and not the best are faint.
    """
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    rows = [row for row in quality.rows if row.distance is not None and row.kind != "control"]
    tried = [row for row in rows if row.kind == "alternative"]
    axes.plot([r.cost for r in tried], [r.distance or 0.0 for r in tried], ".", color="#d9dbe0", zorder=1)
    best = sorted(quality.best_alternatives(), key=lambda row: row.cost)
    for method, colour, style in zip(dict.fromkeys(row.method for row in best), _METHODS, _STYLES, strict=False):
        _points(axes, [row for row in best if row.method == method], str(method), colour, style)
    for row in rows:
        if row.kind != "alternative":
            _points(axes, [row], row.name, COLOURS[row.kind], "")
    axes.set_xlabel("UNet passes an image")
    axes.set_ylabel(f"{quality.features} (lower is better)")
    return _finished(figure, axes, columns=2)


_METHODS = ("#c2543a", "#3a8f5c", "#8a5cc2")


def _points(axes: plt.Axes, rows: list[QualityRow], label: str, colour: str, style: Any) -> None:
    values = [row.distance or 0.0 for row in rows]
    halves = [0.0 if (i := row.distance_interval) is None else i.high - i.value for row in rows]
    axes.errorbar(
        [row.cost for row in rows],
        values,
        yerr=halves,
        color=colour,
        linestyle=style,
        marker="o",
        markersize=5,
        capsize=2,
        label=label,
    )


def _finished(figure: plt.Figure, axes: plt.Axes, *, columns: int) -> plt.Figure:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**_LEGEND | {"ncols": columns})
    return figure
