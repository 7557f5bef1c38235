"""Quality: guided teacher, unguided teacher and students on the same prompts, seeds and initial noise."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..stats import Estimate, jackknifed
from .distances import GROUPS, left_out_distances, precision_recall, recovered_interval
from .features import Reference, frechet_distance, kernel_distance, paired_distance
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
    distance: float | None
    kid: float | None
    kid_spread: float | None
    paired: float
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


def judge(campaign: Campaign, contestants: list[Contestant], *, reference: Reference | None) -> Quality:
    """Measure every contestant on the same prompts, seeds and noise.

    Args:
        campaign: samples, or reads what was sampled before.
        contestants: the guided teacher first, the unguided second; then the others in any order.
        reference: real images, or None.
    """
    rows: list[QualityRow] = []
    samples: dict[str, torch.Tensor] = {}
    guided_features = None
    without: list[list[float]] = []
    for contestant in contestants:
        sampled = campaign.sampled(contestant)
        features = sampled.features
        if guided_features is None:
            guided_features = features
        distance = frechet_distance(reference, features) if reference else None
        kid, kid_spread = kernel_distance(reference, features) if reference else (None, None)
        covered = precision_recall(reference.features, features) if reference else None
        left_out = left_out_distances(reference, features) if reference and len(features) >= 4 else []
        without.append(left_out)
        behind, recovered, recovered_within = None, None, None
        if distance is not None and rows:
            guided, unguided = rows[0].distance, rows[min(1, len(rows) - 1)].distance
            assert guided is not None
            assert unguided is not None
            if left_out:
                behind = jackknifed(distance - guided, [a - b for a, b in zip(left_out, without[0], strict=True)])
            # Where guidance gains nothing (tiny N, say), there is nothing to recover.
            if contestant.kind != "control" and len(rows) >= 2 and guided < unguided:
                recovered = (unguided - distance) / (unguided - guided)
                recovered_within = recovered_interval(recovered, without[0], without[1], left_out) if left_out else None
        rows.append(
            QualityRow(
                name=contestant.name,
                kind=contestant.kind,
                method=contestant.method,
                steps=contestant.steps,
                cost=contestant.cost,
                distance=distance,
                kid=kid,
                kid_spread=kid_spread,
                paired=paired_distance(features, guided_features),
                distance_interval=jackknifed(distance, left_out) if distance is not None and left_out else None,
                behind=behind,
                precision=covered[0] if covered else None,
                recall=covered[1] if covered else None,
                recovered=recovered,
                recovered_interval=recovered_within,
                clip=clip_interval(sampled.clip),
            )
        )
        samples[contestant.name] = sampled.samples
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
