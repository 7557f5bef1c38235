"""What quality is measured against: real images, and what the autoencoder alone makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torchmetrics.functional.image import peak_signal_noise_ratio

from ..benchmarks.quality.features import EfficientNetLite0Features, features_of
from ..benchmarks.quality.reference import Reference
from ..engine.embedded import HELD_OUT_PROMPTS, REFERENCE, TRAIN_PROMPTS
from ..engine.errors import InputError
from ..engine.model import resolve_device
from .architecture import make_vae
from .captions import FULL, Caption, caption, draw_captions
from .dataset import Artworks, load_artworks
from .palette import BACKGROUNDS
from .placement import draw_pictures, draw_training_pictures, to_model_range

Work = Annotated[Path, typer.Option(help="Folder for downloads, checkpoints and intermediate files.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer updates.")]
Batch = Annotated[int, typer.Option(min=1, help="Images per update.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]

PROMPTS = 4000
"""Prompts in each of the shipped lists."""

IMAGES_APART = 1000
"""Real images kept apart from the reference."""

REFERENCE_IMAGES = 12_000
"""Real images behind the reference."""


def made_by(stage: str, path: Path) -> Path:
    """The path of a file that a stage leaves.

    Raises:
        InputError: it isn't there.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}: run the stage `{stage}` with the same --work first")
    return path


def load_vae(work: Path) -> AutoencoderKL:
    """The autoencoder that the `vae` stage left in `work`."""
    model = make_vae()
    model.load_state_dict(load_file(made_by("vae", work / "vae.safetensors")))
    return model.eval().requires_grad_(False)


def real_images(artworks: Artworks, captions: list[Caption], *, seed: int = 0) -> torch.Tensor:
    """The pictures that captions were made for, each placed anew, uint8 `(N, 3, 64, 64)`."""
    indices = np.array([caption.artwork for caption in captions])
    colors = np.array([BACKGROUNDS[caption.pictured] for caption in captions])
    return draw_pictures(artworks, indices, colors, np.random.default_rng([seed, 6]))


@torch.inference_mode()
def reconstructed(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """uint8 images `(N, 3, H, W)` through encoder and decoder, on the CPU: what a perfect denoiser would draw."""
    chunks = []
    for chunk in images.split(50):
        pixels = to_model_range(chunk).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float().clamp(-1, 1)
        chunks.append(((decoded + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(chunks)


def held_out_captions(artworks: Artworks) -> list[Caption]:
    """A full caption of every held-out artwork, over one background after the other."""
    random, names = np.random.default_rng(0), list(BACKGROUNDS)
    indices = np.flatnonzero(artworks.held_out & (artworks.weights > 0))
    return [caption(artworks, int(i), names[n % len(names)], random, FULL) for n, i in enumerate(indices)]


def held_out_psnr(vae: AutoencoderKL, artworks: Artworks) -> float:
    """Mean over the held-out artworks of the reconstruction's PSNR in dB."""
    images = real_images(artworks, held_out_captions(artworks))
    return peak_signal_noise_ratio(
        reconstructed(vae, images).float(), images.float(), data_range=255.0, dim=(1, 2, 3)
    ).item()


def reference(work: Work = Path("teacher-work"), seed: Seed = 0) -> None:
    """Write the prompt lists, and the features of real images that quality is measured against.

    The reference is of pictures drawn as training draws them; the features kept apart are of real pictures of the
    first held-out prompts, so they give the distance that a perfect model would reach.
    """
    artworks = load_artworks(work)
    held_out = draw_captions(artworks, held_out=True, count=PROMPTS, seed=seed)
    training = draw_captions(artworks, held_out=False, count=PROMPTS, seed=seed)
    for path, captions in ((TRAIN_PROMPTS, training), (HELD_OUT_PROMPTS, held_out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(each.text for each in captions) + "\n", encoding="utf-8")
    network = EfficientNetLite0Features().to(resolve_device("auto"))
    drawn, *_ = draw_training_pictures(artworks, np.random.default_rng([seed, 3]), REFERENCE_IMAGES)
    apart = real_images(artworks, held_out[:IMAGES_APART])
    Reference.of(features_of(network, drawn), features_of(network, apart)).save(REFERENCE)
    print(f"reference: {len(drawn)} images, {IMAGES_APART} apart, {REFERENCE.stat().st_size / 1e6:.1f} MB")
