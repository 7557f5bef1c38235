"""How an artwork becomes a picture: placed, scaled, turned and mirrored over a color."""

from __future__ import annotations

import re

import numpy as np
import torch
import torch.nn.functional as F

from .dataset import SIZE, Artworks, Thing
from .palette import PALETTE

_HANDED = re.compile(r"\b(left|right|leftwards|rightwards|arrow|clock|oclock|keycap|button|input|letter|sign)\b")


def mirrors(thing: Thing) -> bool:
    """Whether the mirrored picture of a thing still is one: symbols, letters and pointing hands are not."""
    return thing.group != "symbols" and not _HANDED.search(thing.name)


def draw_pictures(
    artworks: Artworks,
    indices: np.ndarray,
    colors: np.ndarray,
    random: np.random.Generator,
    *,
    smallest: float = 0.7,
    degrees: float = 10.0,
    mirror: float = 0.5,
) -> torch.Tensor:
    """Pictures of artworks, each scaled, turned and placed at random within its frame.

    Args:
        indices: `(n,)` artworks.
        colors: `(n, 3)` RGB of the backgrounds, 0 to 255.
        smallest: smallest side of the artwork, as a share of the picture's; the largest is 1.
        degrees: largest turn, either way.
        mirror: probability of a mirrored picture, for things that have no handedness.

    Returns:
        uint8 `(n, 3, 64, 64)`.
    """
    count = len(indices)
    scale = random.uniform(smallest, 1, count)
    angle = np.radians(random.uniform(-degrees, degrees, count))
    shift = random.uniform(-1, 1, (count, 2)) * (1 - scale)[:, None]
    mirrored = np.array([mirrors(artworks.things[i]) for i in indices]) & (random.random(count) < mirror)
    # affine_grid maps places of the picture, from -1 to 1, to places of the artwork: the inverse of the placement.
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    flip = np.where(mirrored, -1.0, 1.0)
    rows = np.stack([np.stack([flip * cosine, flip * sine], -1), np.stack([-sine, cosine], -1)], -2)
    theta = np.concatenate([rows, -rows @ shift[..., None]], -1)
    rgba = torch.from_numpy(artworks.rgba[indices]).permute(0, 3, 1, 2).float() / 255
    alpha = rgba[:, 3:]
    # Resample premultiplied, or the color of transparent pixels bleeds into the edges.
    flat = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)
    grid = F.affine_grid(torch.from_numpy(theta).float(), [count, 4, SIZE, SIZE], align_corners=False)
    flat = F.grid_sample(flat, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    color = torch.from_numpy(np.asarray(colors, dtype=np.float32))[:, :, None, None]
    return (flat[:, :3] * 255 + color * (1 - flat[:, 3:])).add(0.5).clamp(0, 255).to(torch.uint8)


def draw_training_pictures(
    artworks: Artworks, random: np.random.Generator, count: int
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Pictures as training sees them, uint8 `(count, 3, 64, 64)`; their artworks and backgrounds, each `(count,)`."""
    chosen = artworks.draw(random, count)
    backgrounds = random.integers(len(PALETTE), size=count)
    return draw_pictures(artworks, chosen, PALETTE[backgrounds], random), chosen, backgrounds


def to_model_range(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1
