"""Picture grids: one row per prompt, one column per sampling mode."""

from __future__ import annotations

import textwrap

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_TEXT = 13
_INK, _PAPER = (30, 30, 36), (255, 255, 255)


def labelled_grid(columns: dict[str, torch.Tensor], captions: list[str], *, cell: int = 128) -> Image.Image:
    """Draw a comparison grid.

    Args:
        columns: by their heading, uint8 images `(N, 3, H, W)`, the same N in each.
        captions: one per row.
        cell: side of a drawn image in pixels; small images are enlarged without smoothing.
    """
    font = ImageFont.load_default(_TEXT)
    caption_width = 190
    rows = len(captions)
    width = caption_width + len(columns) * (cell + _MARGIN) + _MARGIN
    height = 2 * _MARGIN + _TEXT + rows * (cell + _MARGIN)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions):
        y = 2 * _MARGIN + _TEXT + row * (cell + _MARGIN)
        draw.multiline_text((_MARGIN, y), "\n".join(textwrap.wrap(caption, 26)[:7]), _INK, font=font)
    for column, (heading, images) in enumerate(columns.items()):
        x = caption_width + _MARGIN + column * (cell + _MARGIN)
        draw.text((x, _MARGIN // 2), heading, _INK, font=font)
        for row in range(rows):
            y = 2 * _MARGIN + _TEXT + row * (cell + _MARGIN)
            canvas.paste(_enlarged(images[row], cell), (x, y))
    return canvas


def contact_sheet(images: torch.Tensor, *, columns: int, cell: int = 128) -> Image.Image:
    """Tile uint8 images `(N, 3, H, W)` without captions; the last row is filled up with paper."""
    tiles = [_enlarged(pixels, cell) for pixels in images]
    tiles += [Image.new("RGB", (cell, cell), _PAPER)] * (-len(tiles) % columns)
    return make_image_grid(tiles, rows=len(tiles) // columns, cols=columns)


def _enlarged(pixels: torch.Tensor, cell: int) -> Image.Image:
    """A uint8 image `(3, H, W)` as a square of `cell` pixels; small ones without smoothing."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return image.resize((cell, cell), Image.Resampling.NEAREST if image.width <= cell else Image.Resampling.LANCZOS)
