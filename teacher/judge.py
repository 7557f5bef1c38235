"""Stages that judge the model: tables over guidance scales, pictures, and curves for its card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer

from ..benchmarks.fastest import SAMPLING_BATCH, FastestRunners
from ..benchmarks.quality.distances import frechet_distance, kernel_distance, left_out_distances
from ..benchmarks.quality.features import DISTANCE_NAME, EfficientNetLite0Features, features_of
from ..benchmarks.quality.reference import Reference
from ..benchmarks.report.plots import rendered
from ..benchmarks.report.tables import KID_HEADING, kid_cell
from ..benchmarks.stats import jackknifed
from ..engine.embedded import MODEL_NAME, REFERENCE
from ..engine.errors import InputError
from ..engine.files import json_lines, sha256_of
from ..engine.guidance import teacher_denoiser
from ..engine.model import Model, load, locate
from ..engine.pictures import contact_sheet, labelled_grid
from ..engine.runners import Runner
from ..engine.sampling import generate, to_uint8
from ..engine.schedulers import make_scheduler
from .backgrounds import backgrounds
from .dataset import Artworks, draw_prompts, load_artworks
from .measure import Seed, Work, device, held_out_psnr, load_vae, real_images, reconstructed, training_log
from .results import remembered
from .style import STYLE_FILE, StyleNetwork, style_accuracy, style_network

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


def figures(
    images: torch.Tensor,
    prompts: list[str],
    *,
    network: torch.nn.Module,
    reference: Reference,
    styles: StyleNetwork,
    drawn: bool = True,
) -> dict[str, Any]:
    """All that is measured of uint8 images `(N, 3, H, W)`, as plain JSON values.

    Real images and their reconstructions (not `drawn`) get no KID: the reference's own features are theirs.
    """
    features = features_of(network, images)
    distance = frechet_distance(reference, features)
    left_out = left_out_distances(reference, features) if len(features) >= 4 else None
    interval = jackknifed(distance, left_out) if left_out else None
    kid, kid_spread = kernel_distance(reference, features) if drawn else (None, None)
    as_named = backgrounds(prompts, images)
    return {
        "images": len(images),
        "distance": distance,
        "distance_low": interval.low if interval else None,
        "distance_high": interval.high if interval else None,
        "kid": kid,
        "kid_spread": kid_spread,
        "background": as_named[as_named >= 0].float().mean().item(),
        "style": style_accuracy(styles, prompts, images),
    }


def draw(
    model: Model,
    runner: Runner,
    prompts: list[str],
    *,
    scale: float,
    steps: int,
    seed: int,
    batch_size: int = SAMPLING_BATCH,
) -> torch.Tensor:
    """The teacher's images, uint8 `(N, 3, H, W)`, by DDIM; image i from the noise of `seed + i`."""
    images = generate(
        model,
        teacher_denoiser(runner, scale),
        text=model.family.encode(model.pipeline, prompts),
        make_scheduler=partial(make_scheduler, "ddim", model.pipeline.scheduler.config),
        steps=steps,
        seed=seed,
        batch_size=batch_size,
    )
    return to_uint8(images)


def markdown_table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of `figures` by the rows' names, among them "real images" and "w=1"."""
    floor, unguided = rows["real images"]["distance"], rows["w=1"]["distance"]
    lines = [
        f"| | {DISTANCE_NAME} [95%] | above the floor, as a share of w=1's | {KID_HEADING} | background as named "
        "| style as named |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        interval = "" if row["distance_low"] is None else f" [{row['distance_low']:.1f}–{row['distance_high']:.1f}]"
        # Rows kept by an older version have no spread.
        kid = kid_cell(row["kid"], row.get("kid_spread"))
        # Added to, a zero has no sign.
        share = (row["distance"] - floor) / (unguided - floor) + 0.0
        lines.append(
            f"| {name} | {row['distance']:.1f}{interval} | {share:.0%} | {kid} | {row['background']:.1%} "
            f"| {row['style']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def evaluate(
    work: Work = Path("teacher-work"),
    output: Output = None,
    model: ModelName = MODEL_NAME,
    images: Images = 1000,
    scales: Scales = "1,2,3,5",
    steps: Sampling = 20,
    batch_size: Together = SAMPLING_BATCH,
    seed: Seed = 0,
) -> None:
    """Measure the model over guidance scales on held-out prompts, beside real images and their reconstructions.

    Each row is kept in judged.json as it comes, under its settings and the weights' hash: an interrupted run goes on.

    Raises:
        InputError: 1 is not among the scales, or there are fewer held-out prompts than images.
    """
    wanted = [float(scale) for scale in scales.split(",")]
    if 1.0 not in wanted:
        raise InputError(f"--scales {scales}: 1 must be among them, as shares are of its distance")
    output = output or work
    artworks = load_artworks(work)
    pairs = draw_prompts(artworks, held_out=True, count=images, seed=0)
    if len(pairs) < images:
        raise InputError(f"--images {images}: there are only {len(pairs)} held-out prompts")
    prompts = [artworks.caption(*pair) for pair in pairs]
    loaded = load(locate(model), device=device())
    measured = partial(
        figures,
        prompts=prompts,
        network=EfficientNetLite0Features().to(loaded.device),
        reference=Reference.load(REFERENCE),
        styles=style_network(work, artworks),
    )
    judges = f"{sha256_of(REFERENCE)[:8]}-{sha256_of(work / STYLE_FILE)[:8]}"

    def row(name: str, make: Callable[[], torch.Tensor], settings: str, drawn: bool) -> dict[str, Any]:
        key = f"{name}, N {images}{settings}, judged by {judges}"
        found = remembered(output / RESULTS_FILE, key, lambda: measured(make(), drawn=drawn))
        print(f"{name}: {DISTANCE_NAME} {found['distance']:.1f}", flush=True)
        return found

    weights = weights_sha256(loaded.files.folder)
    rows = {"real images": row("real images", lambda: real_images(artworks, pairs), "", False)}
    rows["reconstructions"] = row(
        "reconstructions",
        lambda: reconstructed(loaded.pipeline.vae, real_images(artworks, pairs)),
        f", {weights}",
        False,
    )
    passes = sum((1 + (scale > 1)) * steps * images for scale in wanted)
    with FastestRunners(loaded, passes=passes) as runners:

        def drawn(scale: float) -> torch.Tensor:
            runner = runners(loaded.unet)
            return draw(loaded, runner, prompts, scale=scale, steps=steps, seed=seed, batch_size=batch_size)

        for scale in wanted:
            make = partial(drawn, scale)
            rows[f"w={scale:g}"] = row(f"w={scale:g}", make, f", DDIM {steps}, seed {seed}, {weights}", True)
    table = markdown_table(rows)
    (output / TABLE_FILE).write_text(table, encoding="utf-8")
    print(f"\nN = {images}, DDIM {steps} steps\n\n{table}")


def style(work: Work = Path("teacher-work"), model: ModelName = MODEL_NAME, seed: Seed = 0) -> None:
    """Train the judge of style unless `work` has one; its accuracy on held-out images, real and reconstructed."""
    artworks = load_artworks(work)
    network = style_network(work, artworks, seed=seed)
    pairs = draw_prompts(artworks, held_out=True, count=artworks.held_out.sum(), seed=0)
    prompts, real = [artworks.caption(*pair) for pair in pairs], real_images(artworks, pairs)
    vae = load(locate(model), device=device()).pipeline.vae
    for name, images in (("real", real), ("reconstructed", reconstructed(vae, real))):
        print(f"style: {style_accuracy(network, prompts, images):.1%} of {len(images)} {name} held-out images")


def vae_quality(
    work: Work = Path("teacher-work"),
    model: ModelName = MODEL_NAME,
    images: Images = 1000,
    from_work: Annotated[bool, typer.Option(help="Judge `vae.safetensors` of the work folder, not the model.")] = False,
) -> None:
    """PSNR of the autoencoder on held-out artworks, and the distance of its reconstructions to real images."""
    artworks = load_artworks(work)
    vae = load_vae(work).to(device()) if from_work else load(locate(model), device=device()).pipeline.vae
    real = real_images(artworks, draw_prompts(artworks, held_out=True, count=images, seed=0))
    network, reference = EfficientNetLite0Features().to(device()), Reference.load(REFERENCE)
    floor, decoder = (
        frechet_distance(reference, features_of(network, shown)) for shown in (real, reconstructed(vae, real))
    )
    print(
        f"vae: held-out PSNR {held_out_psnr(vae, artworks):.2f} dB; {DISTANCE_NAME} of {len(real)} reconstructions "
        f"{decoder:.1f}, of the real images {floor:.1f}"
    )


def unseen_combinations(artworks: Artworks, *, count: int, seed: int) -> list[int]:
    """Held-out artworks of emoji that training shows in other styles only, one of each emoji, in random order."""
    seen = {(artworks.styles[i], artworks.names[i]) for i in np.flatnonzero(~artworks.held_out)}
    names = {name for _, name in seen}
    order = np.random.default_rng([seed, 4]).permutation(np.flatnonzero(artworks.held_out))
    found = {
        artworks.names[i]: int(i)
        for i in order
        if artworks.names[i] in names and (artworks.styles[i], artworks.names[i]) not in seen
    }
    return list(found.values())[:count]


def grids(
    work: Work = Path("teacher-work"),
    output: Output = None,
    model: ModelName = MODEL_NAME,
    scales: Scales = "1,2,3,5,7",
    steps: Sampling = 20,
    seen: Annotated[int, typer.Option(min=1, help="Captions of the training split.")] = 12,
    unseen: Annotated[int, typer.Option(min=1, help="Held-out combinations of emoji and style.")] = 40,
    seed: Seed = 0,
) -> None:
    """Draw seen captions (seen.png) and unseen combinations of emoji and style (unseen-1.png, …) at each guidance.

    The real artwork stands first in each row. unseen-pairs.png shows it beside the model's image, for judging by eye.
    """
    output = output or work
    artworks = load_artworks(work)
    random = np.random.default_rng([seed, 5])
    combinations = unseen_combinations(artworks, count=unseen, seed=seed)
    backgrounds = [name for _, name in draw_prompts(artworks, held_out=True, count=len(combinations), seed=seed)]
    sets = {
        "seen": draw_prompts(artworks, held_out=False, count=seen, seed=int(random.integers(2**31))),
        "unseen": list(zip(combinations, backgrounds, strict=True)),
    }
    wanted = [float(scale) for scale in scales.split(",")]
    shown = min(wanted, key=lambda scale: abs(scale - SHOWN_SCALE))
    loaded = load(locate(model), device=device())
    output.mkdir(parents=True, exist_ok=True)
    passes = sum((1 + (scale > 1)) * steps * (seen + unseen) for scale in wanted)
    with FastestRunners(loaded, passes=passes) as runners:
        for name, pairs in sets.items():
            prompts, real = [artworks.caption(*pair) for pair in pairs], real_images(artworks, pairs)
            columns = {"real": real} | {
                f"w={w:g}": draw(loaded, runners(loaded.unet), prompts, scale=w, steps=steps, seed=seed) for w in wanted
            }
            pages = [slice(i, i + 12) for i in range(0, len(pairs), 12)]
            for number, rows in enumerate(pages, start=1):
                page = labelled_grid({heading: x[rows] for heading, x in columns.items()}, prompts[rows])
                page.save(output / (f"{name}-{number}.png" if len(pages) > 1 else f"{name}.png"))
            if name == "unseen":
                couples = torch.stack([real, columns[f"w={shown:g}"]], dim=1).flatten(0, 1)
                contact_sheet(couples, columns=10).save(output / "unseen-pairs.png")
    print(f"grids: {len(sets['seen'])} seen captions, {len(combinations)} unseen combinations in {output}")


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
        rows = list(json_lines(path))
        window = max(1, len(rows) // 50)
        smooth = np.convolve([row["loss"] for row in rows], np.ones(window) / window, "valid")
        axis.plot([row["step"] for row in rows][window - 1 :], smooth, color="#2f6fed")
        axis.set(title=name, xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    folder = output or work
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.png").write_bytes(rendered(figure, "png"))
    print(f"curve: {', '.join(logs)} in {folder / 'loss.png'}")
