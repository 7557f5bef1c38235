"""Show a table of distances: in the terminal, as Markdown, JSON and a page."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from ..table1 import Cell, Grid
from .output_folder import files_of, written_results
from .page import html_note, html_plot, html_table, page
from .plots import sweep_plot
from .report import terminal_table
from .tables import NOTHING, Table, formatted, intervals_note


def _table(grid: Grid, shown: Callable[[Cell], str]) -> Table:
    """Rows and columns in the order in which they were measured; without rows that show nothing."""
    columns, cells = list(dict.fromkeys(cell.column for cell in grid.cells)), []
    for row in dict.fromkeys(cell.quality.name for cell in grid.cells):
        found = [grid.cell(row, column) for column in columns]
        cells.append([row, *(NOTHING if cell is None else shown(cell) for cell in found)])
    return Table(headings=["sampling", *columns], cells=[line for line in cells if set(line[1:]) != {NOTHING}])


def grid_table(grid: Grid) -> Table:
    """The distances; the paper's FID beside, where it is of this model and ours is FID."""

    def shown(cell: Cell) -> str:
        value = formatted(cell.quality.distance_interval or cell.quality.distance)
        return value if cell.paper is None else f"{value} (paper: FID {cell.paper:.1f})"

    return _table(grid, shown)


DELTA = "ΔFD to the teacher at the top of the column (below zero: closer to real images), with a paired interval:"
CAPTIONS = "{}: 100 times the cosine of image and prompt, higher is better:"
CAPTION_DELTA = "Its difference to the teacher at the top of the column:"


def further_tables(grid: Grid) -> list[tuple[str, str, Table]]:
    """The tables that follow the distances, as far as they hold figures: title, explanation, table."""
    label = grid.caption_label or ""

    def table(figure: str, spec: str = ".1f") -> Table:
        return _table(grid, lambda cell: formatted(getattr(cell.quality, figure), spec))

    tables = (
        ("ΔFD to the teacher at the top", DELTA, table("delta_to_guided", "+.1f")),
        (label, CAPTIONS.format(label), table("caption_score")),
        (f"Δ {label}", CAPTION_DELTA, table("caption_delta_to_guided", "+.1f")),
    )
    return [(title, words, table) for title, words, table in tables if table.cells]


def note(grid: Grid) -> str:
    """How it was measured."""
    return (
        f"{grid.features} to {grid.reference_images} real images, lower is better; model {grid.provenance['model']}, "
        f"N = {grid.images} images per cell, same prompts, seeds (from {grid.provenance['config']['seed']} on) and "
        f"noise. {intervals_note(grid.images)} A guided step of the teacher is two passes, all others are one."
    )


def markdown(grid: Grid) -> str:
    """A title, the tables, and how they were measured."""
    further = [line for _, words, table in further_tables(grid) for line in (words, "", table.markdown(), "")]
    notes = [line for each in grid.provenance["notes"] for line in ("", f"- {each}")]
    return "\n".join([f"# {grid.title}", "", grid_table(grid).markdown(), "", *further, note(grid), *notes, ""])


def terminal_grid(grid: Grid) -> RenderableType:
    """For rich; with columns as rows, for which a terminal has more room."""
    tables = [(grid.title, grid_table(grid)), *((title, table) for title, _, table in further_tables(grid))]
    return Group(*(terminal_table(title, _turned(table)) for title, table in tables), Text(note(grid), style="dim"))


def _turned(table: Table) -> Table:
    first, *others = [list(line) for line in zip(table.headings, *table.cells, strict=True)]
    return Table(headings=["", *first[1:]], cells=others)


def write_grid(grid: Grid, output: Path) -> None:
    """Write `NAME.md`, `NAME.json` and `NAME.html`; all else in the folder stays."""
    with written_results(output, files_of(grid.name), grid.as_json()) as folder:
        (folder / f"{grid.name}.md").write_text(markdown(grid), encoding="utf-8")
        parts = [html_table(grid_table(grid))]
        if grid.name == "sweep":
            alt = f"{grid.features} and caption score over the guidance scale, with intervals"
            parts.insert(0, html_plot(sweep_plot(grid), alt))
        for _, words, table in further_tables(grid):
            parts += [f"<p>{html.escape(words)}</p>", html_table(table)]
        content = page(grid.title, [*parts, html_note(note(grid))], grid.provenance)
        (folder / f"{grid.name}.html").write_text(content, encoding="utf-8")
