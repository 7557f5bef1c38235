"""Show what `bench compose` measured: in the terminal, as Markdown, JSON and a page with the Pareto front."""

from __future__ import annotations

import html
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from ..quality.composition import Composition, Row, on_front
from ..stats import CONFIDENCE
from .output_folder import files_of, written_results
from .page import html_note, html_plot, html_table, page
from .plots import COLORS, finished
from .report import terminal_table
from .tables import Table, formatted, intervals_note

TITLE = "What to take: quality and time"
COLOR_OF_ROLE = COLORS | {"alternative": "#c98a2b"}
NAME = "compose"


def composed_table(result: Composition) -> Table:
    """All rows, numbered, the fastest first; a star where none is at least as fast and nearer to real images."""
    label, rows = result.caption_label, []
    for number, row in enumerate(_fastest_first(result), 1):
        quality = row.quality
        captions = {
            f"{label}": formatted(quality.caption_score),
            f"Δ {label}": formatted(quality.caption_delta_to_guided, "+.1f"),
        }
        rows.append(
            {
                "sampling": f"{number}. {quality.name}{' *' if row.on_front else ''}",
                "passes per image": f"{quality.cost}",
                "ms per image": formatted(1e3 * row.seconds_per_image.value),
                "times as fast as stock": formatted(row.speedup, ".2fx"),
                f"{result.features} [95%]": formatted(quality.distance_interval or quality.distance),
                "ΔFD to the teacher": formatted(quality.delta_to_guided, "+.1f"),
                **(captions if label else {}),
                "distance to the teacher's image": f"{quality.distance_to_teacher_image:.3f}",
            }
        )
    return Table.of(rows, main=(0, 3, 5, *((7,) if label else ())), narrow=(0, 3, 5))


def note(result: Composition) -> str:
    """How it was measured."""
    coverage = min([CONFIDENCE, *(row.speedup.coverage for row in result.rows)])
    return (
        f"Model {result.provenance['model']}; batches of {result.batch_size}, from prompts to pixels, medians of "
        f"{result.runs} rounds' ratios, all rows interleaved; their intervals have a coverage of {coverage:.0%}. Stock "
        f"diffusers: its pipeline call, eager, with guidance in {result.steps} steps, "
        f"{1e3 * result.stock_seconds.value:.1f} ms per image. Quality: N = {result.images} images per row by the same "
        f"runner, same prompts, seeds and noise; teacher: {result.rows[0].quality.name}. "
        f"{intervals_note(result.images)} *: no row is at least as fast and nearer to real images (Pareto front of the "
        "point estimates)."
    )


def markdown(result: Composition) -> str:
    """A title, the verdict, the table, and how it was measured."""
    left_out = [f"- {name} was left out: {reason}" for name, reason in result.left_out.items()]
    parts = [f"# {TITLE}", result.verdict(), composed_table(result).markdown(), *left_out, note(result)]
    return "\n\n".join(parts) + "\n"


def terminal_composed(result: Composition) -> RenderableType:
    """For rich."""
    left_out = [Text(f"{name} was left out: {reason}", style="dim") for name, reason in result.left_out.items()]
    table = terminal_table(TITLE, composed_table(result))
    return Group(table, Text(note(result), style="dim"), *left_out, Text(f"\n{result.verdict()}", style="bold"))


def front_plot(result: Composition) -> plt.Figure:
    """Distance, and caption score below it, over the speed; each with its Pareto front and row numbers."""
    panels: list[tuple[str, Callable[[Row], float], int]] = [
        (f"{result.features} (lower is better)", lambda row: row.quality.distance or 0.0, 1)
    ]
    if result.caption_label:
        score = attrgetter("quality.caption_value")
        panels.append((result.caption_label, score, -1))
    figure, axes = plt.subplots(len(panels), figsize=(7.5, 3.4 * len(panels)), layout="constrained", squeeze=False)
    rows = _fastest_first(result)
    for (place,), (heading, figure_of, sign) in zip(axes, panels, strict=True):
        for role in dict.fromkeys(row.quality.role for row in result.rows):
            of_role = [row for row in rows if row.quality.role == role]
            place.scatter(
                [*map(_speedup, of_role)],
                [*map(figure_of, of_role)],
                color=COLOR_OF_ROLE[role],
                label={"unguided": "teacher, no guidance", "alternative": "without training"}.get(role, role),
                zorder=3,
            )
        found = zip(rows, on_front(rows, [sign * figure_of(row) for row in rows]), strict=True)
        front = {number: (_speedup(row), figure_of(row)) for number, (row, on) in enumerate(found, 1) if on}
        for number, point in front.items():
            place.annotate(str(number), point, (4, 5), textcoords="offset points", fontsize="small")
        place.plot(*zip(*front.values(), strict=True), color=COLORS["student"], linewidth=1)
        place.set(xscale="log", xlabel="times as fast as stock diffusers with guidance", ylabel=heading)
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.xaxis.set_minor_formatter(NullFormatter())
        finished(figure, place, columns=4)
    return figure


def _fastest_first(result: Composition) -> list[Row]:
    return sorted(result.rows, key=_speedup, reverse=True)


def _speedup(row: Row) -> float:
    return row.speedup.value


def write_composed(result: Composition, output: Path) -> None:
    """Write `compose.md`, `compose.json` and `compose.html`; all else in the folder stays."""
    with written_results(output, files_of(NAME), result.as_json()) as folder:
        (folder / f"{NAME}.md").write_text(markdown(result), encoding="utf-8")
        alt = f"{result.features} and caption score over the speed, with the Pareto front"
        parts = [
            f'<p class="verdict">{html.escape(result.verdict())}</p>',
            html_plot(front_plot(result), alt),
            html_table(composed_table(result)),
            *(html_note(f"{name} was left out: {reason}") for name, reason in result.left_out.items()),
            html_note(note(result)),
        ]
        (folder / f"{NAME}.html").write_text(page(TITLE, parts, result.provenance), encoding="utf-8")
