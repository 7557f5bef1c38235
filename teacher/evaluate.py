"""Stages that evaluate the model: tables over guidance scales, and pictures for its card."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL

from ..benchmarks.config import comma_separated
from ..benchmarks.quality.clip_score import ClipScorer
from ..benchmarks.quality.distances import Distance
from ..benchmarks.quality.features import DISTANCE_NAME, EfficientNetLite0Features, FeatureNetwork, features_of
from ..benchmarks.quality.reference import Reference
from ..benchmarks.quality.samples import SampleCache
from ..benchmarks.report.tables import Table, formatted
from ..benchmarks.session import Session, identity_of
from ..benchmarks.speed.fastest import SAMPLING_BATCH, FastestRunners
from ..engine.embedded import CAPTION_MODEL, MODEL_NAME, REFERENCE
from ..engine.errors import InputError
from ..engine.model import load, locate, resolve_device
from ..engine.pictures import contact_sheet, labelled_grid
from ..engine.schedulers import SAMPLERS
from .captions import FULL, Caption, Grammar, draw_captions
from .dataset import STYLES, Artworks, load_artworks
from .measure import Seed, Work, held_out_captions, real_images, reconstructed
from .palette import background_of
from .style import StyleNetwork, style_network, style_of
from .things import group_labels, groups_of, things_classifier

Output = Annotated[Path | None, typer.Option(help="Folder for what is written.  [default: the work folder]")]
ModelName = Annotated[str, typer.Option(help="The shipped model, or a pipeline folder as `save` writes it.")]
Images = Annotated[int, typer.Option(min=2, help="Images of each row (N).")]
Scales = Annotated[str, typer.Option(help="Guidance scales, comma-separated.")]
Sampling = Annotated[int, typer.Option(min=1, help="DDIM steps.")]
Together = Annotated[int, typer.Option(min=1, help="Images denoised together.")]

scales_of = comma_separated("--scales", float, "1,2,3,5", least=1)

TABLE_FILE = "evaluation.md"
SHOWN_SCALE = 3.0
"""Guidance of the sheet of held-out combinations."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """All that images of captions are measured by.

    Attributes:
        artworks: what captions are of.
        features: the network behind the distances.
        reference: statistics of real images.
        styles: names an image's style.
        things: names the group of the thing, from features.
        captions: the caption model.
    """

    artworks: Artworks
    features: FeatureNetwork
    reference: Reference
    styles: StyleNetwork
    things: dict[str, torch.Tensor]
    captions: ClipScorer

    @classmethod
    def load(cls, work: Path, artworks: Artworks, *, vae: AutoencoderKL, seed: int = 0) -> Evaluator:
        """The shipped networks, and the classifiers of styles and things that `work` holds, trained if it has none."""
        network = EfficientNetLite0Features().to(vae.device)
        return cls(
            artworks=artworks,
            features=network,
            reference=Reference.load(REFERENCE),
            styles=style_network(work, artworks, seed=seed),
            things=things_classifier(work, artworks, network, vae, seed=seed),
            captions=ClipScorer(str(CAPTION_MODEL), device=vae.device),
        )

    def figures(self, images: torch.Tensor, captions: list[Caption]) -> dict[str, Any]:
        """All that is measured of uint8 images `(N, 3, H, W)`: `Distance`, caption scores `(N,)`, and shares.

        Shares are of the captions that name a background, a style; the thing counts for all, by its group.
        """
        features = features_of(self.features, images)
        seen_background = background_of(images.permute(0, 2, 3, 1).numpy())
        seen_style = style_of(self.styles, images)
        wanted = group_labels(self.artworks, np.array([caption.artwork for caption in captions]))
        right = {
            "background": [s == c.background for s, c in zip(seen_background, captions, strict=True) if c.background],
            "style": [s == c.style for s, c in zip(seen_style, captions, strict=True) if c.style],
            "thing": (groups_of(self.things, features) == wanted).tolist(),
        }
        return {
            "distance": Distance.of(self.reference, features),
            "caption_scores": self.captions.scores(images, [c.text for c in captions]),
        } | {name: sum(hits) / len(hits) if hits else None for name, hits in right.items()}


def teacher_images(
    prompts: list[str],
    scale: float,
    *,
    runners: FastestRunners,
    network: FeatureNetwork,
    folder: Path | None = None,
    steps: int = 20,
    sampler: str = "ddim",
    seed: int = 0,
) -> torch.Tensor:
    """The teacher's images, uint8 `(N, 3, H, W)`; image i from the noise of `seed + i`.

    Images that are in `folder` already are read from there; the network's hash is part of the files' names.
    """
    cache = SampleCache(
        model=runners.model,
        network=network,
        prompts=prompts,
        seed=seed,
        batch_size=runners.batch_size,
        folder=folder,
        identity=identity_of(runners.model) | {"runner": runners.name},
        shard=len(prompts),
        keep=len(prompts),
    )
    session = Session(model=runners.model, sampler=sampler, steps=steps, runner=runners)
    return cache.sampled(session.teacher(scale)).samples


def results_table(rows: dict[str, dict[str, Any]]) -> Table:
    """A table of `Evaluator.figures` by the rows' names, among them "real images" and "w=1"."""
    real, unguided = (rows[name]["distance"].value for name in ("real images", "w=1"))

    def cells(name: str, row: dict[str, Any]) -> dict[str, str]:
        distance, scores = row["distance"], row["caption_scores"]
        return {
            "": name,
            f"{DISTANCE_NAME} [95%]": formatted(distance.interval or distance.value),
            # Added to, a zero has no sign.
            "above real images, as a share of w=1's": f"{(distance.value - real) / (unguided - real) + 0.0:.0%}",
            "caption score ± standard error": f"{scores.mean():.1f} ± {scores.std() / len(scores) ** 0.5:.1f}",
            "background as named": formatted(row["background"], ".1%"),
            "style as named": formatted(row["style"], ".1%"),
            "thing (its group)": formatted(row["thing"], ".1%"),
        }

    return Table.of([cells(*row) for row in rows.items()])


def evaluate(
    work: Work = Path("teacher-work"),
    output: Output = None,
    model: ModelName = MODEL_NAME,
    images: Images = 1000,
    scales: Scales = "1,2,3,5",
    steps: Sampling = 20,
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")] = "ddim",
    full: Annotated[bool, typer.Option("--full/--mixed", help="Full captions, or those of the grammar.")] = False,
    batch_size: Together = SAMPLING_BATCH,
    seed: Seed = 0,
) -> None:
    """Measure the model over guidance scales on held-out prompts, beside real images and their reconstructions.

    The images of each scale are kept in the output folder: an interrupted run goes on.

    Raises:
        InputError: 1 is not among the scales.
    """
    wanted = scales_of(scales)
    if 1.0 not in wanted:
        raise InputError(f"--scales {scales}: 1 must be among them, as shares are of its distance")
    output = output or work
    artworks = load_artworks(work)
    captions = draw_captions(artworks, held_out=True, count=images, seed=seed, grammar=FULL if full else Grammar())
    prompts = [caption.text for caption in captions]
    loaded = load(locate(model), device=resolve_device("auto"))
    evaluator = Evaluator.load(work, artworks, vae=loaded.pipeline.vae, seed=seed)
    real = real_images(artworks, captions)
    rows = {
        "real images": evaluator.figures(real, captions),
        "reconstructions": evaluator.figures(reconstructed(loaded.pipeline.vae, real), captions),
    }
    passes = sum((1 + (scale > 1)) * steps * images for scale in wanted)
    with FastestRunners(loaded, passes=passes, batch_size=batch_size) as runners:
        for scale in wanted:
            drawn = teacher_images(
                prompts,
                scale,
                runners=runners,
                network=evaluator.features,
                folder=output / "cache",
                steps=steps,
                sampler=sampler,
                seed=seed,
            )
            rows[f"w={scale:g}"] = evaluator.figures(drawn, captions)
            print(f"w={scale:g}: {DISTANCE_NAME} {rows[f'w={scale:g}']['distance'].value:.1f}", flush=True)
    table = results_table(rows).markdown()
    (output / TABLE_FILE).write_text(f"{table}\n", encoding="utf-8")
    print(f"\nN = {images}, {'full' if full else 'mixed'} captions, {sampler} {steps} steps\n\n{table}")


def classifiers(work: Work = Path("teacher-work"), model: ModelName = MODEL_NAME, seed: Seed = 0) -> None:
    """Train the classifiers of styles and things unless `work` has them; their accuracy on held-out artworks."""
    artworks = load_artworks(work)
    vae = load(locate(model), device=resolve_device("auto")).pipeline.vae
    loaded = Evaluator.load(work, artworks, vae=vae, seed=seed)
    captions = held_out_captions(artworks)
    real = real_images(artworks, captions)
    for name, images in (("real", real), ("reconstructed", reconstructed(vae, real))):
        found = loaded.figures(images, captions)
        print(
            f"classifiers: of {len(images)} {name} held-out images, background {found['background']:.1%}, style "
            f"{found['style']:.1%}, thing {found['thing']:.1%}"
        )
    seen = style_of(loaded.styles, real)
    for style in STYLES:
        taken = Counter(name for name, caption in zip(seen, captions, strict=True) if caption.style == style)
        most = ", ".join(f"{count} as {name}" for name, count in taken.most_common(3))
        print(f"classifiers: of {taken.total()} real images in the style {style}: {most}")


def grids(
    work: Work = Path("teacher-work"),
    output: Output = None,
    model: ModelName = MODEL_NAME,
    scales: Scales = "1,2,3,5,7",
    steps: Sampling = 20,
    rows: Annotated[int, typer.Option(min=1, help="Captions in each of seen, full and mixed.")] = 10,
    pairs: Annotated[int, typer.Option(min=1, help="Held-out full captions of the sheet for judging by eye.")] = 48,
    seed: Seed = 0,
) -> None:
    """Draw seen, held-out full and held-out mixed captions at each guidance (seen.png, full.png, mixed.png).

    The real picture stands first in each row. pairs.png shows it beside the model's image at w = 3, for judging by eye.
    """
    output = output or work
    artworks = load_artworks(work)
    sets = {
        "seen": draw_captions(artworks, held_out=False, count=rows, seed=seed + 1, grammar=FULL),
        "full": draw_captions(artworks, held_out=True, count=rows, seed=seed + 2, grammar=FULL),
        "mixed": draw_captions(artworks, held_out=True, count=rows, seed=seed + 3),
        "pairs": draw_captions(artworks, held_out=True, count=pairs, seed=seed + 4, grammar=FULL),
    }
    wanted = scales_of(scales)
    loaded = load(locate(model), device=resolve_device("auto"))
    output.mkdir(parents=True, exist_ok=True)
    passes = sum((1 + (scale > 1)) * steps * 3 * rows for scale in wanted) + 2 * steps * pairs
    with FastestRunners(loaded, passes=passes) as runners:
        network = EfficientNetLite0Features().to(loaded.device)
        draw = partial(teacher_images, runners=runners, network=network, steps=steps, seed=seed)
        for name, captions in sets.items():
            prompts, real = [caption.text for caption in captions], real_images(artworks, captions)
            if name == "pairs":
                couples = torch.stack([real, draw(prompts, SHOWN_SCALE)], dim=1).flatten(0, 1)
                contact_sheet(couples, columns=12).save(output / "pairs.png")
                (output / "pairs.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
                continue
            columns = {"real": real} | {f"w={scale:g}": draw(prompts, scale) for scale in wanted}
            labelled_grid(columns, prompts).save(output / f"{name}.png")
    print(f"grids: {', '.join(sets)} in {output}")
