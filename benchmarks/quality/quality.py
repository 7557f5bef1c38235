"""Quality: guided teacher, unguided teacher and students on the same prompts, seeds and initial noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..stats import Estimate, jackknifed
from .distances import GROUPS, Distance, frechet_distance, kernel_distance, paired_distance, precision_recall
from .reference import Reference
from .samples import Campaign, Contestant


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One way of sampling, judged.

    Attributes:
        name: "teacher w=3", "student lora", …
        kind: see `sampling.Contestant`.
        method: of an alternative; rows of one method and budget are one sweep.
        steps: sampling steps.
        cost: UNet passes an image.
        distance: Fréchet distance to real images; None without a reference.
        kid: kernel distance to real images, the mean over random subsets, and `kid_spread` their standard deviation.
        kid_spread: see `features.kernel_distance`; None where subsets can't tell it.
        paired: mean cosine distance to the guided teacher's image of the same seed.
        distance_interval: of `distance`, over prompts and noise, the reference being as it is; None below N = 4.
        behind: `distance` less the guided teacher's, on the same prompts; None for the guided teacher itself.
        precision: share of images that look real, and `recall` of real images that are covered (diversity).
        recall: see `precision`.
        recovered: (unguided − this) / (unguided − guided) of `distance`; for students, where guided is better.
        recovered_interval: of `recovered`; None where the gain of guidance itself is not beyond noise.
        clip: mean CLIP score; None where no CLIP model was named.
    """

    name: str
    kind: str
    method: str | None
    steps: int
    cost: int
    paired: float
    distance: float | None = None
    kid: float | None = None
    kid_spread: float | None = None
    distance_interval: Estimate | None = None
    behind: Estimate | None = None
    precision: float | None = None
    recall: float | None = None
    recovered: float | None = None
    recovered_interval: Estimate | None = None
    clip: Estimate | None = None

    @property
    def passes(self) -> float:
        """UNet passes a step, on average."""
        return self.cost / self.steps


@dataclass(frozen=True, kw_only=True)
class Quality:
    """All rows, and what they were measured on.

    Attributes:
        rows: see `QualityRow`.
        images: N, of each row.
        reference_images: behind the reference's statistics; 0 without a reference.
        reference_apart: other real images, for KID, recall and the floor; 0 without a reference.
        floor: distance of real images to the reference at this N: what a perfect model would get.
        features: what the distance is called, after its features.
        features_described: the features in words.
        samples: the first images of each row, uint8 `(n, 3, H, W)`, by the row's name.
    """

    rows: list[QualityRow]
    images: int
    reference_images: int
    reference_apart: int
    floor: float | None
    features: str
    features_described: str
    samples: dict[str, torch.Tensor] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, without the images."""
        return {
            "rows": [asdict(row) | {"passes": row.passes} for row in self.rows],
            "images": self.images,
            "reference_images": self.reference_images,
            "reference_apart": self.reference_apart,
            "floor": self.floor,
            "features": self.features,
            "best_alternatives": [row.name for row in self.best_alternatives()],
        }

    @property
    def student(self) -> QualityRow:
        """The first student's row."""
        return next(row for row in self.rows if row.kind == "student")

    def main_rows(self) -> list[QualityRow]:
        """All but the alternatives."""
        return [row for row in self.rows if row.kind != "alternative"]

    def best_alternatives(self) -> list[QualityRow]:
        """The best setting of each method at each cost: the smallest distance; without a reference, the closest.

        Chosen on the images that they are judged by, which flatters the alternatives, not the student.
        """
        sweeps: dict[tuple[str | None, int], QualityRow] = {}

        def rank(row: QualityRow) -> float:
            return row.paired if row.distance is None else row.distance

        for row in self.rows:
            if row.kind == "alternative":
                best = sweeps.setdefault((row.method, row.cost), row)
                sweeps[row.method, row.cost] = min(best, row, key=rank)
        return list(sweeps.values())


def clip_interval(scores: torch.Tensor | None) -> Estimate | None:
    """Mean of CLIP scores `(N,)`, with the jackknife of the distances' groups; None without, or below N = 4."""
    if scores is None or len(scores) < 4:
        return None
    values = scores.double()
    groups = min(GROUPS, len(values) // 2)
    member = torch.arange(len(values)) % groups
    return jackknifed(values.mean().item(), [values[member != group].mean().item() for group in range(groups)])


def _against_real_images(
    row: QualityRow, distances: Sequence[Distance], reference: Reference, features: torch.Tensor
) -> dict[str, Any]:
    """The fields of a row that need real images.

    Args:
        row: what is known without.
        distances: of the guided teacher, of the unguided one, and so on down to this row's.
        reference: real images.
        features: `(N, D)` of the row's images.
    """
    *before, distance = distances
    kid, kid_spread = kernel_distance(reference, features)
    covered = precision_recall(reference.features, features)
    shared = row.kind != "control" and len(before) > 1
    recovered, within = distance.recovered(guided=before[0], unguided=before[1]) if shared else (None, None)
    return {
        "distance": distance.value,
        "distance_interval": distance.interval,
        "behind": distance.gap(before[0]) if before else None,
        "kid": kid,
        "kid_spread": kid_spread,
        "precision": covered[0] if covered else None,
        "recall": covered[1] if covered else None,
        "recovered": recovered,
        "recovered_interval": within,
    }


def judge(campaign: Campaign, contestants: list[Contestant], *, reference: Reference | None) -> Quality:
    """Measure every contestant on the same prompts, seeds and noise.

    Args:
        campaign: samples, or reads what was sampled before.
        contestants: the guided teacher first, the unguided second; then the others in any order.
        reference: real images, or None.
    """
    rows: list[QualityRow] = []
    samples: dict[str, torch.Tensor] = {}
    distances: list[Distance] = []
    guided_features = None
    for contestant in contestants:
        sampled = campaign.sampled(contestant)
        if guided_features is None:
            guided_features = sampled.features
        row = QualityRow(
            name=contestant.name,
            kind=contestant.kind,
            method=contestant.method,
            steps=contestant.steps,
            cost=contestant.cost,
            paired=paired_distance(sampled.features, guided_features),
            clip=clip_interval(sampled.clip),
        )
        if reference:
            distances.append(Distance.of(reference, sampled.features))
            row = replace(row, **_against_real_images(row, distances, reference, sampled.features))
        rows.append(row)
        samples[row.name] = sampled.samples
    count = len(campaign.prompts)
    enough = reference is not None and len(reference.features) >= count
    return Quality(
        rows=rows,
        images=count,
        reference_images=reference.count if reference else 0,
        reference_apart=len(reference.features) if reference else 0,
        floor=frechet_distance(reference, reference.features[:count]) if reference and enough else None,
        features=campaign.network.distance_name,
        features_described=campaign.network.description,
        samples=samples,
    )
