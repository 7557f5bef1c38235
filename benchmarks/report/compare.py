"""Two reports side by side: `boostdiff bench compare A.json B.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import InputError
from ...engine.files import read_json
from ..bench import SCHEMA_VERSION
from ..speed.throughput import RunnerMode
from ..stats import Estimate
from .tables import NOTHING, Table, variant_name


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure that both reports have.

    Attributes:
        name: figure, with its unit.
        a: value in the first report; without an interval, `low` and `high` are the value.
        b: value in the second.
        change: b / a − 1; None where a is zero.
        apart: whether the intervals share no point; None without intervals.
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

    def levels(self) -> list[float]:
        """Coverages of the intervals that were compared, in whole percent, ascending."""
        compared = [row for row in self.differences if row.apart is not None]
        return sorted({round(side.coverage, 2) for row in compared for side in (row.a, row.b)})

    def table(self) -> Table:
        """Values, and whether the intervals, for which a terminal has no room, overlap."""
        headings = ["", "A", "B", "change", "beyond noise"]
        verdicts = {True: "yes", False: "no", None: NOTHING}
        cells = [
            [
                row.name,
                f"{row.a.value:.4g}",
                f"{row.b.value:.4g}",
                NOTHING if row.change is None else f"{row.change:+.1%}",
                verdicts[row.apart],
            ]
            for row in self.differences
        ]
        return Table(headings=headings, cells=cells)


def compare_reports(first: Path, second: Path) -> Comparison:
    """Compare two `report.json`.

    Raises:
        InputError: one can't be read, is no report, or is of another version; or they share no figure.
    """
    reports = [_read(path) for path in (first, second)]
    a, b = (_figures(report) for report in reports)
    shared = [name for name in a if name in b]
    if not shared:
        raise InputError(f"{first} and {second} have no figure in common: compare runs with the same batch sizes")
    provenance = [_flat(report["provenance"]) for report in reports]
    return Comparison(
        differences=[_difference(name, a[name], b[name]) for name in shared],
        settings={
            name: (values[0], values[1])
            for name in sorted(provenance[0].keys() | provenance[1].keys())
            if (values := [side.get(name, NOTHING) for side in provenance])[0] != values[1]
        },
        only=[name for name in (*a, *b) if name not in shared],
    )


def _read(path: Path) -> dict[str, Any]:
    report = read_json(path)
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        kind = f"a report of version {version}" if version else "no report of `boostdiff bench`"
        raise InputError(f"{path} is {kind}: this program compares reports of version {SCHEMA_VERSION}; measure again")
    return report


def _figures(report: dict[str, Any]) -> dict[str, Estimate | float]:
    """Every comparable figure by its name; those without an interval as plain numbers."""
    figures: dict[str, Estimate | float] = {}

    def name_of(key: dict[str, str]) -> str:
        return variant_name(RunnerMode(**key))

    try:
        for ratio in report["speed"]["ratios"]:
            part = "whole images" if ratio["part"] == "images" else "UNet step"
            pair = f"{name_of(ratio['faster'])} over {name_of(ratio['slower'])}"
            figures[f"{pair}, {part}, batch {ratio['batch_size']}, x"] = Estimate(**ratio["estimate"])
        for row in report["speed"]["rows"]:
            name = name_of({"runner": row["runner"], "mode": row["mode"]})
            figures[f"{name}, batch {row['batch_size']}, images/s"] = Estimate(**row["images_per_second"])
        quality = report["quality"] or {}
        for row in quality.get("rows", ()):
            for key, label in _QUALITY.items():
                interval = row["distance_interval"] if key == "distance" else row[key]
                if row[key] is not None:
                    label = label or quality["caption_label"]
                    figures[f"{row['name']}, {label}"] = (
                        Estimate(**interval) if isinstance(interval, dict) else row[key]
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"a report is damaged: {error} is missing or of the wrong type; measure again") from None
    return figures


_QUALITY = {
    "distance": "distance",
    "delta_to_guided": "ΔFD to the guided teacher",
    "gain_recovered": "guidance gain recovered",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "distance_to_teacher_image": "distance to the teacher's image",
    "caption_score": "",
    "caption_gain_recovered": "guidance gain in caption score recovered",
}
"""Keys of a quality row, and what they are called; the caption score brings its label."""


def _difference(name: str, a: Estimate | float, b: Estimate | float) -> Difference:
    known = isinstance(a, Estimate) and isinstance(b, Estimate)
    one, other = (
        side if isinstance(side, Estimate) else Estimate(value=side, low=side, high=side, coverage=0.0)
        for side in (a, b)
    )
    return Difference(
        name=name,
        a=one,
        b=other,
        change=other.value / one.value - 1 if one.value else None,
        apart=not one.overlaps(other) if known else None,
    )


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Leaves of nested objects by their dotted names; without the students, whose keys are folders."""
    if not isinstance(value, dict):
        return {name: str(value)}
    leaves: dict[str, str] = {}
    for key, inner in value.items():
        if key != "students" or name:
            leaves |= _flat(inner, f"{name}.{key}".lstrip("."))
    return leaves
