"""Two reports side by side: `boostdiff bench --compare A.json B.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import InputError
from ...engine.files import read_json
from ..bench import SCHEMA_VERSION
from ..stats import Estimate
from .tables import NOTHING, WAY_NAMES, Table


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure that both reports have.

    Attributes:
        name: what it is, with its unit.
        a: in the first report; without an interval, `low` and `high` are the value.
        b: in the second.
        change: b / a − 1; None where a is zero.
        apart: whether the intervals share no point; None where there are none.
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
        settings: values of both by name, where model, settings, hardware or versions differ.
        only: names of the figures that one of the reports lacks.
    """

    differences: list[Difference]
    settings: dict[str, tuple[str, str]]
    only: list[str]

    def levels(self) -> list[float]:
        """Coverages of the intervals that were compared, in whole percent, ascending."""
        compared = [row for row in self.differences if row.apart is not None]
        return sorted({round(side.coverage, 2) for row in compared for side in (row.a, row.b)})

    def table(self) -> Table:
        """Headings and cells; the intervals, for which a terminal has no room, show in the last column alone."""
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
        return headings, cells


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
    told = [_flat(report["provenance"]) for report in reports]
    return Comparison(
        differences=[_difference(name, a[name], b[name]) for name in shared],
        settings={
            name: (values[0], values[1])
            for name in sorted(told[0].keys() | told[1].keys())
            if (values := [side.get(name, NOTHING) for side in told])[0] != values[1]
        },
        only=[name for name in (*a, *b) if name not in shared],
    )


def _read(path: Path) -> dict[str, Any]:
    report = read_json(path)
    version = report.get("schema_version")
    if version != SCHEMA_VERSION:
        found = f"of version {version}" if version else "no report of `boostdiff bench`"
        raise InputError(f"{path} is {found}: this version compares reports of version {SCHEMA_VERSION}; measure again")
    return report


def _figures(report: dict[str, Any]) -> dict[str, Estimate | float]:
    """Every comparable figure by its name; those without an interval as plain numbers."""
    found: dict[str, Estimate | float] = {}
    try:
        for ratio in report["speed"]["ratios"]:
            part = "whole images" if ratio["part"] == "images" else "UNet step"
            name = f"{ratio['faster']} over {ratio['slower']}, {part}, batch {ratio['batch_size']}, x"
            found[name] = Estimate(**ratio["estimate"])
        for row in report["speed"]["rows"]:
            name = f"{row['runner']} {WAY_NAMES[row['way']]}, batch {row['batch_size']}, images/s"
            found[name] = Estimate(**row["images_per_second"])
        for row in (report["quality"] or {}).get("rows", ()):
            for key in ("distance", "recovered", "kid", "precision", "recall", "paired", "clip"):
                value = row[key]
                # A CLIP score brings its interval along.
                interval = value if isinstance(value, dict) else row.get(f"{key}_interval")
                # A share of what is within noise means nothing.
                if value is not None and (key != "recovered" or interval):
                    found[f"{row['name']}, {key}"] = Estimate(**interval) if interval else value
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"a report is damaged: {error} is missing or of the wrong type; measure again") from None
    return found


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
    """Leaves of nested objects by their dotted names; students are named by their folders, which mean nothing here."""
    if not isinstance(value, dict):
        return {name: str(value)}
    leaves: dict[str, str] = {}
    for key, inner in value.items():
        if key != "students" or name:
            leaves |= _flat(inner, f"{name}.{key}".lstrip("."))
    return leaves
