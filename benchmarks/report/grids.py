"""Show tables of distances: in the terminal, as Markdown, JSON and a page."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from ...engine.files import write_json
from ..quality.distances import GROUPS
from ..table1 import Cell, Grid
from .page import html_table, page
from .report import replaced_files, terminal_table
from .tables import NOTHING, Table, within


def _table(grid: Grid, shown: Callable[[Cell], str]) -> Table:
    """Rows and columns in the order in which they were measured."""
    columns = list(dict.fromkeys(cell.column for cell in grid.cells))
    cells = []
    for row in dict.fromkeys(cell.row for cell in grid.cells):
        places = [grid.place(row, column) for column in columns]
        cells.append([row, *(NOTHING if cell is None else shown(cell) for cell in places)])
    return ["sampling", *columns], cells


def grid_table(grid: Grid) -> Table:
    """The distances; the paper's FID beside, where it is of this model."""

    def shown(cell: Cell) -> str:
        value = within(cell.interval) if cell.interval else f"{cell.distance:.1f}"
        return value if cell.paper is None else f"{value} (paper: FID {cell.paper:.1f})"

    return _table(grid, shown)


def _known(table: Table) -> Table | None:
    """Without the rows that have no figure; None where none has."""
    headings, cells = table
    cells = [row for row in cells if set(row[1:]) != {NOTHING}]
    return (headings, cells) if cells else None


def behind_table(grid: Grid) -> Table | None:
    """How much further from real images than the teacher at the top of the column; None where nothing says so."""
    return _known(_table(grid, lambda cell: within(cell.behind, "{:+.1f}")))


def clip_table(grid: Grid) -> Table | None:
    """Mean CLIP scores; None where none were asked for."""
    return _known(_table(grid, lambda cell: within(cell.clip)))


BEHIND = "Behind the teacher at the top of the column (below zero: ahead); the interval is that of the difference:"
CLIP = "CLIP score, 100 times the cosine of image and prompt, higher is better:"


def _further(grid: Grid) -> list[tuple[str, str, Table]]:
    """The tables that follow the distances, each after its title and what it shows."""
    tables = (
        ("behind the teacher at the top", BEHIND, behind_table(grid)),
        ("CLIP score", CLIP, clip_table(grid)),
    )
    return [(title, told, table) for title, told, table in tables if table]


def note(grid: Grid) -> str:
    """How it was measured."""
    told = grid.provenance
    return (
        f"{grid.features} to {grid.reference_images} real images, lower is better; model {told['model']}, "
        f"N = {grid.images} images a cell, same prompts, seeds (from {told['seed']} on) and noise. In brackets: 95%, "
        f"jackknife over {GROUPS} groups of prompts. Two passes a step for the teacher where w > 1, else one."
    )


def _lines(table: Table) -> list[str]:
    headings, cells = table
    lines = [headings, ["---"] * len(headings), *cells]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]


def markdown(grid: Grid) -> str:
    """A title, the tables, and how they were measured."""
    further = [line for _, told, table in _further(grid) for line in (told, "", *_lines(table), "")]
    return "\n".join([f"# {grid.title}", "", *_lines(grid_table(grid)), "", *further, note(grid), ""])


def terminal_grids(grids: list[Grid]) -> RenderableType:
    """For rich; with columns as rows, of which a terminal has more."""
    parts: list[RenderableType] = []
    for grid in grids:
        parts.append(terminal_table(grid.title, _turned(grid_table(grid))))
        parts += [terminal_table(title, _turned(table)) for title, _, table in _further(grid)]
        parts.append(Text(note(grid), style="dim"))
    return Group(*parts)


def _turned(table: Table) -> Table:
    headings, cells = table
    first, *others = [list(line) for line in zip(headings, *cells, strict=True)]
    return ["", *first[1:]], others


def write_grids(grids: list[Grid], output: Path) -> None:
    """Write `NAME.md`, `NAME.json` and `NAME.html` of each table; all else in the folder stays."""
    names = [f"{grid.name}.{kind}" for grid in grids for kind in ("md", "html", "json")]
    with replaced_files(output, names) as folder:
        for grid in grids:
            (folder / f"{grid.name}.md").write_text(markdown(grid), encoding="utf-8")
            told = f'<p class="note">{html.escape(note(grid))}</p>'
            parts = [html_table(grid_table(grid))]
            for _, words, table in _further(grid):
                parts += [f"<p>{html.escape(words)}</p>", html_table(table)]
            content = page(grid.title, [*parts, told], grid.provenance)
            (folder / f"{grid.name}.html").write_text(content, encoding="utf-8")
            write_json(folder / f"{grid.name}.json", grid.as_json())
