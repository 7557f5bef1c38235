"""The background colors that captions name, and how to find them again in an image."""

from __future__ import annotations

import numpy as np

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (18, 18, 18),
    "gray": (150, 150, 150),
    "red": (222, 58, 52),
    "orange": (245, 145, 40),
    "yellow": (250, 222, 85),
    "green": (85, 178, 78),
    "teal": (30, 140, 135),
    "light blue": (165, 215, 245),
    "blue": (50, 95, 210),
    "purple": (138, 78, 190),
    "pink": (250, 172, 202),
    "brown": (125, 82, 55),
}

PALETTE = np.array(list(BACKGROUNDS.values()))
"""`(n, 3)` RGB."""

CORNER = 4
"""Side of the squares in an image's corners that show its background, in pixels; few artworks reach most of them."""


def background_of(images: np.ndarray) -> list[str]:
    """Name each image's background: the palette entry nearest (in RGB) to the median of its corner pixels.

    Args:
        images: `(n, h, w, 3)` uint8.
    """
    near, far = slice(0, CORNER), slice(-CORNER, None)
    corners = [images[:, y, x].reshape(len(images), -1, 3) for y in (near, far) for x in (near, far)]
    color = np.median(np.concatenate(corners, axis=1), axis=1)
    names = list(BACKGROUNDS)
    return [names[i] for i in np.linalg.norm(color[:, None] - PALETTE, axis=-1).argmin(axis=1)]
