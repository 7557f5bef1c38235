"""Show a benchmark: tables in the terminal, `report.json`, `report.html`, a grid of images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...engine.pictures import labelled_grid
from ..bench import BenchResult
from . import tables
from .output_folder import REPORT_FILES, written_results
from .page import GRID_ROWS, html_report


def terminal_table(title: str, table: tables.Table) -> Table:
    """The main columns for rich; the first column to the left, figures to the right."""
    brief = table.brief()
    shown = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(brief.headings):
        # Of a model or a student it may hold a path.
        shown.add_column(Text(heading), justify="left" if index == 0 else "right", overflow="fold")
    for row in brief.cells:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def terminal_report(result: BenchResult) -> RenderableType:
    """Tables and verdict for rich."""
    parts: list[RenderableType] = [
        terminal_table("Speed", tables.speed_table(result.speed)),
        terminal_table("Speed-up", tables.ratio_table(result.speed)),
        Text(tables.speed_note(result), style="dim"),
    ]
    if result.quality:
        parts.append(terminal_table("\nQuality", tables.quality_table(result.quality)))
        parts.append(Text(tables.quality_note(result.quality), style="dim"))
        if result.quality.best_baselines():
            shown = tables.baselines_table(result.quality)
            parts.append(terminal_table("\nWithout training, best of each sweep", shown))
            parts.append(Text(tables.BASELINES_NOTE, style="dim"))
    parts += [Text(f"{name} was left out: {reason}", style="dim") for name, reason in result.skipped.items()]
    parts.append(Text(f"\n{result.verdict()}", style="bold"))
    return Group(*parts)


def comparison_grid(result: BenchResult) -> Image.Image:
    """The first prompts, one column per row of the quality table but the reseeded one."""
    assert result.quality is not None
    names = [row.name for row in result.quality.main_rows() if row.role != "reseeded"]
    columns = {name: result.quality.samples[name][:GRID_ROWS] for name in names}
    return labelled_grid(columns, result.prompts[: len(columns[names[0]])])


def write_report(result: BenchResult, output: Path) -> None:
    """Write `REPORT_FILES`, as far as there is something to show; all else in the folder stays."""
    with written_results(output, REPORT_FILES, result.as_json()) as folder:
        (folder / "report.html").write_text(html_report(result), encoding="utf-8")
        if result.quality:
            comparison_grid(result).save(folder / "grid.png")
