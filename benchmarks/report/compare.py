"""Two reports side by side: `boostdiff bench compare A.json B.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ...engine.errors import InputError
from ...engine.files import read_json
from ..bench import SCHEMA_VERSION
from ..speed.throughput import RunnerMode
from ..stats import CONFIDENCE, Estimate
from .report import terminal_table
from .tables import NOTHING, Table, formatted, variant_name

QUALITY = ("distance", "delta_to_guided", "gain_recovered", "kid", "distance_to_teacher_image")
CAPTIONS = ("caption_score", "caption_delta_to_guided", "caption_gain_recovered")
"""Keys of a quality row that are compared."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure that both reports have.

    Attributes:
        name: figure, with its unit.
        a: value in the first report; without an interval, `low` and `high` are the value.
        b: value in the second.
        change: b / a − 1; None of differences, and where a is next to nothing.
        apart: whether the intervals share no point; None without intervals of 95%.
    """

    name: str
    a: Estimate
    b: Estimate
    change: float | None
    apart: bool | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that two reports can be compared by.

    Attributes:
        differences: in the first report's order.
        settings: both values by name, where model, settings, hardware or versions differ.
        only: names of the figures that only one report has.
    """

    differences: list[Difference]
    settings: dict[str, tuple[str, str]]
    only: list[str]


def compare_reports(first: Path, second: Path) -> Comparison:
    """Compare two `report.json`; an InputError where one is no report of this version, or they share no figure."""
    reports = [_read(path) for path in (first, second)]
    a, b = (_figures(report) for report in reports)
    shared = [name for name in a if name in b]
    if not shared:
        raise InputError(f"{first} and {second} have no figure in common: compare runs with the same batch sizes")
    here, there = (_flat(report["provenance"] | {"students": _adapters(report)}) for report in reports)
    return Comparison(
        differences=[_difference(name, a[name], b[name]) for name in shared],
        settings={
            name: (here.get(name, NOTHING), there.get(name, NOTHING))
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        },
        only=[name for name in (*a, *b) if name not in shared],
    )


def _difference(name: str, a: Estimate, b: Estimate) -> Difference:
    apart = not a.overlaps(b) if min(a.coverage, b.coverage) >= CONFIDENCE else None
    relative = "delta to" not in name and abs(a.value) > 1e-9
    return Difference(name=name, a=a, b=b, change=b.value / a.value - 1 if relative else None, apart=apart)


def _read(path: Path) -> dict[str, Any]:
    report = read_json(path)
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        found = f"a report of version {version}" if version else "no report of `boostdiff bench`"
        raise InputError(f"{path} is {found}: this program compares reports of version {SCHEMA_VERSION}; measure again")
    if not isinstance(report.get("provenance"), dict):
        raise InputError(f"{path} is damaged: it has no provenance; measure again")
    return report


def _adapters(report: dict[str, Any]) -> str:
    """Of the students, which may lie in other folders."""
    students = report["provenance"].get("students")
    of_each = students.values() if isinstance(students, dict) else ()
    return ", ".join(str(each.get("adapter_sha256")) for each in of_each if isinstance(each, dict))


def _figures(report: dict[str, Any]) -> dict[str, Estimate]:
    """Every comparable figure by its name; those without an interval have no coverage."""
    figures: dict[str, Any] = {}
    try:
        for ratio in report["speed"]["ratios"]:
            faster, slower = (variant_name(RunnerMode(**ratio[side])) for side in ("faster", "slower"))
            part = "whole images" if ratio["part"] == "images" else "UNet step"
            figures[f"{faster} over {slower}, {part}, batch {ratio['batch_size']}, x"] = ratio["estimate"]
        for row in report["speed"]["rows"]:
            name = variant_name(RunnerMode(row["runner"], row["mode"]))
            figures[f"{name}, batch {row['batch_size']}, images/s"] = row["images_per_second"]
        quality = report["quality"] or {"rows": []}
        for row in quality["rows"]:
            for key in (*QUALITY, *CAPTIONS):
                value = (row["distance_interval"] if key == "distance" else None) or row[key]
                figures[f"{row['name']}, {key.replace('_', ' ')}"] = value
        return {
            name: Estimate(**{key: float(number) for key, number in value.items()})
            if isinstance(value, dict)
            else Estimate(value=float(value), low=float(value), high=float(value), coverage=0)
            for name, value in figures.items()
            if value is not None
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"a report is damaged, a figure is missing or no number ({error}): measure again") from None


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Leaves of nested objects by their dotted names."""
    if not isinstance(value, dict):
        return {name: str(value)}
    return {
        path: leaf for key, inner in value.items() for path, leaf in _flat(inner, f"{name}.{key}".lstrip(".")).items()
    }


def terminal_comparison(comparison: Comparison) -> RenderableType:
    """Two reports side by side for rich, and the settings that differ; it has no room for the intervals."""
    rows = [
        {
            "": row.name,
            "A": f"{row.a.value:.4g}",
            "B": f"{row.b.value:.4g}",
            "change": f"{row.b.value - row.a.value:+.3g}" if row.change is None else formatted(row.change, "+.1%"),
            "intervals apart": NOTHING if row.apart is None else "yes" if row.apart else "no",
        }
        for row in comparison.differences
    ]
    notes = [f"{name}: {a} in A, {b} in B" for name, (a, b) in comparison.settings.items()]
    notes.insert(
        0,
        "Intervals apart: the two, of 95% each, share no point. "
        "Figures of the same prompts and seeds may differ where they overlap.",
    )
    if comparison.only:
        notes.append(f"{len(comparison.only)} figures are in one report alone: --json names them.")
    return Group(terminal_table("A against B", Table.of(rows)), *(Text(note, style="dim") for note in notes))
