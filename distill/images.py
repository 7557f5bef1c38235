"""Batches of captioned images for training: streamed, decoded, shared out among processes, in a deterministic order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..engine.errors import InputError
from ..engine.files import decode_text, is_unicode, sha256_of
from ..engine.pictures import PictureError, read_picture

DECODING_THREADS = min(8, os.cpu_count() or 1)
LEFT_OUT = "left out: "


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample as it is stored, not decoded.

    Attributes:
        name: where it stands, for messages.
        image: encoded bytes, or the file that holds them.
        caption: text, or the file whose lines are together the caption.
        error: why there is no sample here (a shard cut short, say); image and caption are then None.
        notes: what of it is not used, to follow "2 of 10 samples".
    """

    name: str
    image: bytes | Path | None = None
    caption: str | Path | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()


Rows = Callable[[int, int, int], Iterator[Row]]
"""(seed, epoch, skip) -> the rows of that epoch from number `skip` on."""


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Captioned images that were found.

    Attributes:
        rows: the samples, by epoch.
        root: folder that the files' names begin from.
        files: images, captions and shards behind the rows; none of a hub dataset.
        notes: what was passed over when they were listed, in words.
    """

    rows: Rows
    root: Path = Path()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def content(self) -> list[tuple[str, int | str]]:
        """Names and sizes of the images and shards, names and hashes of the texts."""
        texts = {".txt", ".jsonl", ".csv"}
        values = (sha256_of(path) if path.suffix.lower() in texts else path.stat().st_size for path in self.files)
        return list(zip((path.relative_to(self.root).as_posix() for path in self.files), values, strict=True))


class _BadSampleError(Exception):
    """A sample can't be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class _Sample:
    caption: str
    pixels: torch.Tensor
    notes: Counter[str]


class ImageStream:
    """Batches of captioned images, endless, in an order drawn from the seed and the epoch alone.

    Every process walks the same rows. An update takes a window of the next `batch_size` rows, which may reach into
    the next epoch, and a process decodes only its slots of it. Where a slot's row is bad, the slot takes the next good
    row of the window, going round at its end, so that row is seen twice; a window without a good row is passed over.
    So batches don't depend on the number of processes, and nothing is exchanged between them.

    Attributes:
        notes: how many of the samples that this process met were left out or are used in part, by reason; all of them
            under "".
    """

    def __init__(
        self,
        data: ImageData,
        *,
        height: int,
        width: int,
        batch_size: int,
        seed: int,
        max_bad_samples: int = 0,
        note_on: Callable[[str], str] = lambda caption: "",
    ) -> None:
        """Start before the first row.

        Args:
            batch_size: rows per update, over all processes.
            max_bad_samples: how many bad samples an epoch may have.
            note_on: what of a caption is not used, in words; or "".
        """
        self.rows, self.height, self.width, self.batch_size, self.seed = data.rows, height, width, batch_size, seed
        self.max_bad_samples, self.note_on = max_bad_samples, note_on
        self.notes = Counter[str]()
        self._start(epoch=0, position=0)

    def _start(self, *, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._iterator = self.rows(self.seed, epoch, position)

    def next_batch(self, members: range) -> tuple[list[str], torch.Tensor]:
        """Advance by one update.

        Args:
            members: the slots of the batch wanted here, as `order.Share` divides them.

        Returns:
            b captions and their pixels, `(b, 3, height, width)` float32 in [-1, 1].

        Raises:
            InputError: more bad samples than allowed, a whole epoch without a good one, or unreadable data.
        """
        first_epoch = self.epoch
        while True:
            window = [self._next_row() for _ in range(self.batch_size)]
            samples = self._samples(window, members)
            if samples is not None:
                return [sample.caption for sample in samples], torch.stack([sample.pixels for sample in samples])
            # Two epochs further, one lies wholly between.
            if self.epoch - first_epoch >= 2:
                raise InputError(f"a whole epoch of --images has no usable sample: {'; '.join(in_words(self.notes))}")

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
        """What `restore` needs beside the notes: the epoch and the number of rows taken from it."""
        return {"epoch": torch.tensor(self.epoch), "position": torch.tensor(self.position)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state()`: rows already taken are read past, not decoded."""
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

    def _samples(self, window: list[Row], members: range) -> list[_Sample] | None:
        """What the members get; None if every row of the window is bad."""
        tried: dict[int, _Sample | _BadSampleError] = {}
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            tried.update(zip(members, pool.map(self._try, [window[slot] for slot in members]), strict=True))
        # In order: which bad sample stops the run doesn't depend on the threads.
        for slot in members:
            self._count(window[slot], tried[slot])
        chosen = []
        for slot in members:
            for other in ((slot + step) % len(window) for step in range(len(window))):
                # Another process's row is counted there.
                sample = tried[other] if other in tried else tried.setdefault(other, self._try(window[other]))
                if isinstance(sample, _Sample):
                    chosen.append(sample)
                    break
            else:
                return None
        return chosen

    def _try(self, row: Row) -> _Sample | _BadSampleError:
        try:
            caption = _caption(row)
            pixels, notes = _pixels(row, self.height, self.width)
        except _BadSampleError as error:
            return error
        return _Sample(caption=caption, pixels=pixels, notes=notes + Counter(row.notes))

    def _count(self, row: Row, sample: _Sample | _BadSampleError) -> None:
        self.notes[""] += 1
        if isinstance(sample, _Sample):
            cut = self.note_on(sample.caption)
            self.notes += sample.notes + Counter([cut] if cut else [])
            return
        self.notes[f"{LEFT_OUT}{sample.reason}"] += 1
        self.check(self.notes, f"{row.name}: {sample}")

    def check(self, notes: Counter[str], last: str = "in another process") -> None:
        """Refuse more bad samples than allowed.

        Raises:
            InputError: there are more among `notes`.
        """
        bad = sum(count for reason, count in notes.items() if reason.startswith(LEFT_OUT))
        if bad > self.max_bad_samples * (self.epoch + 1):
            raise InputError(
                f"bad image sample {last}; repair or remove it, or skip some with --max-bad-samples "
                f"(now {self.max_bad_samples})"
            )


def in_words(notes: Counter[str]) -> list[str]:
    """The notes of an `ImageStream`, a sentence each."""
    return [f"{count} of {notes['']} samples {reason}" for reason, count in sorted(notes.items()) if reason]


def _caption(row: Row) -> str:
    if row.error:
        reason, _, detail = row.error.partition(": ")
        raise _BadSampleError(reason, detail)
    text = row.caption
    if isinstance(text, Path):
        try:
            text = decode_text(text.read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise _BadSampleError("can't read the caption", f"{text}: {error}") from None
    if text is None:
        raise _BadSampleError("it has no caption")
    if not isinstance(text, str) or not text.strip():
        raise _BadSampleError("its caption is empty or no text")
    if "\0" in text:
        raise _BadSampleError("its caption is not UTF-8 text", ascii(text))
    if not is_unicode(text):
        raise _BadSampleError("its caption holds half a character", ascii(text))
    return " ".join(text.split())


def _pixels(row: Row, height: int, width: int) -> tuple[torch.Tensor, Counter[str]]:
    if row.image is None:
        raise _BadSampleError("it has no image")
    try:
        image, notes = read_picture(row.image)
    except PictureError as error:
        raise _BadSampleError("can't decode the image", str(error)) from None
    enlarged = image.width * image.height * max(height / image.height, width / image.width) ** 2
    if enlarged > 2 * (Image.MAX_IMAGE_PIXELS or enlarged):
        raise _BadSampleError("the image is too narrow", f"{image.width} by {image.height} pixels")
    return pixels_of(image, height, width), notes


def pixels_of(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Resize the shorter side, crop the center: `(3, height, width)` float32 in [-1, 1]."""
    factor = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
