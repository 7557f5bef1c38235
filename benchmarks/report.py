"""Show a benchmark: tables in the terminal, `report.json`, one self-contained `report.html`, pictures."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..engine.files import write_json
from ..engine.pictures import labelled_grid
from .bench import BenchResult
from .features import DISTANCE_NAME
from .quality import QualityRow
from .throughput import Spread, Throughput

matplotlib.use("Agg")

import matplotlib.pyplot as plt

GRID_ROWS = 8
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TEACHER, _UNGUIDED, _STUDENT = "#8a8f98", "#c9cdd3", "#2f6fed"

_LEGEND: dict[str, Any] = {"frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
"""Above the plot, where no bar reaches."""

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1e1e24}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.verdict{font-size:1.2rem;background:#eef3fe;border-left:5px solid #2f6fed;padding:.8rem 1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
img{max-width:100%;height:auto}pre{overflow-x:auto;background:#f6f6f8;padding:.8rem;font-size:.82rem}
.note{color:#5a5f6a;font-size:.9rem}
"""


def ratio(spread: Spread) -> str:
    """Median [p10 to p90] of a ratio."""
    return f"{spread.median:.2f}x [{spread.p10:.2f}–{spread.p90:.2f}]"


def speed_table(rows: list[Throughput]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells."""
    headings = ["runner", "", "teacher ms", "student ms", "ratio [p10–p90]"]
    cells = []
    for row in rows:
        name = f"{row.runner} {_PRECISIONS.get(row.precision, row.precision)}"
        for what, teacher, student, times in (
            ("UNet step", row.unet_teacher, row.unet_student, row.unet_ratio),
            ("whole images", row.image_teacher, row.image_student, row.image_ratio),
        ):
            cells.append([name, what, f"{teacher.median * 1e3:.1f}", f"{student.median * 1e3:.1f}", ratio(times)])
    return headings, cells


def narrow(headings: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the passes, which a terminal of 80 columns has no room for."""
    keep = [index for index, heading in enumerate(headings) if heading != "passes"]
    return [headings[i] for i in keep], [[row[i] for i in keep] for row in cells]


def quality_table(rows: list[QualityRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; a dash where nothing was measured."""

    def number(value: float | None, pattern: str = "{:.1f}") -> str:
        return "–" if value is None else pattern.format(value)

    headings = ["", "passes", DISTANCE_NAME, "KID ×1000", "paired", "background", "recovered"]
    cells = [
        [
            row.name,
            str(row.passes),
            number(row.distance),
            "–" if row.kid is None or row.kid_error is None else f"{row.kid * 1e3:.2f} ± {row.kid_error * 1e3:.2f}",
            f"{row.paired:.3f}",
            number(row.background, "{:.0%}"),
            number(row.recovered, "{:.0%}"),
        ]
        for row in rows
    ]
    return headings, cells


def _terminal_table(title: str, headings: list[str], cells: list[list[str]]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    return table


def speed_title(result: BenchResult) -> str:
    """What the speed table shows."""
    best = result.best
    runs = f"medians of {best.unet_ratio.runs} UNet steps and {best.image_ratio.runs} whole batches"
    return f"Speed: batch {best.batch_size}, {best.steps} steps, {runs}, teacher and student in turn"


def quality_note(result: BenchResult) -> str:
    """How the quality table was measured."""
    quality = result.quality
    assert quality is not None
    note = f"N = {quality.images} images a row, same prompts, seeds and noise"
    if quality.floor is not None:
        note += (
            f"; real images themselves score {quality.floor:.1f} at this N ({quality.reference_images} in reference)"
        )
    return f"{note}. Paired: cosine distance of features to the guided teacher's image of the same seed."


def terminal_report(result: BenchResult) -> RenderableType:
    """Tables and verdict for rich."""
    parts: list[RenderableType] = [_terminal_table(speed_title(result), *speed_table(result.throughputs))]
    if result.quality:
        parts.append(_terminal_table("Quality", *narrow(*quality_table(result.quality.rows))))
        parts.append(Text(quality_note(result), style="dim"))
    parts.append(Text(f"\n{result.verdict()}", style="bold"))
    return Group(*parts)


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def speed_plot(rows: list[Throughput]) -> bytes:
    """Images per second of teacher and student on each runner, with p10–p90, as PNG."""
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.9 * len(rows)), layout="constrained")
    for index, row in enumerate(rows):
        for offset, spread, colour in (
            (0.2, row.image_teacher, _TEACHER),
            (-0.2, row.image_student, _STUDENT),
        ):
            rate = row.batch_size / spread.median
            error = [[rate - row.batch_size / spread.p90], [row.batch_size / spread.p10 - rate]]
            axes.barh(index + offset, rate, 0.36, color=colour, xerr=error, capsize=3)
    axes.set_yticks(range(len(rows)), [f"{row.runner} {row.precision}" for row in rows])
    axes.set_xlabel("images per second")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (_TEACHER, _STUDENT)]
    axes.legend(handles, ["teacher, two passes", "student, one pass"], **_LEGEND)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def quality_plot(result: BenchResult) -> bytes:
    """Fréchet distance of each row above zero, with the real images' floor as a line, as PNG."""
    assert result.quality is not None
    rows = [row for row in result.quality.rows if row.distance is not None]
    colours = [_STUDENT if "student" in row.name else _UNGUIDED if row.passes == 1 else _TEACHER for row in rows]
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.5 * len(rows)), layout="constrained")
    bars = axes.barh([row.name for row in rows], [row.distance or 0.0 for row in rows], color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.invert_yaxis()
    if result.quality.floor is not None:
        axes.axvline(result.quality.floor, color="#1e1e24", linestyle=":", label="real images")
        axes.legend(**_LEGEND)
    axes.set_xlabel(f"{DISTANCE_NAME} to real images (lower is better)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def comparison_grid(result: BenchResult) -> Image.Image:
    """The first prompts, one column a row of the quality table but the reseeded one."""
    assert result.quality is not None
    names = [row.name for row in result.quality.rows if "reseeded" not in row.name]
    columns = {name: result.quality.samples[name][:GRID_ROWS] for name in names}
    return labelled_grid(columns, result.prompts[: len(columns[names[0]])])


def _html_table(headings: list[str], cells: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_image(data: bytes, alt: str) -> str:
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'


def html_report(result: BenchResult, provenance: str) -> str:
    """One self-contained page."""
    model = html.escape(str(result.provenance["model"]))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>BoostDiff: {model}</title><style>{_STYLE}</style></head><body>",
        f'<h1>BoostDiff benchmark of {model}</h1><p class="verdict">{html.escape(result.verdict())}</p>',
        f"<h2>{html.escape(speed_title(result))}</h2>",
        _html_table(*speed_table(result.throughputs)),
        _html_image(speed_plot(result.throughputs), "Images per second of teacher and student on each runner"),
    ]
    parts += [
        f'<p class="note">{html.escape(name)} was left out: {html.escape(reason)}</p>'
        for name, reason in result.skipped.items()
    ]
    if result.quality:
        parts += ["<h2>Quality</h2>", _html_table(*quality_table(result.quality.rows))]
        parts.append(f'<p class="note">{html.escape(quality_note(result))}</p>')
        if result.quality.rows[0].distance is not None:
            parts.append(_html_image(quality_plot(result), f"{DISTANCE_NAME} of each way of sampling"))
        buffer = io.BytesIO()
        comparison_grid(result).save(buffer, format="PNG")
        parts.append(_html_image(buffer.getvalue(), "Images of each prompt by teacher and student, same seeds"))
    parts.append(f"<h2>Provenance</h2><pre>{html.escape(provenance)}</pre></body></html>")
    return "\n".join(parts)


def write_report(result: BenchResult, folder: Path) -> None:
    """Write `report.json`, `report.html`, `speed.png`, `quality.png` and `grid.png` into a folder."""
    write_json(folder / "report.json", result.as_json())
    provenance = (folder / "report.json").read_text(encoding="utf-8")
    (folder / "report.html").write_text(html_report(result, provenance), encoding="utf-8")
    (folder / "speed.png").write_bytes(speed_plot(result.throughputs))
    if result.quality:
        if result.quality.rows[0].distance is not None:
            (folder / "quality.png").write_bytes(quality_plot(result))
        comparison_grid(result).save(folder / "grid.png")
