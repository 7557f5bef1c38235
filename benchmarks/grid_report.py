"""Show tables of distances: in the terminal, as Markdown, JSON and a page."""

from __future__ import annotations

import html
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from ..engine.files import write_json
from .intervals import GROUPS
from .page import html_table, page
from .report import replaced_files, terminal_table
from .table1 import Grid
from .tables import NOTHING, Table, within


def grid_table(grid: Grid) -> Table:
    """Rows and columns in the order in which they were measured; the paper's FID beside, where it is of this model."""
    columns = list(dict.fromkeys(cell.column for cell in grid.cells))
    cells = []
    for row in dict.fromkeys(cell.row for cell in grid.cells):
        shown = [row]
        for column in columns:
            cell = grid.place(row, column)
            if cell is None:
                shown.append(NOTHING)
                continue
            value = within(cell.interval) if cell.interval else f"{cell.distance:.1f}"
            shown.append(value if cell.paper is None else f"{value} (paper: FID {cell.paper:.1f})")
        cells.append(shown)
    return ["", *columns], cells


def note(grid: Grid) -> str:
    """How it was measured."""
    told = grid.provenance
    return (
        f"{grid.features} to {grid.reference_images} real images, lower is better; model {told['model']}, "
        f"N = {grid.images} images a cell, same prompts, seeds (from {told['seed']} on) and noise. In brackets: 95%, "
        f"jackknife over {GROUPS} groups of prompts. Two passes a step for the teacher where w > 1, else one."
    )


def markdown(grid: Grid) -> str:
    """A title, the table, and how it was measured."""
    headings, cells = grid_table(grid)
    lines = [headings, ["---"] * len(headings), *cells]
    rows = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([f"# {grid.title}", "", *rows, "", note(grid), ""])


def terminal_grids(grids: list[Grid]) -> RenderableType:
    """For rich; with columns as rows, of which a terminal has more."""
    parts: list[RenderableType] = []
    for grid in grids:
        headings, cells = grid_table(grid)
        turned = [list(line) for line in zip(headings, *cells, strict=True)]
        parts += [terminal_table(grid.title, (turned[0], turned[1:])), Text(note(grid), style="dim")]
    return Group(*parts)


def write_grids(grids: list[Grid], output: Path) -> None:
    """Write `NAME.md`, `NAME.json` and `NAME.html` of each table; all else in the folder stays."""
    names = [f"{grid.name}.{kind}" for grid in grids for kind in ("md", "html", "json")]
    with replaced_files(output, names) as folder:
        for grid in grids:
            (folder / f"{grid.name}.md").write_text(markdown(grid), encoding="utf-8")
            told = f'<p class="note">{html.escape(note(grid))}</p>'
            content = page(grid.title, [html_table(grid_table(grid)), told], grid.provenance)
            (folder / f"{grid.name}.html").write_text(content, encoding="utf-8")
            write_json(folder / f"{grid.name}.json", grid.as_json())
