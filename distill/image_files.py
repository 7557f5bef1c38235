"""Captioned images as they are stored: folders, WebDataset shards, parquet, saved and hub datasets, one kind of row.

What is read comes from outside and is treated so: nothing is unpickled, no code of a dataset is run, and no path
leaves its folder.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..engine.errors import InputError, one_line
from ..engine.files import json_lines
from .images import Row, Rows
from .order import epoch_order

METADATA = "metadata.jsonl"
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
CAPTION_COLUMNS = ("text", "caption", "prompt", "TEXT", "txt")
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
SHUFFLE_BUFFER = 1000
ROWS_A_READ = 32


def open_images(spec: str) -> Rows:
    """Find captioned images, reading no more than names and column names.

    Args:
        spec: a folder of images with captions in `metadata.jsonl` (`{"file_name": …, "text": …}` a line, the
            imagefolder convention of `datasets`) or in a `.txt` beside each image; a WebDataset `.tar` or a folder
            of them, as img2dataset writes them; a `.parquet` or a folder of them; a folder of
            `datasets.Dataset.save_to_disk`; or the id `org/name` of a dataset on the hub (its train split).

    Returns:
        A function from (seed, epoch, rows to skip) to an epoch's rows: a full permutation of folders; shuffled
        shards and a shuffle buffer of `SHUFFLE_BUFFER` rows for the rest, as `datasets.IterableDataset.shuffle` does
        it: that order holds for one version of `datasets`.

    Raises:
        InputError: there is nothing there, or nothing of these kinds.
    """
    path = Path(spec)
    if path.is_file():
        kind = path.suffix.lower()
        if kind not in {".tar", ".parquet"}:
            raise InputError(f"{path} is no image data: pass a folder, a .tar, a .parquet or a hub dataset org/name")
        return _tars([str(path)]) if kind == ".tar" else _parquets([str(path)])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved_dataset(path)
        # An image folder may still hold the archive that it came from.
        if (path / METADATA).is_file():
            return _folder(path)
        # img2dataset puts a parquet of metadata beside each tar: tars come first.
        for kind, opened in (("tar", _tars), ("parquet", _parquets)):
            if shards := sorted(str(shard) for shard in path.rglob(f"*.{kind}") if shard.is_file()):
                return opened(shards)
        return _folder(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", spec):
        return _hub(spec)
    raise InputError(f"there is no image folder or file {spec}")


def _permuted(count: int, row: Callable[[int], Row]) -> Rows:
    def rows(seed: int, epoch: int, skip: int) -> Iterator[Row]:
        return (row(int(index)) for index in epoch_order(count, seed, epoch)[skip:])

    return rows


def _folder(folder: Path) -> Rows:
    metadata = folder / METADATA
    found: list[tuple[Path, str | Path | None]] = []
    if metadata.is_file():
        inside = folder.resolve()
        for number, row in enumerate(json_lines(metadata), start=1):
            name = row.get("file_name")
            if not isinstance(name, str):
                raise InputError(f"{metadata} line {number} lacks file_name")
            try:
                escapes = not (folder / name).resolve().is_relative_to(inside)
            except (OSError, ValueError, RuntimeError) as error:
                raise InputError(f"{metadata} line {number} has no usable file_name: {one_line(error)}") from None
            if escapes:
                raise InputError(f"{metadata} line {number} points outside the folder: {name}")
            found.append((folder / name, row.get("text")))
    else:
        files = {path for path in folder.rglob("*") if not path.name.startswith(".")}
        for path in files:
            if path.suffix[1:].lower() in IMAGE_TYPES:
                caption = path.with_suffix(".txt")
                found.append((path, caption if caption in files else None))
    if all(caption is None for _, caption in found):
        raise InputError(f"{folder} holds no captioned images: add metadata.jsonl, or a .txt beside each image")
    found.sort(key=lambda pair: pair[0])
    return _permuted(len(found), lambda i: Row(name=f"{found[i][0]}", image=found[i][0], caption=found[i][1]))


def _columns_of(names: list[str], where: str) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    if image is None or caption is None:
        raise InputError(
            f"{where} needs an image column ({', '.join(IMAGE_COLUMNS)}) and a caption column "
            f"({', '.join(CAPTION_COLUMNS)}); it has {', '.join(names)}"
        )
    return image, caption


def _stored(value: Any) -> bytes | None:
    """The encoded bytes of a cell. Paths in it are not followed: they could name any file of this machine."""
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else None


def _saved_dataset(folder: Path) -> Rows:
    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"can't read the dataset {folder}: {one_line(error)}") from None
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise InputError(f"the dataset {folder} has no split train, only {', '.join(table)}")
        table = table["train"]
    image, caption = _columns_of(table.column_names, f"the dataset {folder}")
    table = table.select_columns([image, caption])
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))

    def row(index: int) -> Row:
        cells = table[index]
        return Row(name=f"{folder} row {index}", image=_stored(cells[image]), caption=cells[caption])

    return _permuted(len(table), row)


def _shuffled(stream: datasets.IterableDataset) -> Rows:
    """Rows of a stream of dicts with the fields of `Row`."""

    def rows(seed: int, epoch: int, skip: int) -> Iterator[Row]:
        shuffled = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        shuffled.set_epoch(epoch)
        return (Row(**row) for row in islice(shuffled, skip, None))

    return rows


def _hub(name: str) -> Rows:
    try:
        builder = datasets.load_dataset_builder(name)
    # Beside these, `requests` and `aiohttp` have errors of their own for a missing network.
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
    if not isinstance(builder, Arrow):
        return (_tars if isinstance(builder, WebDataset) else _parquets)([str(url) for url in splits["train"]])
    stream = builder.as_streaming_dataset(split="train")
    image, caption = _columns_of(list(stream.column_names or next(iter(stream))), f"the hub dataset {name}")
    stream = stream.select_columns([image, caption]).cast_column(image, datasets.Image(decode=False))

    def fields(cells: dict[str, Any], index: int) -> dict[str, Any]:
        return {"name": f"{name} sample {index}", "image": _stored(cells[image]), "caption": cells[caption]}

    return _shuffled(stream.map(fields, with_indices=True, remove_columns=[image, caption]))


def _open(shard: str) -> BinaryIO:
    return fsspec.open(shard).open() if "://" in shard else Path(shard).open("rb")


def _parquets(shards: list[str]) -> Rows:
    try:
        with _open(shards[0]) as handle:
            _columns_of(pq.ParquetFile(handle).schema_arrow.names, shards[0])
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"can't read {shards[0]}: {one_line(error)}") from None
    return _shuffled(datasets.IterableDataset.from_generator(_parquet_rows, gen_kwargs={"shards": shards}))


def _parquet_rows(shards: list[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        try:
            with _open(shard) as handle:
                table = pq.ParquetFile(handle)
                image, caption = _columns_of(table.schema_arrow.names, shard)
                number = 0
                for batch in table.iter_batches(ROWS_A_READ, columns=[image, caption]):
                    for image_cell, caption_cell in zip(batch[image], batch[caption], strict=True):
                        yield _parquet_row(f"{shard} row {number}", image_cell, caption_cell)
                        number += 1
        # Left half-read at the interpreter's end, when the modules named below are gone.
        except GeneratorExit:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            # pyarrow tells of damaged pages by an OSError too, without a number. A failing disk or network is no
            # bad sample: skipping would part the processes.
            if isinstance(error, OSError) and (error.errno is not None or "://" in shard):
                raise InputError(f"can't read {shard}: {one_line(error)}") from None
            yield {"name": shard, "error": f"the rest of the file can't be read: {error}"}


def _parquet_row(name: str, image: pa.Scalar, caption: pa.Scalar) -> dict[str, Any]:
    try:
        return {"name": name, "image": _stored(image.as_py()), "caption": caption.as_py()}
    except UnicodeDecodeError as error:
        return {"name": name, "error": f"can't read the caption: {error}"}


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
    return _shuffled(datasets.IterableDataset.from_generator(_tar_rows, gen_kwargs={"shards": shards}))


def _tar_rows(shards: list[str]) -> Iterator[dict[str, Any]]:
    """The samples of WebDataset tars: neighbouring members whose names agree up to the first dot.

    Read here, not by the `datasets` builder, which takes the types of all samples from the first five, decodes
    members that nobody asked for (among them `.pth`, by `torch.load`), and takes damage for the end of a shard.
    """
    for shard in shards:
        try:
            with _open(shard) as handle, tarfile.open(fileobj=handle, mode="r|", tarinfo=_StrictTarInfo) as archive:
                key, found = "", dict[str, bytes]()
                for member in archive:
                    folder, _, file = member.name.rpartition("/")
                    stem, _, extension = file.partition(".")
                    extension = extension.lower()
                    if not member.isreg() or not stem or extension not in (*IMAGE_TYPES, "txt", "json"):
                        continue
                    if f"{folder}/{stem}" != key and found:
                        yield _tar_row(shard, key, found)
                        found = {}
                    key = f"{folder}/{stem}"
                    content = archive.extractfile(member)
                    found[extension] = content.read() if content else b""
                if found:
                    yield _tar_row(shard, key, found)
        except GeneratorExit:  # as above
            raise
        except tarfile.TarError as error:
            yield {"name": shard, "error": f"the rest of the archive can't be read: {error}"}
        except OSError as error:
            raise InputError(f"can't read {shard}: {one_line(error)}") from None


def _tar_row(shard: str, key: str, found: dict[str, bytes]) -> dict[str, Any]:
    name = f"{shard}/{key.removeprefix('/')}"
    try:
        caption = found["txt"].decode() if "txt" in found else None
        if not (caption and caption.strip()) and "json" in found:
            described = json.loads(found["json"])
            caption = described.get("caption", caption) if isinstance(described, dict) else caption
    except ValueError as error:
        return {"name": name, "error": f"can't read the caption: {error}"}
    image = next((found[kind] for kind in IMAGE_TYPES if kind in found), None)
    return {"name": name, "image": image, "caption": caption}
