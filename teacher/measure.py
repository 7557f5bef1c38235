"""Two stages of the recipe: what quality is measured against, and the shipped model's own figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ..benchmarks.features import DISTANCE_NAME, EfficientNetLite0Features, Reference, features_of
from ..benchmarks.quality import judge
from ..benchmarks.sampling import Campaign, Contestant
from ..engine.files import write_json
from ..engine.guidance import teacher_denoiser
from ..engine.model import load, locate
from ..engine.pictures import labelled_grid
from ..engine.prompts import read_prompts
from ..engine.runners import TorchRunner
from ..engine.samplers import make_scheduler
from . import HELD_OUT_PROMPTS, MODEL_NAME, REFERENCE, TRAIN_PROMPTS
from .dataset import compose, draw_prompts, load_artworks
from .palette import BACKGROUNDS

Work = Annotated[Path, typer.Option(help="Folder for downloads, checkpoints and intermediate files.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]

PROMPTS = 4000
"""Prompts in each of the shipped lists."""

FLOOR_IMAGES = 1000
"""Real images kept apart from the reference."""


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def reference(work: Work = Path("teacher-work"), seed: Seed = 0) -> None:
    """Write the prompt lists, and the features of real images that quality is measured against.

    The reference is every training artwork once, over a random background; the features kept apart are of the real
    images that the first held-out prompts describe, so they give the floor that a perfect model would reach.
    """
    artworks = load_artworks(work)
    for path, held_out in ((TRAIN_PROMPTS, False), (HELD_OUT_PROMPTS, True)):
        pairs = draw_prompts(artworks, held_out=held_out, count=PROMPTS, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(artworks.caption(*pair) for pair in pairs) + "\n", encoding="utf-8")
    network = EfficientNetLite0Features().to(device())

    def features(pairs: list[tuple[int, str]]) -> torch.Tensor:
        indices = [artwork for artwork, _ in pairs]
        colours = np.array([BACKGROUNDS[name] for _, name in pairs])
        images = compose(artworks.rgba[indices], colours[:, None, None])
        return features_of(network, torch.from_numpy(images).permute(0, 3, 1, 2))

    random = np.random.default_rng([seed, 3])
    names = list(BACKGROUNDS)
    training = [(int(i), names[random.integers(len(names))]) for i in np.flatnonzero(~artworks.held_out)]
    Reference.of(features(training), features(pairs[:FLOOR_IMAGES])).save(REFERENCE)
    print(f"reference: {len(training)} images, {FLOOR_IMAGES} apart, {REFERENCE.stat().st_size / 1e6:.1f} MB")


def evaluate(
    output: Annotated[Path, typer.Option(help="Folder for guidance.json and guidance.png.")] = Path("teacher-work"),
    images: Annotated[int, typer.Option(min=2, help="Images at each guidance scale (N).")] = 1000,
    scales: Annotated[str, typer.Option(help="Guidance scales, comma-separated; 1 must be among them.")] = "1,2,3,5",
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 20,
    seed: Seed = 0,
) -> None:
    """Measure the shipped model over guidance scales, on held-out prompts, and draw the grid of its card."""
    model = load(locate(MODEL_NAME), device=device())
    runner = TorchRunner(model.unet)
    prompts = read_prompts(HELD_OUT_PROMPTS)[:images]

    def contestant(scale: float) -> Contestant:
        return Contestant(
            name=f"w={scale:g}",
            kind="teacher",
            steps=steps,
            cost=steps * (1 + (scale > 1)),
            open=partial(teacher_denoiser, runner, scale),
            make_scheduler=partial(make_scheduler, "ddim", model.pipeline.scheduler.config),
        )

    network = EfficientNetLite0Features().to(model.device)
    quality = judge(
        Campaign(model=model, network=network, prompts=prompts, seed=seed, batch_size=50),
        [contestant(float(scale)) for scale in scales.split(",")],
        reference=Reference.load(REFERENCE),
    )
    assert quality.floor is not None
    unguided = next(row.distance for row in quality.rows if row.name == "w=1")
    assert unguided is not None
    print(f"N = {quality.images}, DDIM {steps} steps; real images (the floor): {quality.floor:.1f}")
    print(f"| guidance | {DISTANCE_NAME} | above the floor, as a share of w=1's | KID x1000 | background as named |")
    print("|---|---|---|---|---|")
    for row in quality.rows:
        assert row.distance is not None
        assert row.kid is not None
        share = (row.distance - quality.floor) / (unguided - quality.floor)
        print(f"| {row.name} | {row.distance:.1f} | {share:.0%} | {row.kid * 1e3:.2f} | {row.background:.1%} |")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "guidance.json", quality.as_json())
    labelled_grid({name: x[:8] for name, x in quality.samples.items()}, prompts[:8]).save(output / "guidance.png")
