"""Real images: a folder of them, or the statistics that were made of one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ...engine.errors import InputError
from .features import FeatureNetwork, Reference, features_of

BATCH = 50


def reference_of(path: Path, network: FeatureNetwork, *, size: int | None = None) -> Reference:
    """The reference in a file of `Reference.save`, or of a folder of images.

    Args:
        path: either.
        network: makes the features.
        size: see `reference_from_folder`.

    Raises:
        InputError: it can't be read, or its features are of another network.
    """
    if path.is_dir() or not path.exists():
        return reference_from_folder(path, network, size=size)
    reference = Reference.load(path)
    if len(reference.mean) != network.num_features:
        raise InputError(
            f"the reference {path} holds {len(reference.mean)} features an image, and {network.distance_name} needs "
            f"{network.num_features}: pass --reference with the folder of images"
        )
    return reference


def reference_from_folder(folder: Path, network: FeatureNetwork, *, size: int | None = None) -> Reference:
    """The statistics of a folder of real images; every tenth is kept apart for KID, recall and the floor.

    Args:
        folder: PNG, JPEG and WebP files, at any depth, taken in the order of their names.
        network: makes the features.
        size: side in pixels of the square that every image is cut to about its middle and resized to; None takes the
            images as they are, which must all have one size.

    Raises:
        InputError: there are fewer than 20 readable images, or they differ in size.
    """
    if not folder.is_dir():
        raise InputError(f"there is no reference folder {folder}")
    paths = list(_images_in(folder))
    if len(paths) < 20:
        raise InputError(f"the reference folder {folder} holds {len(paths)} images: at least 20 are needed")
    features, first = [], None
    for start in range(0, len(paths), BATCH):
        batch = []
        for path in paths[start : start + BATCH]:
            pixels = _pixels(path, size)
            first = first or pixels.shape
            if pixels.shape != first:
                raise InputError(
                    f"the reference folder {folder} mixes image sizes ({first[1]}x{first[0]}, and {path.name} has "
                    f"{pixels.shape[1]}x{pixels.shape[0]}): pass --reference-size to cut all to one square"
                )
            batch.append(torch.from_numpy(pixels).permute(2, 0, 1))
        features.append(features_of(network, torch.stack(batch), batch_size=BATCH))
    rows = torch.cat(features)
    # Not the last tenth: a folder may be sorted by what is shown.
    apart = torch.arange(len(rows)) % 10 == 9
    return Reference.of(rows[~apart], rows[apart])


def _images_in(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"}:
            yield path


def _pixels(path: Path, size: int | None) -> np.ndarray:
    """uint8 `(H, W, 3)`."""
    try:
        # libpng and libjpeg complain on standard error by themselves.
        with contextlib.redirect_stderr(io.StringIO()), Image.open(path) as image:
            rgb = image.convert("RGB")
            if size is not None:
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)
            return np.array(rgb)
    except (OSError, ValueError) as error:
        raise InputError(f"can't decode the reference image {path}: {error}") from None
