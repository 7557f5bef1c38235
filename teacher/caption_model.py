"""The caption model `emoji64-clip`: how well does an image fit its caption? A small CLIP, trained on real pictures.

A stock `CLIPModel` folder with its tokenizer and image processor, which `bench` reads as it reads any other CLIP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ..benchmarks.quality.clip_score import ClipScorer
from ..engine.embedded import CAPTION_MODEL, MODEL_DIR
from ..engine.files import staged_folder
from ..engine.model import resolve_device
from .architecture import text_settings
from .captions import FULL, Grammar, caption, draw_captions
from .dataset import SIZE, Artworks, load_artworks
from .measure import Batch, Rate, Seed, Steps, Work, real_images
from .optimize import optimize
from .palette import BACKGROUNDS
from .placement import draw_training_pictures, to_model_range

FULL_SHARE = 0.5
"""Share of full captions in training; the others are of the grammar."""

RETRIEVAL = 500
"""Held-out pictures and captions that retrieval is measured among."""


def make_caption_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A 1.6M-parameter CLIP: a vision transformer on patches of 8 pixels, and a text transformer."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
    }
    text = text_settings(tokenizer, layers=2)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def training_batch(artworks: Artworks, random: np.random.Generator, count: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures `(count, 3, 64, 64)` in [-1, 1] and their captions; a little noisy, as what is scored was decoded."""
    drawn, chosen, backgrounds = draw_training_pictures(artworks, random, count)
    pictures, names = to_model_range(drawn), list(BACKGROUNDS)
    noise = torch.from_numpy(random.standard_normal(pictures.shape, dtype=np.float32))
    texts = [
        caption(artworks, int(a), names[b], random, FULL if random.random() < FULL_SHARE else Grammar()).text
        for a, b in zip(chosen, backgrounds, strict=True)
    ]
    return (pictures + 0.05 * random.random() * noise).clamp(-1, 1), texts


def retrieval(scorer: ClipScorer, artworks: Artworks, *, count: int = RETRIEVAL, seed: int = 0) -> tuple[float, float]:
    """Shares of held-out pictures whose full caption scores highest, and among the five highest, of `count`."""
    captions = draw_captions(artworks, held_out=True, count=count, seed=seed + 7, grammar=FULL)
    pictures = real_images(artworks, captions, seed=seed)
    prompts = [each.text for each in captions]
    of_pictures, of_prompts = scorer.embeddings(pictures, prompts)
    scores = of_pictures @ of_prompts.T
    # A caption that was drawn twice counts once.
    better = (scores > scores.diagonal()[:, None] + 1e-6).sum(dim=1)
    return (better < 1).float().mean().item(), (better < 5).float().mean().item()


def caption_model(
    work: Work = Path("teacher-work"),
    output: Annotated[Path, typer.Option(help="Folder to write.")] = CAPTION_MODEL,
    steps: Steps = 1500,
    batch: Batch = 192,
    learning_rate: Rate = 1e-3,
    seed: Seed = 0,
) -> None:
    """Train the caption model (Radford et al. 2021, the symmetric contrastive loss) and report held-out retrieval."""
    artworks = load_artworks(work)
    folder = work / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder if folder.exists() else MODEL_DIR / "tokenizer")
    torch.manual_seed(seed)
    where = resolve_device("auto")
    model = make_caption_model(tokenizer).to(where)

    def loss_of(step: int) -> torch.Tensor:
        pictures, texts = training_batch(artworks, np.random.default_rng([seed, 9, step]), batch)
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(where)
        return model(**tokens, pixel_values=pictures.to(where), return_loss=True).loss

    optimize(
        name="caption-model",
        modules={"clip": model},
        loss_of=loss_of,
        checkpoint=work / "caption-model.checkpoint.safetensors",
        steps=steps,
        learning_rate=learning_rate,
        header={"seed": seed, "batch": batch},
    )
    half = [0.5, 0.5, 0.5]
    square = {"height": SIZE, "width": SIZE}
    with staged_folder(output, replaces=("config.json", "preprocessor_config.json")) as staged:
        model.half().save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        CLIPImageProcessorPil(size=square, crop_size=square, image_mean=half, image_std=half).save_pretrained(staged)
    first, five = retrieval(ClipScorer(str(output), device=where), artworks, seed=seed)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(
        f"caption-model: of {RETRIEVAL} held-out pictures {first:.1%} find their caption first, {five:.1%} among five; "
        f"{size / 1e6:.1f} MB in {output}"
    )
