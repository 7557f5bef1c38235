"""Files that are either whole or absent: hashes, staged folders, atomic JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, unreadable or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one a line.

    Raises:
        InputError: the file is unreadable, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not a JSON object")
        yield row


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside its final name, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that no more can be written; safetensors wraps the system's in one of its own."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def prepare_output(path: Path) -> None:
    """Make sure that a folder can be written under this name, before any long work.

    Raises:
        InputError: its parent can't be created or written, or the name is taken by a file.
    """
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"the output {path} is a file: choose another --output")
        parent = path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        for folder in (parent, path) if path.is_dir() else (parent,):
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "Permission denied", str(folder))
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"can't write to {path}: {reason}; choose another --output") from None


def publish(staged: Path, final: Path) -> None:
    """Give a finished folder its final name; a folder that had the name goes away only then."""
    replaced = final.with_name(f".{final.name}.replaced-{os.getpid()}")
    if final.exists():
        final.replace(replaced)
    staged.replace(final)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` that takes its name if the block ends well, and goes away if not.

    Raises:
        InputError: nothing can be written there.
    """
    prepare_output(final)
    staged = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.absolute().parent))
    staged.chmod(0o755)
    try:
        yield staged
        publish(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
