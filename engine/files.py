"""Text and JSON as they are read; files that are either whole or absent: hashes, staged folders, atomic JSON."""

from __future__ import annotations

import codecs
import csv
import errno
import glob
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from .errors import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    """SHA-256 of plain JSON values, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def decode_text(content: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf_16 else "utf-8-sig")


def is_unicode(text: str) -> bool:
    """Whether no tokenizer will stumble over it: JSON may hold half a character (`"\\ud800"`)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path, what: str = "") -> str:
    """See `decode_text`; `what` stands before the path in messages.

    Raises:
        InputError: the file is missing, unreadable or no text.
    """
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise InputError(f"can't read {what}{path}: {error.strerror or one_line(error)}") from None
    if "\0" in text:
        raise InputError(f"can't read {what}{path}: it is not UTF-8 text")
    return text


def lines_of(text: str) -> list[str]:
    """Its lines, which end at \\n, \\r\\n or \\r alone: U+2028, form feeds and the like stay inside."""
    return re.split(r"\r\n|\r|\n", text)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, unreadable or no JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"can't read {path}: it is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with one a line, each with its line's number; empty lines are passed over.

    Raises:
        InputError: the file is unreadable, or a line is no JSON object.
    """
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not a JSON object")
        yield number, row


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file with a heading, each with the number of its last line; commas, semicolons or tabs divide.

    Raises:
        InputError: the file is unreadable or no such table, or a row has more fields than the heading.
    """
    text = read_text(path)
    heading = lines_of(text)[0]
    # Strict, or a quote that is never closed would take all rows to the end into its field.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=heading.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path} line {reader.line_num} has more fields than the heading: put quotes around a text that "
                    f"holds {reader.reader.dialect.delimiter!r}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"can't read {path} line {reader.line_num}: {one_line(error)}") from None


@contextmanager
def without_bom(folder: Path) -> Iterator[Path]:
    """The folder, or links to its files where JSON in it begins with a byte order mark, at which libraries fail."""
    files = [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]
    marked = {path for path in files if path.suffix == ".json" and path.open("rb").read(3).startswith(codecs.BOM_UTF8)}
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for path in files:
            target = Path(made) / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            if path in marked:
                target.write_text(read_text(path), encoding="utf-8")
            else:
                target.symlink_to(path.resolve())
        yield Path(made)


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the final name, then rename; what can't be written whole leaves nothing behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, see `write_whole`."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def give_modes(path: Path) -> None:
    """Give a file, or a folder and all in it, the modes of the umask: some libraries write for one user alone."""
    mask = os.umask(0)
    os.umask(mask)
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not each.is_symlink():
            each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that no more can be written.

    safetensors wraps the system's error, numpy's `tofile` keeps no number of it.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", one_line(error))):
        number = int(found[1])
    if number is None and isinstance(error, OSError):
        return bool(re.search(r"problem writing element|\d+ requested and \d+ written", one_line(error)))
    return number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_unusable_path(error: BaseException) -> bool:
    """Whether an error says that a path leads nowhere, whatever the program does: too long, a loop, below a file."""
    numbers = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EROFS}
    return isinstance(error, OSError) and error.filename is not None and error.errno in numbers


@contextmanager
def _as_input_error(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    # Before Python 3.13 a loop of symbolic links is a RuntimeError of `Path.resolve`.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"can't write to {path}: {reason}; choose another {option}") from None


def check_output(path: Path, *, replaces: str | Sequence[str] | None = None, option: str = "--output") -> None:
    """Make sure that a folder can be written under this name, before any long work; nothing stays behind.

    `replaces` are files that mark what the new folder may take the place of; without it, the folder is written into.
    `option` is the one that asked for it.

    Raises:
        InputError: its parent can't be created or written, the name is taken by a file, or the folder there must stay.
    """
    with _as_input_error(path, option):
        if path.exists() and not path.is_dir():
            raise InputError(f"the output {path} is a file: choose another {option}")
        if replaces is not None and path.is_dir():
            _check_replaceable(path, [replaces] if isinstance(replaces, str) else replaces)
        # Of the folders above, those that are missing will be made.
        above = next(folder for folder in path.resolve().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is a file")
        for folder in (above, path) if path.is_dir() else (above,):
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
            with tempfile.TemporaryFile(dir=folder):
                pass


def prepare_output(path: Path, *, replaces: str | Sequence[str] | None = None) -> None:
    """As `check_output`, and the folders above are made."""
    with _as_input_error(path, "--output"):
        parent = path.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        # Under the lock no other process is just replacing the folder.
        with locked(parent):
            check_output(path, replaces=replaces)


def _check_replaceable(path: Path, markers: Sequence[str]) -> None:
    if Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"the output {path} is the folder that you are in: choose one inside it as --output")
    if path.is_mount():
        raise InputError(f"the output {path} is a mount point: choose a folder inside it as --output")
    missing = [marker for marker in markers if not (path / marker).is_file()]
    if missing and any(path.iterdir()):
        raise InputError(
            f"the output {path} holds something else (there is no {missing[0]} in it): choose another --output"
        )


def publish(staged: Path, final: Path, *, check: Callable[[], None] = lambda: None) -> None:
    """Give a finished folder its final name; a folder that had the name goes away only then.

    `check` may still refuse it, by an exception, while no other process of this program can replace what is there.
    """
    give_modes(staged)
    final = final.resolve()
    parent = final.parent
    with locked(parent):
        check()
        replaced = Path(tempfile.mkdtemp(prefix=f".{final.name}.replaced-", dir=parent))
        if final.exists():
            final.replace(replaced)
        staged.replace(final)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool | None]:
    """Hold a folder's advisory lock against other processes of this program; yields whether it was had.

    The system lets go of it when the process ends, however it ends. Where there are no such locks (Windows, some
    network file systems), none is waited for, and None is yielded: nobody knows of another process.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            held = False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) else None
        else:
            held = True
        yield held
    finally:
        os.close(handle)


def _clear_abandoned(final: Path) -> None:
    """Remove what killed processes left beside `final`; what one of them had just moved away gets its name back.

    The caller holds the parent's lock.
    """
    parent, name = final.parent, glob.escape(final.name)
    for replaced in sorted(parent.glob(f".{name}.replaced-*")):
        if not final.exists() and any(replaced.iterdir()):
            replaced.replace(final)
        shutil.rmtree(replaced, ignore_errors=True)
    for staged in parent.glob(f".{name}.partial-*"):
        with locked(staged, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def staged_folder(
    final: Path, *, replaces: str | Sequence[str], before_publishing: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A new folder beside `final` that takes its name if the block ends well, and goes away if not.

    A folder that has the name already must hold the files `replaces`, and is removed if the block ends well. If it may
    not go by then, which `before_publishing` can say by an InputError, the new one stays beside it under another name.

    Raises:
        InputError: nothing can be written there, or another folder would have to go.
    """
    prepare_output(final, replaces=replaces)
    final = final.resolve()
    parent = final.parent

    def check() -> None:
        # The block may have taken hours.
        check_output(final, replaces=replaces)
        before_publishing()

    with ExitStack() as held:
        with locked(parent):
            _clear_abandoned(final)
            staged = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=parent))
            held.callback(shutil.rmtree, staged, ignore_errors=True)
            held.enter_context(locked(staged))
        yield staged
        try:
            publish(staged, final, check=check)
        except InputError as error:
            names = (parent / f"{final.name}-{number}" for number in count(2))
            kept = next(path for path in names if not path.exists())
            staged.replace(kept)
            raise InputError(f"{error}; the finished one is in {kept}") from None
