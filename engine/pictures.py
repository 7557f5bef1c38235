"""Pictures as they are read from files, and picture grids: one row per prompt, one column per sampling mode."""

from __future__ import annotations

import io
import os
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .errors import one_line

# Pillow's other decoders are rarely wanted and more easily attacked; EPS would even start Ghostscript.
PIL_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# `formats` of `Image.open`, and the endings, are known only of what is loaded.
Image.init()
PICTURE_TYPES = tuple(sorted(end[1:] for end, kind in Image.registered_extensions().items() if kind in PIL_FORMATS))
"""Endings of the files that are pictures, without the dot, in lower case."""

FIRST_FRAME = "with several frames or pages, of which the first is used"
"""Why a picture is used in part."""

_MARGIN = 8
_TEXT = 13
_SPACING = 4
_CELL = 128
_INK, _PAPER = (30, 30, 36), (255, 255, 255)


class PictureError(ValueError):
    """A picture can't be decoded; the text says why."""


def read_picture(source: bytes | Path) -> tuple[Image.Image, Counter[str]]:
    """Decode a picture's file or its content: see `rgb_of`.

    Returns:
        The picture, and notes on what of it is not used, each counted once.

    Raises:
        PictureError: it can't be read or decoded.
    """
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        with Image.open(io.BytesIO(content), formats=PIL_FORMATS) as opened:
            # A phone's JPEG may carry another view of the same picture.
            several = getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
            return rgb_of(opened), Counter([FIRST_FRAME] if several else [])
    except UnidentifiedImageError:
        raise PictureError(f"it is none of {', '.join(PIL_FORMATS)}") from None
    # On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise PictureError(one_line(error)) from None


def rgb_of(image: Image.Image) -> Image.Image:
    """An RGB picture as a viewer shows it on a white page.

    The EXIF orientation is applied; colours are taken from the embedded profile to sRGB; transparency is composed over
    white, for what lies beneath it is arbitrary; 16-bit gray is scaled to 8 bits, which Pillow's conversion clips.

    Raises:
        ValueError: its values are floats, whose black and white are unknown.
    """
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("it holds 32-bit floats: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    image = _in_srgb(image, profile)
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """As RGB, by the ICC profile; without one, or where it is damaged, as Pillow converts it."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        found: Any = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
        if found is None and profile:
            found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if found is not None and "sRGB" not in ImageCms.getProfileName(found):
            return ImageCms.profileToProfile(image, found, srgb, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        pass
    return image.convert("RGB")


def files_in(folder: Path) -> list[Path]:
    """All files at any depth that aren't hidden, sorted; links are followed, a folder that is met again is not."""
    found: list[Path] = []
    met: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in met else sorted(name for name in folders if not name.startswith("."))
        found += [] if real in met else [Path(parent, name) for name in names if not name.startswith(".")]
        met.add(real)
    return sorted(path for path in found if path.is_file())


def labelled_grid(columns: dict[str, torch.Tensor], captions: list[str]) -> Image.Image:
    """A row per caption; `columns` are uint8 images `(N, 3, H, W)` by their heading, the same N in each."""
    font = ImageFont.load_default(_TEXT)
    caption_width = 190
    rows = len(captions)
    headings = {name: textwrap.wrap(name, 18)[:3] for name in columns}
    lines = max(len(heading) for heading in headings.values())
    top = 2 * _MARGIN + lines * _TEXT + (lines - 1) * _SPACING
    width = caption_width + len(columns) * (_CELL + _MARGIN) + _MARGIN
    height = top + rows * (_CELL + _MARGIN)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions):
        y = top + row * (_CELL + _MARGIN)
        draw.multiline_text((_MARGIN, y), "\n".join(textwrap.wrap(caption, 26)[:7]), _INK, font=font)
    for column, (name, images) in enumerate(columns.items()):
        x = caption_width + _MARGIN + column * (_CELL + _MARGIN)
        draw.multiline_text((x, _MARGIN // 2), "\n".join(headings[name]), _INK, font=font, spacing=_SPACING)
        for row in range(rows):
            y = top + row * (_CELL + _MARGIN)
            canvas.paste(_enlarged(images[row]), (x, y))
    return canvas


def contact_sheet(images: torch.Tensor, *, columns: int) -> Image.Image:
    """Tile uint8 images `(N, 3, H, W)` without captions; the last row is filled up with paper."""
    tiles = [_enlarged(pixels) for pixels in images]
    tiles += [Image.new("RGB", (_CELL, _CELL), _PAPER)] * (-len(tiles) % columns)
    return make_image_grid(tiles, rows=len(tiles) // columns, cols=columns)


def _enlarged(pixels: torch.Tensor) -> Image.Image:
    """A uint8 image `(3, H, W)` as a square of `_CELL` pixels; small ones without smoothing."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return image.resize((_CELL, _CELL), Image.Resampling.NEAREST if image.width <= _CELL else Image.Resampling.LANCZOS)
