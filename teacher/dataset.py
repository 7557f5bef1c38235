"""The artworks behind `emoji64`: seven emoji sets, and what their things are called.

Everything comes from the npm registry by name and version (`PACKAGES`); nothing else is downloaded. An *artwork* is
one emoji in one style, RGBA. `captions` says what a picture of it is called, `placement` how the picture is composed.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64
"""Height and width of every image, in pixels."""

NAMES = ("emojibase-data", "17.0.0")
PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "emojione": ("@iconify-json/emojione", "1.2.3"),
    "blob": ("@iconify-json/noto-v1", "1.2.5"),
    "firefox": ("@iconify-json/fxemoji", "1.2.2"),
}
"""The npm package and version of each style; the first three hold pictures, the others SVG."""
STYLES = tuple(PACKAGES)
RASTER = ("noto", "twemoji", "fluent")

HELD_OUT_SHARE = 0.06
SPLIT_SEED = 20_26
RASTER_HELD_OUT = 600
"""Held-out artworks of the three raster styles, the same since the first version: weights go on from older ones."""

_FLAGS_GROUP = 9
_TONE = re.compile(r" (?:medium light|medium dark|light|medium|dark) skin tone")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What an emoji shows, in Unicode's and emojibase's words, cleaned: lower-case words only.

    Attributes:
        name: its label, "woman astronaut medium dark skin tone".
        words: other words for it: tags, and short names of other vendors; may be empty.
        subgroup: "animal marine" is given as "marine life".
        group: one of eight, "animals nature".
    """

    name: str
    words: tuple[str, ...]
    subgroup: str
    group: str

    @cached_property
    def base(self) -> str:
        """Its name without skin tones."""
        return _TONE.sub("", self.name)


@dataclass(frozen=True, kw_only=True)
class Artworks:
    """All artworks, decoded.

    Attributes:
        rgba: `(n, 64, 64, 4)` uint8, straight (not premultiplied) alpha.
        styles: the style of each, one of `STYLES`.
        things: what each shows.
        held_out: `(n,)` bool; True for the artworks that no training step sees.
    """

    rgba: np.ndarray
    styles: tuple[str, ...]
    things: tuple[Thing, ...]
    held_out: np.ndarray

    def __len__(self) -> int:
        return len(self.things)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups of things that pictures are drawn of, sorted."""
        return tuple(sorted({thing.group for thing in self.things} - {"components"}))

    @cached_property
    def weights(self) -> np.ndarray:
        """`(n,)` relative frequency: one over the root of the number of skin tones that a thing comes in.

        Six tones of each person would else be three pictures in five. Signs with letters count half, and squares of
        skin and tufts of hair (components) not at all.
        """
        keys = [(style, thing.base) for style, thing in zip(self.styles, self.things, strict=True)]
        tones: dict[tuple[str, str], int] = {}
        for key in keys:
            tones[key] = tones.get(key, 0) + 1
        share = {"components": 0.0, "symbols": 0.5}
        return np.array(
            [share.get(thing.group, 1) * tones[key] ** -0.5 for key, thing in zip(keys, self.things, strict=True)]
        )

    def draw(self, random: np.random.Generator, count: int, *, held_out: bool = False) -> np.ndarray:
        """`(count,)` indices of one split, by their weights, with replacement."""
        indices = np.flatnonzero(self.held_out == held_out)
        weights = self.weights[indices]
        return random.choice(indices, count, p=weights / weights.sum())


def clean_name(label: str) -> str:
    """Lower-case words only: "Woman: medium-light skin tone" gives "woman medium light skin tone"."""
    return " ".join(re.findall(r"[a-z0-9]+", label.lower().replace("’", "").replace("'", "")))


def download(cache: Path, package: tuple[str, str]) -> Path:
    """Fetch one npm package's tarball with the npm client; one that is there already is kept.

    Raises:
        RuntimeError: npm is missing, or the package can't be had.
    """
    name, version = package
    cache.mkdir(parents=True, exist_ok=True)
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
    return path


def _code(stem: str) -> str:
    return "-".join(part for part in stem.upper().split("-") if part != "FE0F")


def _json(archive: tarfile.TarFile, path: str) -> Any:
    member = archive.extractfile(f"package/{path}")
    assert member is not None
    return json.load(member)


def _things(tarball: Path) -> dict[str, Thing]:
    """Every emoji but flags and single letters, by its code points without variation selectors."""
    with tarfile.open(tarball) as archive:
        entries = _json(archive, "en/data.json")
        messages = _json(archive, "en/messages.json")
        vendors = [
            _json(archive, f"en/shortcodes/{vendor}.json") for vendor in ("cldr", "github", "iamcal", "joypixels")
        ]
    groups, subgroups = (
        {entry["order"]: clean_name(entry["message"]) for entry in messages[level]} for level in ("groups", "subgroups")
    )
    short: dict[str, set[str]] = {}
    for vendor in vendors:
        for code, names in vendor.items():
            short.setdefault(_code(code), set()).update([names] if isinstance(names, str) else names)
    things = {}
    for entry in entries:
        # Entries without a group are the regional indicators: single letters.
        if entry.get("group") is None or entry["group"] == _FLAGS_GROUP:
            continue
        for item in (entry, *entry.get("skins", ())):
            code, name = _code(item["hexcode"]), clean_name(item["label"])
            words = {clean_name(word.replace("_", " ")) for word in (*entry.get("tags", ()), *short.get(code, ()))}
            # Words of one letter or digit ("5" for a raised hand) and smileys in letters say nothing.
            words = {word for word in words if len(word) > 2 and word != name and not re.search(r"\btone\d", word)}
            things[code] = Thing(
                name=name,
                words=tuple(sorted(words)),
                subgroup=subgroups[entry["subgroup"]],
                group=groups[entry["group"]],
            )
    return things


def _raster(tarball: Path) -> Iterator[tuple[str, bytes]]:
    """(code points, encoded picture) of a package of pictures."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            path = Path(member.name)
            wanted = path.suffix in {".png", ".webp"} and path.parent.name in {"64", "assets"}
            if wanted and (handle := archive.extractfile(member)):
                yield _code(path.stem), handle.read()


def _rendered(tarball: Path, things: dict[str, Thing]) -> Iterator[tuple[str, bytes]]:
    """(code points, PNG) of an Iconify set of SVG icons, found by its table of characters or else by name."""
    import resvg_py

    with tarfile.open(tarball) as archive:
        icons, characters = _json(archive, "icons.json"), _json(archive, "chars.json")
    if characters:
        codes = {icon: _code(code) for code, icon in characters.items()}
    else:
        # Names without spaces, as one set writes them so; a label comes before another thing's tag.
        named = {word.replace(" ", ""): code for code, thing in things.items() for word in thing.words}
        named |= {thing.name.replace(" ", ""): code for code, thing in things.items()}
        codes = {icon: named.get(clean_name(icon).replace(" ", ""), "") for icon in icons["icons"]}
    for icon, body in icons["icons"].items():
        if codes.get(icon) in things:
            width, height = (body.get(side, icons.get(side, 16)) for side in ("width", "height"))
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body["body"]}</svg>'
            yield codes[icon], resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)


def _decode(data: bytes) -> np.ndarray:
    image = Image.open(BytesIO(data)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        # Resample premultiplied, or the color of transparent pixels bleeds into the edges.
        image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(image)


def _split(styles: list[str]) -> np.ndarray:
    """`(n,)` bool: the held-out artworks, of the raster styles as ever, of each other style the same share."""
    held_out = np.zeros(len(styles), dtype=bool)
    raster = np.flatnonzero(np.isin(styles, RASTER))
    held_out[np.random.default_rng(SPLIT_SEED).choice(raster, RASTER_HELD_OUT, replace=False)] = True
    for number, style in enumerate(STYLES):
        if style not in RASTER:
            indices = np.flatnonzero(np.array(styles) == style)
            count = round(HELD_OUT_SHARE * len(indices))
            held_out[np.random.default_rng([SPLIT_SEED, number]).choice(indices, count, replace=False)] = True
    return held_out


def load_artworks(cache: Path) -> Artworks:
    """Download if needed, decode and split. The decoded set is kept in `cache/artworks-2.npz`."""
    stored = cache / "artworks-2.npz"
    things = _things(download(cache, NAMES))
    if not stored.exists():
        pixels, styles, codes = [], [], []
        for style, package in PACKAGES.items():
            tarball = download(cache, package)
            pictures = _raster(tarball) if style in RASTER else _rendered(tarball, things)
            found = {code: picture for code, picture in pictures if code in things}
            for code in sorted(found):
                pixels.append(_decode(found[code]))
                styles.append(style)
                codes.append(code)
        partial = cache / "artworks.partial.npz"
        np.savez(partial, rgba=np.stack(pixels), styles=np.array(styles), codes=np.array(codes))
        partial.replace(stored)
    with np.load(stored) as arrays:
        rgba, styles, codes = arrays["rgba"], arrays["styles"].tolist(), arrays["codes"].tolist()
    return Artworks(
        rgba=rgba, styles=tuple(styles), things=tuple(things[code] for code in codes), held_out=_split(styles)
    )
