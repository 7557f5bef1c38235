"""Stages that judge the model: tables over guidance scales, pictures, and curves for its card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from diffusers import AutoencoderKL

from ..benchmarks.fastest import SAMPLING_BATCH, FastestRunners
from ..benchmarks.quality.clip_score import ClipScorer
from ..benchmarks.quality.distances import frechet_distance, kernel_distance, left_out_distances
from ..benchmarks.quality.features import DISTANCE_NAME, EfficientNetLite0Features, features_of
from ..benchmarks.quality.reference import Reference
from ..benchmarks.report.plots import rendered
from ..benchmarks.report.tables import KID_HEADING, kid_cell
from ..benchmarks.stats import jackknifed
from ..engine.embedded import CAPTION_MODEL, MODEL_NAME, REFERENCE
from ..engine.errors import InputError
from ..engine.files import json_lines, sha256_of
from ..engine.guidance import teacher_denoiser
from ..engine.model import Model, load, locate
from ..engine.pictures import contact_sheet, labelled_grid
from ..engine.runners import Runner
from ..engine.sampling import generate, to_uint8
from ..engine.schedulers import SAMPLERS, make_scheduler
from .captions import FULL, Caption, Grammar, draw_captions
from .dataset import STYLES, Artworks, load_artworks
from .measure import (
    Seed,
    Work,
    device,
    held_out_captions,
    held_out_psnr,
    load_vae,
    real_images,
    reconstructed,
    training_log,
)
from .palette import background_of
from .results import remembered
from .style import STYLE_FILE, StyleNetwork, style_network, style_of
from .things import THINGS_FILE, group_labels, groups_of, things_judge

Output = Annotated[Path | None, typer.Option(help="Folder for what is written.  [default: the work folder]")]
ModelName = Annotated[str, typer.Option(help="The shipped model, or a pipeline folder as `save` writes it.")]
Images = Annotated[int, typer.Option(min=2, help="Images of each row (N).")]
Scales = Annotated[str, typer.Option(help="Guidance scales, comma-separated.")]
Sampling = Annotated[int, typer.Option(min=1, help="DDIM steps.")]
Together = Annotated[int, typer.Option(min=1, help="Images denoised together.")]

RESULTS_FILE = "judged.json"
TABLE_FILE = "judged.md"
SHOWN_SCALE = 3.0
"""Guidance of the sheet of held-out combinations."""


def weights_sha256(folder: Path) -> str:
    """One hash for all weight files of a pipeline folder, or for one file."""
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else [folder]
    return "-".join(sha256_of(path)[:12] for path in files)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """All that images of captions are measured by.

    Attributes:
        artworks: what captions are of.
        features: the network behind the distances.
        reference: statistics of real images.
        styles: names an image's style.
        things: names the group of the thing, from features.
        captions: the caption model; None leaves its score out.
        identity: hashes of all of them.
    """

    artworks: Artworks
    features: torch.nn.Module
    reference: Reference
    styles: StyleNetwork
    things: dict[str, torch.Tensor]
    captions: ClipScorer | None
    identity: str

    @classmethod
    def load(cls, work: Path, artworks: Artworks, *, vae: AutoencoderKL, seed: int = 0) -> Judges:
        """The shipped networks, and the judges of style and of things that `work` holds, trained if it has none."""
        network = EfficientNetLite0Features().to(vae.device)
        styles = style_network(work, artworks, seed=seed)
        things = things_judge(work, artworks, network, vae, seed=seed)
        scorer = ClipScorer(str(CAPTION_MODEL), device=vae.device) if CAPTION_MODEL.exists() else None
        files = [REFERENCE, work / STYLE_FILE, work / THINGS_FILE]
        hashes = [sha256_of(path)[:8] for path in files] + ([scorer.sha256[:8]] if scorer else [])
        return cls(
            artworks=artworks,
            features=network,
            reference=Reference.load(REFERENCE),
            styles=styles,
            things=things,
            captions=scorer,
            identity="-".join(hashes),
        )

    def figures(self, images: torch.Tensor, captions: list[Caption], *, drawn: bool = True) -> dict[str, Any]:
        """All that is measured of uint8 images `(N, 3, H, W)`, as plain JSON values.

        Shares are of the captions that name a background, a style; the thing counts for all, by its group. Real images
        and their reconstructions (not `drawn`) get no KID: the reference's own features are theirs.
        """
        features = features_of(self.features, images)
        distance = frechet_distance(self.reference, features)
        left_out = left_out_distances(self.reference, features) if len(features) >= 4 else None
        interval = jackknifed(distance, left_out) if left_out else None
        kid, kid_spread = kernel_distance(self.reference, features) if drawn else (None, None)
        seen_background = background_of(images.permute(0, 2, 3, 1).numpy())
        seen_style = style_of(self.styles, images)
        wanted = group_labels(self.artworks, np.array([caption.artwork for caption in captions]))
        right = {
            "background": [s == c.background for s, c in zip(seen_background, captions, strict=True) if c.background],
            "style": [s == c.style for s, c in zip(seen_style, captions, strict=True) if c.style],
            "thing": (groups_of(self.things, features) == wanted).tolist(),
        }
        scores = self.captions.scores(images, [c.text for c in captions]) if self.captions else None
        return {
            "images": len(images),
            "distance": distance,
            "distance_low": interval.low if interval else None,
            "distance_high": interval.high if interval else None,
            "kid": kid,
            "kid_spread": kid_spread,
            "caption_score": None if scores is None else scores.mean().item(),
            "caption_score_error": None if scores is None else (scores.std() / len(scores) ** 0.5).item(),
        } | {name: sum(hits) / len(hits) if hits else None for name, hits in right.items()}


def draw(
    model: Model,
    runner: Runner,
    prompts: list[str],
    *,
    scale: float,
    steps: int,
    seed: int,
    sampler: str = "ddim",
    batch_size: int = SAMPLING_BATCH,
) -> torch.Tensor:
    """The teacher's images, uint8 `(N, 3, H, W)`; image i from the noise of `seed + i`."""
    images = generate(
        model,
        teacher_denoiser(runner, scale),
        text=model.family.encode(model.pipeline, prompts),
        make_scheduler=partial(make_scheduler, sampler, model.pipeline.scheduler.config),
        steps=steps,
        seed=seed,
        batch_size=batch_size,
    )
    return to_uint8(images)


def markdown_table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of `Judges.figures` by the rows' names, among them "real images" and "w=1"."""
    real, unguided = rows["real images"]["distance"], rows["w=1"]["distance"]
    lines = [
        f"| | {DISTANCE_NAME} [95%] | above real images, as a share of w=1's | {KID_HEADING} | caption score "
        "| background as named | style as named | thing (its group) |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    for name, row in rows.items():
        interval = "" if row["distance_low"] is None else f" [{row['distance_low']:.1f}–{row['distance_high']:.1f}]"
        score = "–"
        if row["caption_score"] is not None:
            score = f"{row['caption_score']:.2f} ± {row['caption_score_error']:.2f}"
        # Added to, a zero has no sign.
        above = (row["distance"] - real) / (unguided - real) + 0.0
        lines.append(
            f"| {name} | {row['distance']:.1f}{interval} | {above:.0%} | {kid_cell(row['kid'], row['kid_spread'])} "
            f"| {score} | {share(row['background'])} | {share(row['style'])} | {share(row['thing'])} |"
        )
    return "\n".join(lines) + "\n"


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

    Each row is kept in judged.json as it comes, under its settings and the weights' hash: an interrupted run goes on.

    Raises:
        InputError: 1 is not among the scales.
    """
    wanted = [float(scale) for scale in scales.split(",")]
    if 1.0 not in wanted:
        raise InputError(f"--scales {scales}: 1 must be among them, as shares are of its distance")
    output = output or work
    artworks = load_artworks(work)
    captions = draw_captions(artworks, held_out=True, count=images, seed=seed, grammar=FULL if full else Grammar())
    prompts = [caption.text for caption in captions]
    loaded = load(locate(model), device=device())
    judges = Judges.load(work, artworks, vae=loaded.pipeline.vae, seed=seed)
    kind = "full" if full else "mixed"

    def row(name: str, make: Callable[[], torch.Tensor], settings: str, drawn: bool) -> dict[str, Any]:
        key = f"{name}, N {images} {kind} captions of seed {seed}{settings}, judged by {judges.identity}"
        found = remembered(output / RESULTS_FILE, key, lambda: judges.figures(make(), captions, drawn=drawn))
        print(f"{name}: {DISTANCE_NAME} {found['distance']:.1f}", flush=True)
        return found

    weights = weights_sha256(loaded.files.folder)
    rows = {"real images": row("real images", lambda: real_images(artworks, captions), "", False)}
    rows["reconstructions"] = row(
        "reconstructions",
        lambda: reconstructed(loaded.pipeline.vae, real_images(artworks, captions)),
        f", {weights}",
        False,
    )
    passes = sum((1 + (scale > 1)) * steps * images for scale in wanted)
    with FastestRunners(loaded, passes=passes) as runners:

        def drawn(scale: float) -> torch.Tensor:
            return draw(
                loaded,
                runners(loaded.unet),
                prompts,
                scale=scale,
                steps=steps,
                seed=seed,
                sampler=sampler,
                batch_size=batch_size,
            )

        for scale in wanted:
            make = partial(drawn, scale)
            rows[f"w={scale:g}"] = row(f"w={scale:g}", make, f", {sampler} {steps}, {weights}", True)
    table = markdown_table(rows)
    (output / TABLE_FILE).write_text(table, encoding="utf-8")
    print(f"\nN = {images}, {kind} captions, {sampler} {steps} steps\n\n{table}")


def judges(work: Work = Path("teacher-work"), model: ModelName = MODEL_NAME, seed: Seed = 0) -> None:
    """Train the judges of style and of things unless `work` has them; their accuracy on held-out artworks."""
    artworks = load_artworks(work)
    vae = load(locate(model), device=device()).pipeline.vae
    loaded = Judges.load(work, artworks, vae=vae, seed=seed)
    captions = held_out_captions(artworks)
    real = real_images(artworks, captions)
    for name, images in (("real", real), ("reconstructed", reconstructed(vae, real))):
        found = loaded.figures(images, captions, drawn=False)
        print(
            f"judges: of {len(images)} {name} held-out images, background {found['background']:.1%}, style "
            f"{found['style']:.1%}, thing {found['thing']:.1%}"
        )
    seen = style_of(loaded.styles, real)
    for style in STYLES:
        taken = Counter(name for name, caption in zip(seen, captions, strict=True) if caption.style == style)
        most = ", ".join(f"{count} as {name}" for name, count in taken.most_common(3))
        print(f"judges: of {taken.total()} real images in the style {style}: {most}")


def vae_quality(
    work: Work = Path("teacher-work"),
    model: ModelName = MODEL_NAME,
    images: Images = 1000,
    from_work: Annotated[bool, typer.Option(help="Judge `vae.safetensors` of the work folder, not the model.")] = False,
) -> None:
    """PSNR of the autoencoder on held-out artworks, and the distance of its reconstructions to real images."""
    artworks = load_artworks(work)
    vae = load_vae(work).to(device()) if from_work else load(locate(model), device=device()).pipeline.vae
    real = real_images(artworks, draw_captions(artworks, held_out=True, count=images, seed=0))
    network, reference = EfficientNetLite0Features().to(device()), Reference.load(REFERENCE)
    of_real, of_decoder = (
        frechet_distance(reference, features_of(network, shown)) for shown in (real, reconstructed(vae, real))
    )
    print(
        f"vae: held-out PSNR {held_out_psnr(vae, artworks):.2f} dB; {DISTANCE_NAME} of {len(real)} reconstructions "
        f"{of_decoder:.1f}, of the real images {of_real:.1f}"
    )


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
    wanted = [float(scale) for scale in scales.split(",")]
    loaded = load(locate(model), device=device())
    output.mkdir(parents=True, exist_ok=True)
    passes = sum((1 + (scale > 1)) * steps * 3 * rows for scale in wanted) + 2 * steps * pairs
    with FastestRunners(loaded, passes=passes) as runners:

        def drawn(prompts: list[str], scale: float) -> torch.Tensor:
            return draw(loaded, runners(loaded.unet), prompts, scale=scale, steps=steps, seed=seed)

        for name, captions in sets.items():
            prompts, real = [caption.text for caption in captions], real_images(artworks, captions)
            if name == "pairs":
                couples = torch.stack([real, drawn(prompts, SHOWN_SCALE)], dim=1).flatten(0, 1)
                contact_sheet(couples, columns=12).save(output / "pairs.png")
                (output / "pairs.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
                continue
            columns = {"real": real} | {f"w={scale:g}": drawn(prompts, scale) for scale in wanted}
            labelled_grid(columns, prompts).save(output / f"{name}.png")
    print(f"grids: {', '.join(sets)} in {output}")


def curve(
    work: Work = Path("teacher-work"),
    output: Output = None,
    stages: Annotated[str, typer.Option(help="Training stages, comma-separated.")] = "vae,diffusion",
) -> None:
    """Plot the training losses that `work` has logs of (loss.png): a running mean over a fiftieth of the steps.

    Raises:
        InputError: there is no log.
    """
    logs = {name: path for name in stages.split(",") if (path := training_log(work, name)).exists()}
    if not logs:
        raise InputError(f"there is no training log in {work}: run the stages {stages} first")
    figure, axes = plt.subplots(1, len(logs), figsize=(5 * len(logs), 3.2), layout="constrained", squeeze=False)
    for axis, (name, path) in zip(axes[0], logs.items(), strict=True):
        rows = [row for _, row in json_lines(path)]
        window = max(1, len(rows) // 50)
        smooth = np.convolve([row["loss"] for row in rows], np.ones(window) / window, "valid")
        axis.plot([row["step"] for row in rows][window - 1 :], smooth, color="#2f6fed")
        axis.set(title=name, xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    folder = output or work
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.png").write_bytes(rendered(figure, "png"))
    print(f"curve: {', '.join(logs)} in {folder / 'loss.png'}")
