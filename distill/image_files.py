"""Captioned images as they are stored: folders, WebDataset shards, Parquet, saved and hub datasets, as one sort of row.

What is read comes from outside and is treated so: nothing is unpickled, no code of a dataset is run, and no name in a
file leads out of its folder.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import datasets
import fsspec
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..engine.errors import InputError, one_line
from ..engine.files import csv_rows, decode_text, json_lines
from ..engine.pictures import PICTURE_TYPES, files_in
from ..engine.prompts import TEXT_FIELDS
from .images import ImageData, Row, Rows
from .order import epoch_order

# datasets waits 5 seconds for Arrow's threads wherever a Parquet stream ends, so after each epoch.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1

METADATA = {"metadata.jsonl": json_lines, "metadata.csv": csv_rows}
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
CAPTION_COLUMNS = ("text", "caption", "prompt", "TEXT", "txt")
SHUFFLE_BUFFER = 1000


def open_images(spec: str) -> ImageData:
    """Find captioned images, reading no more than names and column names.

    Args:
        spec: a folder of images with captions in `metadata.jsonl` or `metadata.csv` (file_name and text, the
            imagefolder convention of `datasets`) or in a `.txt` beside each image; a WebDataset `.tar` or a folder
            of them, as img2dataset writes them; a `.parquet` or a folder of them; a folder of
            `datasets.Dataset.save_to_disk`; or the id `org/name` of a dataset on the hub (its train split).

    Returns:
        Their rows by epoch: a full permutation of folders and saved datasets; shuffled shards and a shuffle buffer of
        `SHUFFLE_BUFFER` rows for the rest, as `datasets.IterableDataset.shuffle` does it: that order holds for one
        version of `datasets`.

    Raises:
        InputError: there is nothing there, or none of these formats.
    """
    path = Path(spec)
    # Those of `os.path` say no of a name that is too long, too.
    if os.path.isfile(path):
        if path.suffix.lower() not in SHARDS:
            raise InputError(f"{path} is no image data: pass a folder, a .tar, a .parquet or a hub dataset org/name")
        return ImageData(rows=SHARDS[path.suffix.lower()]([str(path)]), root=path.parent, files=(path,))
    if os.path.isdir(path):
        files = files_in(path)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return ImageData(rows=_saved_dataset(path), root=path, files=tuple(files))
        # An image folder may still hold the archive that it came from.
        if not any((path / name).is_file() for name in METADATA):
            # img2dataset puts a parquet of metadata beside each tar: tars come first.
            for suffix, opened in SHARDS.items():
                if shards := [file for file in files if file.suffix.lower() == suffix]:
                    rows = opened([str(shard) for shard in shards])
                    return ImageData(rows=rows, root=path, files=tuple(shards), notes=_passed_over(files, shards, path))
        return _folder(path, files)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec):
        return ImageData(rows=_hub(spec))
    raise InputError(f"there is no image folder or file {spec}")


def _passed_over(files: Sequence[Path], used: Sequence[Path], folder: Path) -> tuple[str, ...]:
    others = Counter(path.suffix.lower() or path.name for path in set(files) - set(used))
    counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    return (f"{others.total()} files in {folder} are not used: {counts}",) if others else ()


def _permuted(count: int, row: Callable[[int], Row]) -> Rows:
    def rows(seed: int, epoch: int, skip: int) -> Iterator[Row]:
        return (row(int(index)) for index in epoch_order(count, seed, epoch)[skip:])

    return rows


def _folder(folder: Path, files: list[Path]) -> ImageData:
    table = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    found: list[tuple[Path, Any]]
    if table:
        found = list(_described(table))
    else:
        captions = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
        images = [path for path in files if path.suffix[1:].lower() in PICTURE_TYPES]
        found = [(image, captions.get(image.with_suffix(""))) for image in images]
    used = [path for pair in found for path in pair if isinstance(path, Path)] + ([table] if table else [])
    notes = _passed_over(files, used, folder)
    if table and found and all(caption is None for _, caption in found):
        raise InputError(f"{table} holds no captions: name their field {' or '.join(TEXT_FIELDS)}")
    if all(caption is None for _, caption in found):
        reason = f" ({notes[0]})" if notes else ""
        raise InputError(f"{folder} holds no captioned images: add metadata.jsonl, or a .txt beside each image{reason}")
    found.sort(key=lambda pair: pair[0])
    rows = _permuted(len(found), lambda i: Row(name=f"{found[i][0]}", image=found[i][0], caption=found[i][1]))
    return ImageData(rows=rows, root=folder, files=tuple(sorted(set(used) & set(files))), notes=notes)


def _described(table: Path) -> Iterator[tuple[Path, Any]]:
    for number, row in METADATA[table.name](table):
        name = row.get("file_name")
        if not isinstance(name, str):
            raise InputError(f"{table} line {number} lacks file_name")
        # Links that stand in the folder are followed: a hub cache is made of them.
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
            raise InputError(f"{table} line {number} has a file_name that is not inside the folder: {name!r}")
        yield table.parent / name, next((row[field] for field in TEXT_FIELDS if field in row), None)


def _columns_of(names: list[str], where: str) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    if image is None or caption is None:
        raise InputError(
            f"{where} needs an image column ({', '.join(IMAGE_COLUMNS)}) and a caption column "
            f"({', '.join(CAPTION_COLUMNS)}); it has {', '.join(names)}"
        )
    return image, caption


def _selected(data: Any, where: str) -> tuple[Any, Callable[[dict[str, Any]], dict[str, Any]]]:
    """The two columns of a dataset that are used, and what makes the fields of a `Row` of their cells."""
    image, caption = _columns_of(list(data.column_names or next(iter(data))), where)

    def fields(cells: dict[str, Any]) -> dict[str, Any]:
        # A path in a cell is not followed: it could name any file of this machine.
        stored = cells[image] or {}
        name = stored.get("path") or repr(str(cells[caption])[:60])
        return {"name": f"{where}: {name}", "image": stored.get("bytes"), "caption": cells[caption]}

    return data.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False)), fields


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """An InputError for what datasets, pyarrow and fsspec raise on damaged files and broken connections: anything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"can't read {what}: {one_line(error)}") from None


def _saved_dataset(folder: Path) -> Rows:
    where = f"the dataset {folder}"
    with _reading(where):
        table = datasets.load_from_disk(str(folder))
        if isinstance(table, datasets.DatasetDict):
            if "train" not in table:
                raise InputError(f"{where} has no split train, only {', '.join(table)}")
            table = table["train"]
        if not len(table):
            raise InputError(f"{where} is empty")
        selected, fields = _selected(table, where)

    def row(index: int) -> Row:
        with _reading(f"row {index} of {where}"):
            return Row(**fields(selected[index]))

    return _permuted(len(selected), row)


def _shuffled(stream: datasets.IterableDataset, where: str) -> Rows:
    """Rows of a stream of dicts with the fields of `Row`."""

    def rows(seed: int, epoch: int, skip: int) -> Iterator[Row]:
        shuffled = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        shuffled.set_epoch(epoch)
        with _reading(where):
            for row in islice(shuffled, skip, None):
                yield Row(**row)

    return rows


def _hub(name: str) -> Rows:
    try:
        builder = datasets.load_dataset_builder(name)
    # The hub client's errors are many, and those of a missing network are of other libraries.
    except Exception as error:
        reason = one_line(error)
        raise InputError(f"there is no folder or file {name}, and no hub dataset could be read: {reason}") from None
    splits = builder.config.data_files or {}
    if not isinstance(builder, WebDataset | Parquet | Arrow):
        raise InputError(
            f"the hub dataset {name} has no tar, parquet or arrow files to stream: download it and pass its folder"
        )
    if "train" not in splits:
        raise InputError(f"the hub dataset {name} has no split train, only {', '.join(map(str, splits))}")
    if isinstance(builder, WebDataset):
        return _tars([str(url) for url in splits["train"]])
    return _table(lambda: builder.as_streaming_dataset(split="train"), f"the hub dataset {name}")


def _table(opened: Callable[[], datasets.IterableDataset], where: str) -> Rows:
    with _reading(where):
        stream, fields = _selected(opened(), where)
    return _shuffled(stream.map(fields, remove_columns=stream.column_names), where)


def _parquets(shards: list[str]) -> Rows:
    where = shards[0] if len(shards) == 1 else f"{shards[0]} … {shards[-1]}"
    return _table(lambda: datasets.IterableDataset.from_parquet(shards), where)


class _StrictTarInfo(tarfile.TarInfo):
    """Damaged or missing headers are errors: `tarfile` by itself takes them for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictTarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"damaged or cut short ({error})") from None


def _tars(shards: list[str]) -> Rows:
    stream = datasets.IterableDataset.from_generator(_tar_rows, gen_kwargs={"shards": shards})
    return _shuffled(stream, shards[0])


def _tar_rows(shards: list[str]) -> Iterator[dict[str, Any]]:
    """The samples of WebDataset tars: neighbouring members whose names agree up to the first dot.

    Read here, not by the `datasets` builder, which takes the types of all samples from the first five, decodes
    members that nobody asked for (among them `.pth`, by `torch.load`), and takes damage for the end of a shard.

    Raises:
        InputError: a file can't be read, or holds a name twice, or the parts of a sample apart.
    """
    for shard in shards:
        try:
            with _open(shard) as handle, tarfile.open(fileobj=handle, mode="r|", tarinfo=_StrictTarInfo) as archive:
                key, found, met = "", dict[str, bytes | None](), set[str]()
                for member in archive:
                    name = PurePath(member.name)
                    stem, _, extension = name.name.partition(".")
                    if member.isdir() or not stem:
                        continue
                    extension = extension.lower()
                    if (at := str(name.parent / stem)) != key:
                        if found:
                            yield _tar_row(shard, key, found)
                        key, found = at, {}
                        again = key in met
                        met.add(key)
                    if again or extension in found:
                        raise InputError(
                            f"{shard} holds {member.name} twice, or apart from the other parts of its sample: "
                            "pack it anew, sorted by name (tar --sort=name)"
                        )
                    last = extension.rpartition(".")[2]
                    wanted = member.isreg() and last in (*PICTURE_TYPES, "txt", "json")
                    content = archive.extractfile(member) if wanted else None
                    found[extension] = content.read() if content else None
                if found:
                    yield _tar_row(shard, key, found)
        # Left half-read at the interpreter's end, when the modules named below are gone.
        except GeneratorExit:
            raise
        except tarfile.TarError as error:
            yield {"name": shard, "error": f"the rest of the archive can't be read: {error}"}
        except OSError as error:
            raise InputError(f"can't read {shard}: {one_line(error)}") from None


def _open(shard: str) -> BinaryIO:
    return fsspec.open(shard).open() if "://" in shard else Path(shard).open("rb")


def _tar_row(shard: str, key: str, found: dict[str, bytes | None]) -> dict[str, Any]:
    """The fields of a sample's `Row`, of its members by what follows the first dot of their names.

    A member whose name has more dots serves where no other is of its type.
    """
    row: dict[str, Any] = {"name": f"{shard}/{key}"}

    def one_of(*types: str) -> str | None:
        plain = [name for name in types if name in found]
        members = plain[:1] or [name for name in found if name.rpartition(".")[2] in types]
        if len(members) > 1:
            row.setdefault("error", f"several members of one name up to the first dot: {', '.join(members)}")
        return members[0] if members else None

    picture, text, described = one_of(*PICTURE_TYPES), one_of("txt"), one_of("json")
    used = {name for name in (picture, text, described) if name}
    if "error" in row or any(found[name] is None for name in used):
        return {"error": "a link in the archive, or no file: pack it with tar --dereference --hard-dereference"} | row
    try:
        caption = decode_text(found[text] or b"") if text else None
        if not (caption and caption.strip()) and described:
            values = json.loads(decode_text(found[described] or b""))
            caption = values.get("caption", caption) if isinstance(values, dict) else caption
    except (ValueError, RecursionError) as error:
        return row | {"error": f"can't read the caption: {error}"}
    notes = [f"with members that are not used (.{name})" for name in sorted(set(found) - used)]
    return row | {"image": found[picture] if picture else None, "caption": caption, "notes": tuple(notes)}


SHARDS = {".tar": _tars, ".parquet": _parquets}
