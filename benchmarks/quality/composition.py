"""Combinations of steps, students and runners, compared by quality and time: what `bench compose` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..stats import Estimate
from .quality import QualityRow

SCHEMA_VERSION = 1
"""Version of `compose.json`."""

TOLERANCES = (0.01, 0.03, 0.10)
"""Losses of quality that the verdict names the fastest row for."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One combination, measured.

    Attributes:
        runner: name of the UNet's runner.
        precision: of the UNet.
        seconds_per_image: median over the rounds.
        speedup: how many times as fast as stock diffusers with guidance in `Composition.steps`.
        quality: distances, scores and passes; compared with the guided teacher in `Composition.steps`.
        loss: the larger of the relative losses of distance and caption score against that teacher; below zero where
            both are better.
        on_front: whether no row is at least as many times as fast as stock diffusers and nearer to real images.
    """

    runner: str
    precision: str
    seconds_per_image: Estimate
    speedup: Estimate
    quality: QualityRow
    loss: float
    on_front: bool = False


@dataclass(frozen=True, kw_only=True)
class Composition:
    """All combinations.

    Attributes:
        rows: the guided teacher in the most steps first.
        steps: those, which everything is compared with.
        stock_seconds: per image, of stock diffusers with guidance in as many steps.
        images: N, of each row.
        batch_size: images drawn together.
        runs: timed batches per row.
        left_out: reason by row that could not be measured.
    """

    rows: list[Row]
    steps: int
    stock_seconds: Estimate
    images: int
    batch_size: int
    runs: int
    features: str
    caption_label: str | None
    left_out: dict[str, str]
    provenance: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema_version": SCHEMA_VERSION, "verdict": self.verdict()} | asdict(self)

    def fastest_within(self, tolerance: float) -> Row | None:
        """The fastest row whose loss is at most this, by its value; None if there is none."""
        rows = [row for row in self.rows if row.loss <= tolerance]
        return max(rows, key=lambda row: row.speedup.value, default=None)

    def verdict(self) -> str:
        """The fastest row for each of `TOLERANCES`, by point estimates, with the intervals of what it was chosen by.

        Intervals that had to lie within 1% would choose nothing: at N = 200 they reach some 3% to either side.
        """
        teacher = self.rows[0].quality.name
        figures = f"{self.features}{' and caption score' if self.caption_label else ''}"
        chosen: dict[int, tuple[Row, list[str]]] = {}
        for tolerance in TOLERANCES:
            if row := self.fastest_within(tolerance):
                chosen.setdefault(id(row), (row, []))[1].append(f"{tolerance:.0%}")
        found = "; ".join(
            f"within {' and '.join(tolerances)} it is {row.quality.name}{_differences(row.quality)}, "
            f"{row.speedup:.2fx} as fast as stock diffusers with guidance"
            for row, tolerances in chosen.values()
        )
        verdict = f"By point estimates, the fastest of what loses little of {figures} against {teacher}: {found}."
        return verdict if self.caption_label else f"{verdict} Whether prompts are followed was not measured (--clip)."


def _differences(row: QualityRow) -> str:
    """Those to the teacher, with their intervals, in brackets; empty for itself."""
    found = {"ΔFD": row.delta_to_guided, "Δ caption score": row.caption_delta_to_guided}
    words = ", ".join(f"{name} {delta:+.1f}" for name, delta in found.items() if delta)
    return f" ({words})" if words else ""


def on_front(rows: Sequence[Row], figures: Sequence[float]) -> list[bool]:
    """Whether each row is on the Pareto front: no row is at least as many times as fast and has a lower figure."""
    points = [(row.speedup.value, figure) for row, figure in zip(rows, figures, strict=True)]
    return [not any(s >= speedup and f < figure for s, f in points) for speedup, figure in points]


def with_front(rows: Sequence[Row]) -> list[Row]:
    """The rows with `Row.on_front` set."""
    found = on_front(rows, [row.quality.distance or 0.0 for row in rows])
    return [replace(row, on_front=on) for row, on in zip(rows, found, strict=True)]


def loss_of(row: QualityRow, teacher: QualityRow) -> float:
    """See `Row.loss`; of distance alone where there is no caption score."""
    assert row.distance is not None
    assert teacher.distance is not None
    losses = [row.distance / teacher.distance - 1]
    if row.caption_value is not None and teacher.caption_value:
        losses.append(1 - row.caption_value / teacher.caption_value)
    return max(losses)
