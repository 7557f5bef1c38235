"""Quality: guided teacher, unguided teacher and students on the same prompts, seeds and initial noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from ..stats import Estimate, Score
from .distances import Distance, frechet_distance, kernel_distance, paired_feature_distance
from .reference import Reference
from .samples import COLORS, SampleCache, Sampled, SamplingVariant


@dataclass(frozen=True, kw_only=True)
class ColorStatistic:
    """One of `samples.COLORS`, from 0 to 100, and its difference to the guided teacher."""

    value: float
    delta_to_guided: Estimate | None


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One sampling variant, evaluated. What needs real images is None without a reference.

    Attributes:
        name: "teacher w=3", "student lora", …
        role: see `samples.SamplingVariant`.
        method: method of a training-free baseline; rows of one method and cost are one sweep.
        cost: UNet passes per image.
        distance: Fréchet distance to real images.
        distance_interval: over prompts and noise, the reference being fixed; None below N = 4, as all intervals.
        delta_to_guided: ΔFD to the guided teacher, paired; None for itself.
        gain_recovered: share of the guidance gain in distance recovered, for students and baselines; None where the
            gain is not beyond noise.
        kid: kernel distance to real images, the mean over random subsets.
        kid_spread: standard deviation over the subsets, see `distances.kernel_distance`.
        distance_to_teacher_image: mean cosine feature distance to the guided teacher's image of the same seed.
        caption_score: mean of `Quality.caption_label`, below N = 4 without an interval; None without a CLIP model.
        caption_delta_to_guided: like `delta_to_guided`.
        caption_gain_recovered: like `gain_recovered`.
        colors: by name in `samples.COLORS`.
    """

    name: str
    role: str
    method: str | None
    steps: int
    cost: int
    distance: float | None = None
    distance_interval: Estimate | None = None
    delta_to_guided: Estimate | None = None
    gain_recovered: Estimate | None = None
    kid: float | None = None
    kid_spread: float | None = None
    distance_to_teacher_image: float
    caption_score: Estimate | float | None = None
    caption_delta_to_guided: Estimate | None = None
    caption_gain_recovered: Estimate | None = None
    colors: dict[str, ColorStatistic]

    @property
    def passes(self) -> float:
        """UNet passes per step, on average."""
        return self.cost / self.steps

    @property
    def caption_value(self) -> float | None:
        """The caption score, without its interval."""
        return self.caption_score.value if isinstance(self.caption_score, Estimate) else self.caption_score


@dataclass(frozen=True, kw_only=True)
class Quality:
    """All rows, and what they were measured on.

    Attributes:
        rows: guided teacher, unguided teacher, students, training-free baselines, reseeded teacher.
        images: N, of each row.
        reference_images: real images behind the reference's statistics; 0 without a reference.
        reference_apart: other real images, for KID and the real-vs-real distance; 0 without a reference.
        real_vs_real_distance: distance of real images to the reference at this N: that of a perfect model.
        features: name of the distance, after its features.
        features_described: the features in words.
        caption_label: name of the caption score, with its model; None without one.
        samples: first images of each row, uint8 `(n, 3, H, W)`, by row name.
    """

    rows: list[QualityRow]
    images: int
    reference_images: int
    reference_apart: int
    real_vs_real_distance: float | None
    features: str
    features_described: str
    caption_label: str | None = None
    samples: dict[str, torch.Tensor] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, without the images."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["rows"] = [asdict(row) | {"passes": row.passes} for row in self.rows]
        values["best_alternatives"] = [row.name for row in self.best_baselines()]
        return {name: value for name, value in values.items() if name not in {"samples", "features_described"}}

    @property
    def guided(self) -> QualityRow:
        """The guided teacher's row."""
        return next(row for row in self.rows if row.role == "teacher")

    @property
    def student(self) -> QualityRow:
        """The first student's row."""
        return next(row for row in self.rows if row.role == "student")

    def main_rows(self) -> list[QualityRow]:
        """All but the training-free baselines."""
        return [row for row in self.rows if row.role != "alternative"]

    def best_baselines(self) -> list[QualityRow]:
        """The best setting of each method at each cost: the smallest distance; without a reference, the closest.

        Chosen on the images that they are compared by, which flatters the baselines, not the student.
        """
        sweeps: dict[tuple[str | None, int], QualityRow] = {}
        for row in self.rows:
            if row.role == "alternative":
                best = sweeps.setdefault((row.method, row.cost), row)
                sweeps[row.method, row.cost] = min(
                    best, row, key=lambda one: one.distance_to_teacher_image if one.distance is None else one.distance
                )
        return list(sweeps.values())


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a variant is compared by."""

    sampled: Sampled
    distance: Distance | None
    caption: Score | None
    colors: dict[str, Score]

    @classmethod
    def of(cls, cache: SampleCache, variant: SamplingVariant) -> Figures:
        """Sample a variant, or read what was sampled before, and compute the figures that have an interval."""
        sampled = cache.sampled(variant)
        return cls(
            sampled=sampled,
            distance=Distance.of(cache.reference, sampled.features) if cache.reference else None,
            caption=None if sampled.clip is None else Score.of(sampled.clip.tolist()),
            colors={name: Score.of(values.tolist()) for name, values in zip(COLORS, sampled.colors.T, strict=True)},
        )


def _row(
    variant: SamplingVariant,
    figures: Figures,
    *,
    guided: Figures,
    unguided: Figures | None,
    reference: Reference | None,
) -> QualityRow:
    features = figures.sampled.features
    measured: dict[str, Any] = {}

    def add(name: str, prefix: str) -> None:
        """Difference to the guided teacher, and the share of its gain; the teacher's gain is what is compared with."""
        figure, of_guided = getattr(figures, name), getattr(guided, name)
        measured[f"{prefix}delta_to_guided"] = figure.delta_to(of_guided)
        if unguided and variant.role in {"student", "alternative"}:
            share = figure.gain_recovered(guided=of_guided, unguided=getattr(unguided, name))
            measured[f"{prefix}gain_recovered"] = share

    if reference and figures.distance:
        measured["distance"], measured["distance_interval"] = figures.distance.value, figures.distance.interval
        add("distance", "")
        measured["kid"], measured["kid_spread"] = kernel_distance(reference, features)
    if figures.caption:
        measured["caption_score"] = figures.caption.interval or figures.caption.value
        add("caption", "caption_")
    return QualityRow(
        name=variant.name,
        role=variant.role,
        method=variant.method,
        steps=variant.steps,
        cost=variant.cost,
        distance_to_teacher_image=paired_feature_distance(features, guided.sampled.features),
        colors={
            name: ColorStatistic(value=color.value, delta_to_guided=color.delta_to(guided.colors[name]))
            for name, color in figures.colors.items()
        },
        **measured,
    )


def compared(sampled: Iterable[tuple[SampleCache, SamplingVariant]]) -> Iterator[tuple[QualityRow, torch.Tensor]]:
    """The row of each variant and its first images, uint8 `(n, 3, H, W)`; the first variant is the guided teacher.

    Rows behind an unguided teacher have shares of the guidance gain.
    """
    guided = unguided = None
    for cache, variant in sampled:
        figures = Figures.of(cache, variant)
        guided = guided or figures
        unguided = figures if variant.role == "unguided" else unguided
        row = _row(variant, figures, guided=guided, unguided=unguided, reference=cache.reference)
        yield row, figures.sampled.samples


def evaluate(cache: SampleCache, variants: Sequence[SamplingVariant]) -> Quality:
    """Evaluate the guided teacher, the unguided teacher and others on the same prompts, seeds and noise."""
    found, reference = list(compared((cache, variant) for variant in variants)), cache.reference
    count, apart = len(cache.prompts), len(reference.features) if reference else 0
    return Quality(
        rows=[row for row, _ in found],
        images=count,
        reference_images=reference.count if reference else 0,
        reference_apart=apart,
        real_vs_real_distance=(
            frechet_distance(reference, reference.features[:count]) if reference and apart >= count else None
        ),
        features=cache.network.distance_name,
        features_described=cache.network.description,
        caption_label=cache.clip.label if cache.clip else None,
        samples={row.name: images for row, images in found},
    )
