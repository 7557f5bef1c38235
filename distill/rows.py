"""What every kind of stored images comes down to: rows of encoded bytes and captions.

Apart from `image_files`, so that a run without images needs none of the libraries that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


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


def one_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    return " ".join(str(error).split()) or type(error).__name__
