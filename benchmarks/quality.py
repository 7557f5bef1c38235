"""Quality: guided teacher, unguided teacher and students on the same prompts, seeds and initial noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin

from ..engine.generate import generate, to_uint8
from ..engine.guidance import Denoiser
from ..engine.model import Model
from ..teacher.palette import background_of, named_background
from .features import DISTANCE_NAME, Reference, features_of, frechet_distance, kernel_distance, paired_distance
from .intervals import left_out_distances, precision_recall, recovered_interval
from .stats import Estimate, jackknifed

RESEED = 1_000_003
"""Added to the seed for the teacher-against-teacher row: the distance that chance alone makes."""


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One way of sampling, judged.

    Attributes:
        name: "teacher w=3", "student lora", …
        passes: UNet passes per step and image.
        distance: Fréchet distance to real images; None without a reference.
        kid: kernel distance to real images, and `kid_error` its standard error.
        kid_error: see `kid`.
        paired: mean cosine distance to the guided teacher's image of the same seed.
        background: share of images over the named background; None where prompts name none.
        distance_interval: of `distance`, over prompts and noise, the reference being as it is; None below N = 4.
        behind: `distance` less the guided teacher's, on the same prompts; None for the guided teacher itself.
        precision: share of images that look real, and `recall` of real images that are covered (diversity).
        recall: see `precision`.
        recovered: (unguided − this) / (unguided − guided) of `distance`; for students, where guided is better.
        recovered_interval: of `recovered`; None where the gain of guidance itself is not beyond noise.
    """

    name: str
    passes: int
    distance: float | None
    kid: float | None
    kid_error: float | None
    paired: float
    background: float | None
    distance_interval: Estimate | None = None
    behind: Estimate | None = None
    precision: float | None = None
    recall: float | None = None
    recovered: float | None = None
    recovered_interval: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """All rows, and what they were measured on.

    Attributes:
        rows: see `QualityRow`.
        images: N, of each row.
        reference_images: behind the reference's statistics; 0 without a reference.
        floor: distance of real images to the reference at this N: what a perfect model would get.
        samples: the first images of each row, uint8 `(n, 3, H, W)`, by the row's name.
    """

    rows: list[QualityRow]
    images: int
    reference_images: int
    floor: float | None
    samples: dict[str, torch.Tensor] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, without the images."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "images": self.images,
            "reference_images": self.reference_images,
            "floor": self.floor,
            "features": DISTANCE_NAME,
        }


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way of sampling to judge.

    Attributes:
        name: of its row.
        passes: UNet passes per step and image.
        open: gives the denoiser; called when its turn comes, as all may share one UNet.
        seed_offset: added to the seed.
    """

    name: str
    passes: int
    open: Callable[[], Denoiser]
    seed_offset: int = 0


def background_accuracy(prompts: list[str], images: torch.Tensor) -> float | None:
    """Share of images over the background that their prompt names; None where none is named."""
    named = [(i, name) for i, prompt in enumerate(prompts) if (name := named_background(prompt))]
    if not named:
        return None
    found = background_of(images[[i for i, _ in named]].permute(0, 2, 3, 1).numpy())
    return sum(got == name for got, (_, name) in zip(found, named, strict=True)) / len(named)


def judge(
    model: Model,
    contestants: list[Contestant],
    *,
    network: torch.nn.Module,
    reference: Reference | None,
    prompts: list[str],
    make_scheduler: Callable[[], SchedulerMixin],
    steps: int,
    seed: int,
    batch_size: int,
    negative_prompt: str = "",
    keep: int = 12,
    on_images: Callable[[str, int], None] = lambda name, count: None,
) -> Quality:
    """Sample every contestant on the same prompts, seeds and noise, and measure.

    Args:
        model: text encoder, VAE and latents' shape.
        contestants: the guided teacher first, the unguided second; then students, then controls.
        network: features of uint8 images.
        reference: real images, or None.
        prompts: N of them.
        make_scheduler: gives a fresh scheduler.
        steps: sampling steps.
        seed: image i starts from the noise of `seed + i`.
        batch_size: images denoised together.
        negative_prompt: what the guided teacher leads away from.
        keep: images to keep of each row.
        on_images: told of progress: the row's name and how many images took a step.
    """
    text = model.family.encode(model.pipeline, prompts, negative_prompt=negative_prompt)
    rows: list[QualityRow] = []
    samples: dict[str, torch.Tensor] = {}
    guided_features = None
    without: list[list[float]] = []
    for contestant in contestants:
        denoiser = contestant.open()
        images = to_uint8(
            generate(
                model,
                denoiser,
                text=text,
                make_scheduler=make_scheduler,
                steps=steps,
                seed=seed + contestant.seed_offset,
                batch_size=batch_size,
                on_step=partial(on_images, contestant.name),
            )
        )
        features = features_of(network, images)
        if guided_features is None:
            guided_features = features
        distance = frechet_distance(reference, features) if reference else None
        kid, kid_error = kernel_distance(reference, features) if reference else (None, None)
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
            if contestant.seed_offset == 0 and len(rows) >= 2 and guided < unguided:
                recovered = (unguided - distance) / (unguided - guided)
                recovered_within = recovered_interval(recovered, without[0], without[1], left_out) if left_out else None
        rows.append(
            QualityRow(
                name=contestant.name,
                passes=contestant.passes,
                distance=distance,
                kid=kid,
                kid_error=kid_error,
                paired=paired_distance(features, guided_features),
                background=background_accuracy(prompts, images),
                distance_interval=jackknifed(distance, left_out) if distance is not None and left_out else None,
                behind=behind,
                precision=covered[0] if covered else None,
                recall=covered[1] if covered else None,
                recovered=recovered,
                recovered_interval=recovered_within,
            )
        )
        samples[contestant.name] = images[:keep]
    enough = reference is not None and len(reference.features) >= len(prompts)
    return Quality(
        rows=rows,
        images=len(prompts),
        reference_images=reference.count if reference else 0,
        floor=frechet_distance(reference, reference.features[: len(prompts)]) if reference and enough else None,
        samples=samples,
    )
