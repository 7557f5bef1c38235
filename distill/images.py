"""Batches of captioned images for training: streamed, decoded, shared out among processes, in a deterministic order."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..engine.errors import InputError, one_line

# Pillow's other decoders are rarely wanted and more easily attacked; EPS would even start Ghostscript.
PIL_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# `formats` of `Image.open` takes only what is loaded.
Image.init()
DECODING_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample as it is stored, not decoded.

    Attributes:
        name: says where it stands, for messages.
        image: encoded bytes, or the file that holds them.
        caption: text, or the file whose first line that isn't blank is the caption.
        error: why there is no sample here (a shard cut short, say); image and caption are then None.
    """

    name: str
    image: bytes | Path | None = None
    caption: str | Path | None = None
    error: str | None = None


# (seed, epoch, skip) -> the rows of that epoch from number `skip` on.
Rows = Callable[[int, int, int], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample, or the rest of a shard, that was skipped, and why."""

    name: str
    reason: str


class _BadSampleError(Exception):
    """A sample can't be used; the text says why."""


class ImageStream:
    """Batches of captioned images, endless, in an order drawn from the seed and the epoch alone.

    Every process walks the same rows. An update takes a window of the next `batch_size` rows, which may reach into
    the next epoch, and a process decodes only its own slots of it. Where a slot's row is bad, the slot takes the
    next good row of the window, going round at its end, so that row is seen twice; a window without a good row is
    passed over. So batches don't depend on the number of processes, and nothing is exchanged between them.

    Attributes:
        bad: the bad samples that this process met, each once. It counts its own: the same shard can be on the lists
            of several processes.
    """

    def __init__(
        self, rows: Rows, *, height: int, width: int, batch_size: int, seed: int, max_bad_samples: int = 0
    ) -> None:
        """Start before the first row.

        Args:
            rows: from `open_images`.
            height: of the pixels.
            width: of the pixels.
            batch_size: rows per update, over all processes.
            seed: of the order.
            max_bad_samples: how many bad samples are skipped before the run stops.
        """
        self.rows, self.height, self.width, self.batch_size, self.seed = rows, height, width, batch_size, seed
        self.max_bad_samples = max_bad_samples
        self.bad: list[BadSample] = []
        self._start(epoch=0, position=0)

    def _start(self, *, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._iterator = self.rows(self.seed, epoch, position)

    def next_batch(self, members: range) -> tuple[list[str], torch.Tensor]:
        """Advance by one update.

        Args:
            members: the slots of the batch wanted here, as `order.Share` divides them; at least one.

        Returns:
            b captions and their pixels, `(b, 3, height, width)` float32 in [-1, 1].

        Raises:
            InputError: more bad samples than allowed, a whole epoch without a good one, or unreadable data.
            ValueError: `members` is empty.
        """
        if not members:
            raise ValueError("a process without members can't follow the others: use fewer processes")
        first_epoch = self.epoch
        while True:
            window = [self._next_row() for _ in range(self.batch_size)]
            decoded = self._fill(window, members)
            if decoded is not None:
                return [caption for caption, _ in decoded], torch.stack([pixels for _, pixels in decoded])
            # Two epochs further, one lies wholly between.
            if self.epoch - first_epoch >= 2:
                raise InputError("a whole epoch of --images has no usable sample: the last was " + self._last_bad())

    def captions(self, count: int) -> list[str]:
        """Up to `count` captions from the first epoch, without decoding images or moving the stream."""
        found: list[str] = []
        for row in self.rows(self.seed, 0, 0):
            if len(found) == count:
                break
            try:
                found.append(_caption(row))
            except _BadSampleError:
                continue
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs: the epoch, the rows taken from it, and the bad samples as JSON in UTF-8."""
        bad = json.dumps([asdict(sample) for sample in self.bad]).encode()
        return {
            "epoch": torch.tensor(self.epoch),
            "position": torch.tensor(self.position),
            "bad": torch.frombuffer(bytearray(bad), dtype=torch.uint8),
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state()`: rows already taken are read past, not decoded."""
        self.bad = [BadSample(**sample) for sample in json.loads(bytes(state["bad"].tolist()))]
        self._start(epoch=int(state["epoch"]), position=int(state["position"]))

    def _next_row(self) -> Row:
        row = next(self._iterator, None)
        if row is None:
            if not self.position:
                raise InputError("--images holds no captioned image")
            self._start(epoch=self.epoch + 1, position=0)
            row = next(self._iterator, None)
            if row is None:
                raise InputError("--images holds no captioned image any more")
        self.position += 1
        return row

    def _fill(self, window: list[Row], members: range) -> list[tuple[str, torch.Tensor]] | None:
        """Captions and pixels of the members; None if every row of the window is bad."""
        outcome: dict[int, tuple[str, torch.Tensor] | None] = {}
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            # Outcomes are judged in order: which bad sample stops the run doesn't depend on the threads.
            for slot, result in zip(members, pool.map(self._try, [window[slot] for slot in members]), strict=True):
                outcome[slot] = self._judged(window[slot], result)
        chosen = []
        for slot in members:
            for other in ((slot + step) % len(window) for step in range(len(window))):
                if other not in outcome:
                    outcome[other] = self._judged(window[other], self._try(window[other]))
                sample = outcome[other]
                if sample is not None:
                    chosen.append(sample)
                    break
            else:
                return None
        return chosen

    def _try(self, row: Row) -> tuple[str, torch.Tensor] | BadSample:
        try:
            return _caption(row), _pixels(row, self.height, self.width)
        except _BadSampleError as error:
            return BadSample(name=row.name, reason=one_line(error))

    def _judged(self, row: Row, result: tuple[str, torch.Tensor] | BadSample) -> tuple[str, torch.Tensor] | None:
        if not isinstance(result, BadSample):
            return result
        self.know_as_bad([*self.bad, result])
        return None

    def know_as_bad(self, samples: Iterable[BadSample]) -> None:
        """Take these as the bad samples, each once.

        Raises:
            InputError: they are more than allowed.
        """
        self.bad = list({sample.name: sample for sample in samples}.values())
        if len(self.bad) > self.max_bad_samples:
            raise InputError(
                f"bad image sample {self._last_bad()}; repair or remove it, "
                f"or skip some with --max-bad-samples (now {self.max_bad_samples})"
            )

    def _last_bad(self) -> str:
        return f"{self.bad[-1].name}: {self.bad[-1].reason}"


def _caption(row: Row) -> str:
    if row.error:
        raise _BadSampleError(row.error)
    text = row.caption
    if isinstance(text, Path):
        try:
            lines = text.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _BadSampleError(f"can't read the caption {text}: {error}") from None
        text = next((line for line in lines if line.strip()), "")
    if text is None:
        raise _BadSampleError("it has no caption")
    if not isinstance(text, str) or not text.strip():
        raise _BadSampleError("its caption is empty or no text")
    return " ".join(text.split())


def _pixels(row: Row, height: int, width: int) -> torch.Tensor:
    if row.image is None:
        raise _BadSampleError("it has no image")
    try:
        data = row.image.read_bytes() if isinstance(row.image, Path) else row.image
        with Image.open(io.BytesIO(data), formats=PIL_FORMATS) as opened:
            image = rgb_of(opened)
    except UnidentifiedImageError:
        raise _BadSampleError(f"can't decode the image: it is none of {', '.join(PIL_FORMATS)}") from None
    # On damaged files Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise _BadSampleError(f"can't decode the image: {one_line(error)}") from None
    enlarged = image.width * image.height * max(height / image.height, width / image.width) ** 2
    if enlarged > 2 * (Image.MAX_IMAGE_PIXELS or enlarged):
        raise _BadSampleError(f"the image is too narrow: {image.width} by {image.height} pixels")
    return pixels_of(image, height, width)


def rgb_of(image: Image.Image) -> Image.Image:
    """An RGB picture as a viewer shows it on a white page.

    The EXIF orientation is applied; transparency is composed over white, for what lies beneath it is arbitrary;
    16-bit gray is scaled to 8 bits, which Pillow's own conversion clips.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixels_of(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Resize the shorter side, crop the center: `(3, height, width)` float32 in [-1, 1]."""
    factor = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
