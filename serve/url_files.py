"""Images that are answered as a URL: files under names that can't be guessed, for a while."""

from __future__ import annotations

import re
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ..engine.files import write_whole

NAME = re.compile(r"[\w-]{32}\.png")
SWEEP_SHARE = 0.01
"""Old files are looked for once in this share of their lifetime, as that reads the whole folder."""


class UrlFiles:
    """A folder of images that go away after a lifetime."""

    def __init__(self, folder: Path | None, *, seconds: float) -> None:
        """Keep images for so many seconds in a folder, or in a temporary one that goes with `close`."""
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="boostdiff-images-")
            folder = Path(self._temporary.name)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._seconds, self._next_sweep = folder, seconds, 0.0

    def close(self) -> None:
        """Delete the images in a temporary folder."""
        if self._temporary:
            self._temporary.cleanup()

    def write(self, content: bytes) -> str | None:
        """The name of a new file; None where the disk takes no more. What is too old goes. Threads may share it.

        Not for an event loop, as thousands of files may be looked at.
        """
        name = f"{secrets.token_urlsafe(24)}.png"
        try:
            self._sweep()
            write_whole(self._folder / name, content)
        except OSError:
            return None
        return name

    def _sweep(self) -> None:
        now = time.monotonic()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_SHARE * self._seconds
        for path in self._folder.glob("*.png"):
            # Another thread, or another replica's, may have deleted it.
            with suppress(FileNotFoundError):
                if NAME.fullmatch(path.name) and self._is_old(path):
                    path.unlink()

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none, or it is too old."""
        path = self._folder / name
        try:
            return path.read_bytes() if NAME.fullmatch(name) and not self._is_old(path) else None
        except OSError:
            return None

    def _is_old(self, path: Path) -> bool:
        return time.time() - path.stat().st_mtime > self._seconds
