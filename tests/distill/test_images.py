import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from boostdiff.distill import image_files
from boostdiff.distill.image_files import open_images
from boostdiff.distill.images import ImageStream, in_words
from boostdiff.distill.order import Share
from boostdiff.engine.errors import InputError
from boostdiff.engine.pictures import rgb_of
from PIL import Image
from tiny import save_images

COUNT = 10


def encoded(i: int, kind: str = "PNG") -> bytes:
    """A plain grey image of 30 by 20 pixels, its level 20·i."""
    out = io.BytesIO()
    Image.new("RGB", (30, 20), (20 * i,) * 3).save(out, kind)
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(i: int) -> dict[str, bytes]:
    """The members that img2dataset writes for a sample."""
    metadata = {"caption": f"picture {i}", "url": "http://example.invalid", "error_message": None, "width": 30}
    return {
        f"{i:09}.jpg": encoded(i, "JPEG"),
        f"{i:09}.json": json.dumps(metadata).encode(),
        f"{i:09}.txt": f"picture {i}".encode(),
    }


def tar_folder(folder: Path, name: str = "00000") -> str:
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 3)):
        members = {name: content for i in numbers for name, content in sample(int(i)).items()}
        write_tar(folder / f"{shard:05}.tar", members)
    # img2dataset's own companions, which hold no images.
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return str(folder)


def one_tar(folder: Path) -> str:
    members = {name: content for i in range(COUNT) for name, content in sample(i).items() if not name.endswith("txt")}
    return str(write_tar(folder / "all.tar", members))


def text_folder(folder: Path) -> str:
    (folder / "images").mkdir(parents=True)
    save_images(folder / "images" / "deep", count=COUNT // 2)
    for i in range(COUNT // 2, COUNT):
        (folder / f"{i}.PNG").write_bytes(encoded(i))
        (folder / f"{i}.txt").write_text(f"\npicture\n {i}\n")
    return str(folder)


def metadata_folder(folder: Path) -> str:
    (folder / "images").mkdir(parents=True)
    for i in range(COUNT):
        (folder / "images" / f"{i}.png").write_bytes(encoded(i))
    rows = [{"file_name": f"images/{i}.png", "text": f"picture {i}"} for i in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def parquet_folder(folder: Path) -> str:
    folder.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), 3)):
        columns = {
            "image": [{"bytes": encoded(int(i)), "path": f"{i}.png"} for i in numbers],
            "text": [f"picture {i}" for i in numbers],
            "other": [0 for _ in numbers],
        }
        pq.write_table(pa.table(columns), folder / f"{shard}.parquet")
    return str(folder)


def one_parquet(folder: Path) -> str:
    folder.mkdir()
    columns = {"jpg": [encoded(i, "JPEG") for i in range(COUNT)], "TEXT": [f"picture {i}" for i in range(COUNT)]}
    pq.write_table(pa.table(columns), folder / "all.parquet")
    return str(folder / "all.parquet")


def saved_dataset(folder: Path) -> str:
    columns = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(COUNT)],
        "caption": [f"picture {i}" for i in range(COUNT)],
    }
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(folder))
    return str(folder)


FORMATS = [tar_folder, one_tar, text_folder, metadata_folder, parquet_folder, one_parquet, saved_dataset]


def stream_of(spec: str, **changes: Any) -> ImageStream:
    options: dict[str, Any] = {"height": 8, "width": 8, "batch_size": 4, "seed": 0} | changes
    return ImageStream(open_images(spec), **options)


def take(stream: ImageStream, updates: int, members: range | None = None) -> tuple[list[str], torch.Tensor]:
    batches = [stream.next_batch(members or range(stream.batch_size)) for _ in range(updates)]
    return [c for captions, _ in batches for c in captions], torch.cat([pixels for _, pixels in batches])


@pytest.mark.parametrize("write", FORMATS)
def test_every_format(tmp_path: Path, write: Callable[[Path], str]) -> None:
    spec = write(tmp_path / "data")
    captions, pixels = take(stream_of(spec, batch_size=5), 4)
    names = [f"picture {i}" for i in range(COUNT)]
    # Two epochs, each whole, in different orders.
    assert sorted(captions[:COUNT]) == sorted(captions[COUNT:]) == names
    assert captions[:COUNT] != captions[COUNT:]
    assert captions[:COUNT] != names
    assert pixels.shape == (2 * COUNT, 3, 8, 8)
    assert pixels.dtype == torch.float32
    for caption, picture in zip(captions[:COUNT], pixels, strict=False):
        step = 40 if write is text_folder and int(caption[-1]) < 5 else 20
        assert picture.mean().item() == pytest.approx(step * int(caption[-1]) / 127.5 - 1, abs=0.02)

    again, same = take(stream_of(spec, batch_size=5), 4)
    assert again == captions
    assert torch.equal(same, pixels)
    assert take(stream_of(spec, batch_size=5, seed=1), 2)[0] != captions[:COUNT]
    assert sorted(stream_of(spec).captions(100)) == names
    assert len(stream_of(spec).captions(3)) == 3


def spoilt(spec: str) -> str:
    """Three of the ten samples of `tar_folder` become bad."""
    folder = Path(spec)
    members = sample(0) | sample(1) | {"000000001.jpg": b"no image"} | sample(2) | sample(3)
    del members["000000002.txt"], members["000000002.json"]
    write_tar(folder / "00000.tar", members)
    write_tar(folder / "00002.tar", sample(7) | sample(8) | {"000000008.jpg": encoded(8)[:60]} | sample(9))
    return spec


@pytest.mark.parametrize("write", [tar_folder, metadata_folder, one_parquet])
@pytest.mark.parametrize("before", [1, 3, 5])
def test_a_resumed_stream_goes_on_identically(tmp_path: Path, write: Callable[[Path], str], before: int) -> None:
    spec = write(tmp_path / "data")
    if write is tar_folder:
        spoilt(spec)
    stream = stream_of(spec, max_bad_samples=3)
    take(stream, before)
    state = {name: tensor.clone() for name, tensor in stream.state().items()}
    other = stream_of(spec, max_bad_samples=3)
    other.restore(state)
    other.notes = stream.notes.copy()
    captions, pixels = take(stream, 6)
    again, same = take(other, 6)
    assert again == captions
    assert torch.equal(same, pixels)
    assert other.notes == stream.notes


@pytest.mark.slow
def test_an_unfinished_stream_ends_quietly(tmp_path: Path) -> None:
    """Shards left open at the interpreter's end say nothing; and another process sees the same order."""
    specs = [tar_folder(tmp_path / "tar"), parquet_folder(tmp_path / "parquet")]
    code = (
        "from boostdiff.distill.image_files import open_images; from boostdiff.distill.images import ImageStream\n"
        "options = {'height': 8, 'width': 8, 'batch_size': 4, 'seed': 0}\n"
        f"streams = [ImageStream(open_images(spec), **options) for spec in {specs!r}]\n"
        "print('|'.join(caption for stream in streams for caption in stream.next_batch(range(4))[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr
    assert done.stdout.strip().split("|") == [caption for spec in specs for caption in take(stream_of(spec), 1)[0]]


@pytest.mark.parametrize("processes", [2, 3])
def test_batches_do_not_depend_on_the_number_of_processes(tmp_path: Path, processes: int) -> None:
    spec = spoilt(tar_folder(tmp_path / "data"))
    alone = stream_of(spec, max_bad_samples=3)
    together = [stream_of(spec, max_bad_samples=3) for _ in range(processes)]
    for _ in range(8):
        captions, pixels = alone.next_batch(range(4))
        parts = [
            stream.next_batch(Share(batch_size=4, rank=i, world_size=processes).members)
            for i, stream in enumerate(together)
        ]
        assert [caption for part, _ in parts for caption in part] == captions
        assert torch.equal(torch.cat([part for _, part in parts]), pixels)
        assert len({(stream.epoch, stream.position) for stream in together} | {(alone.epoch, alone.position)}) == 1
    assert sum((stream.notes for stream in together), Counter()) == alone.notes


def test_processes_tell_each_other_of_bad_samples(tmp_path: Path) -> None:
    spec = spoilt(tar_folder(tmp_path / "data"))
    streams = [stream_of(spec, max_bad_samples=3) for _ in range(2)]
    for _ in range(8):
        for index, stream in enumerate(streams):
            stream.next_batch(Share(batch_size=4, rank=index, world_size=2).members)
    together = streams[0].notes + streams[1].notes
    assert together[""] == 32
    for stream in streams:
        stream.check(together)
    # Eight windows of four reach into the fourth epoch of ten.
    streams[0].max_bad_samples = 2
    with pytest.raises(InputError, match="max-bad-samples"):
        streams[0].check(together)


def test_metadata_come_before_a_stray_archive(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    save_images(folder, count=2)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"described {i}"}) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(folder / "0.png", "0.png")
    rows = list(open_images(str(folder)).rows(0, 0, 0))
    assert {row.caption for row in rows} == {"described 0", "described 1"}


def test_bad_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    stream = stream_of(spoilt(tar_folder(tmp_path / "data")), max_bad_samples=3)
    captions, _ = take(stream, 10)
    assert set(captions) == {f"picture {i}" for i in set(range(COUNT)) - {1, 2, 8}}
    assert in_words(stream.notes) == [
        "8 of 40 samples left out: can't decode the image",
        "4 of 40 samples left out: it has no caption",
    ]


def test_the_first_bad_sample_stops_by_default(tmp_path: Path) -> None:
    save_images(tmp_path, count=3)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1\.png: can't decode the image: .*--max-bad-samples \(now 0\)") as caught:
        take(stream_of(str(tmp_path)), 1)
    assert "\n" not in str(caught.value)


def test_the_limit_holds_after_a_resume(tmp_path: Path) -> None:
    metadata_folder(tmp_path / "data")
    tmp_path /= "data"
    for i in (1, 6):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no image")
    stream = stream_of(str(tmp_path), max_bad_samples=1, batch_size=1)
    while len(stream.notes) < 2:
        stream.next_batch(range(1))
    other = stream_of(str(tmp_path), max_bad_samples=1, batch_size=1)
    other.restore(stream.state())
    other.notes = stream.notes
    with pytest.raises(InputError, match="bad image sample"):
        take(other, COUNT)


@pytest.mark.parametrize("caption", [b"", b" \n", b"\xff\xfe", None])
def test_captions_that_cannot_be_used(tmp_path: Path, caption: bytes | None) -> None:
    save_images(tmp_path, count=3)
    (tmp_path / "1.txt").unlink()
    if caption is not None:
        (tmp_path / "1.txt").write_bytes(caption)
    stream = stream_of(str(tmp_path), max_bad_samples=1)
    assert set(take(stream, 2)[0]) == {"picture 0", "picture 2"}
    (note,) = in_words(stream.notes)
    assert "left out: " in note
    assert "caption" in note


def test_an_epoch_without_a_good_sample_ends(tmp_path: Path) -> None:
    save_images(tmp_path, count=5)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    for batch_size in (1, 4, 30):
        with pytest.raises(InputError, match="no usable sample"):
            take(stream_of(str(tmp_path), max_bad_samples=99, batch_size=batch_size), 1)


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_one_good_sample_is_enough(tmp_path: Path, batch_size: int) -> None:
    spec = metadata_folder(tmp_path / "data")
    for i in set(range(COUNT)) - {8}:
        (tmp_path / "data" / "images" / f"{i}.png").write_bytes(b"no image")
    captions, _ = take(stream_of(spec, max_bad_samples=COUNT, batch_size=batch_size), 3)
    assert set(captions) == {"picture 8"}


def cuts() -> list[int]:
    """Lengths of a damaged tar: inside a member, inside a header, between members, before the end marker."""
    member = 512 + -(-len(sample(0)["000000000.jpg"]) // 512) * 512
    return [600, member + 100, member, member + 1024, 2 * (member + 2048)]


@pytest.mark.parametrize("length", cuts())
def test_a_truncated_tar_is_named(tmp_path: Path, length: int) -> None:
    path = write_tar(tmp_path / "a.tar", sample(0) | sample(1))
    assert length < path.stat().st_size
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"a\.tar: the rest of the archive can't be read") as caught:
        take(stream_of(str(path)), 1)
    assert "\n" not in str(caught.value)
    write_tar(tmp_path / "b.tar", sample(2) | sample(3))
    stream = stream_of(str(tmp_path), max_bad_samples=2)
    assert {"picture 2", "picture 3"} <= set(take(stream, 4)[0])
    assert any("left out: the rest of the archive can't be read" in note for note in in_words(stream.notes))


@pytest.mark.parametrize("content", [b"", b"no tar" * 999])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar"):
        take(stream_of(str(tmp_path)), 1)


def test_a_damaged_header_inside_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample(0) | sample(1))
    content = bytearray(path.read_bytes())
    start = content.index(b"000000001.jpg")
    content[start : start + 5] = b"xxxxx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged or cut short"):
        take(stream_of(str(path)), 1)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    evil = pickle.dumps(Malicious(mark))
    kinds = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "cls")
    members = sample(0) | {f"000000000.{kind}": evil for kind in kinds} | sample(1)
    path = write_tar(tmp_path / "a.tar", members)
    assert set(take(stream_of(str(path)), 2)[0]) == {"picture 0", "picture 1"}
    write_tar(path, sample(0) | {"000000000.jpg": evil, "000000000.txt": b"x"})
    with pytest.raises(InputError, match="can't decode"):
        take(stream_of(str(path)), 1)
    assert not mark.exists()


def test_damaged_parquet(tmp_path: Path) -> None:
    spec = Path(one_parquet(tmp_path / "data"))
    content = bytearray(spec.read_bytes())
    spec.write_bytes(content[:-20])
    with pytest.raises(InputError, match=r"can't read .*all\.parquet"):
        open_images(str(spec))
    content[4:400] = bytes(396)
    spec.write_bytes(content)
    with pytest.raises(InputError, match=r"can't read .*all\.parquet|can't decode"):
        take(stream_of(str(spec)), 1)


def test_half_a_character_is_no_caption(tmp_path: Path) -> None:
    save_images(tmp_path, count=2)
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(("a \ud800 cat", "a dog"))]
    (tmp_path / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(InputError, match="its caption holds half a character"):
        take(stream_of(str(tmp_path), batch_size=2), 1)
    assert stream_of(str(tmp_path)).captions(2) == ["a dog"]


def test_a_caption_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    pq.write_table(pa.table({"image": [encoded(i) for i in range(3)], "text": texts}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"can't read .*a\.parquet: 'utf-8' codec"):
        take(stream_of(str(tmp_path), max_bad_samples=1), 2)


def test_columns_that_are_missing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"needs an image column .* it has image, label"):
        open_images(str(tmp_path))


def test_paths_in_a_table_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(3))
    images = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"image": images, "text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has no image"):
        take(stream_of(str(tmp_path)), 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "lacks file_name"),
        ({"file_name": "a\0", "text": "x"}, "not inside the folder"),
        ({"file_name": "../0.png", "text": "x"}, "not inside the folder"),
        ({"file_name": "/etc/hostname", "text": "x"}, "not inside the folder"),
        ({"file_name": "link/../../0.png", "text": "x"}, "not inside the folder"),
    ],
)
def test_bad_metadata(tmp_path: Path, row: dict[str, str], message: str) -> None:
    save_images(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        open_images(str(tmp_path / "data"))


def test_a_missing_image_in_the_metadata(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "9.png", "text": "x"}))
    with pytest.raises(InputError, match=r"9\.png: can't decode the image: .*No such file"):
        take(stream_of(str(tmp_path)), 1)


def test_places_without_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no captioned images"):
        open_images(str(tmp_path))
    with pytest.raises(InputError, match="no image folder or file"):
        open_images(str(tmp_path / "missing"))
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match="no image data"):
        open_images(str(tmp_path / "a.zip"))
    write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(InputError, match="no captioned image"):
        take(stream_of(str(tmp_path / "empty.tar")), 1)

    def fail(name: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")

    monkeypatch.setattr(image_files.datasets, "load_dataset_builder", fail)
    with pytest.raises(InputError, match=r"no folder or file data/images, and no hub dataset .* doesn't exist"):
        open_images("data/images")


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "arrow"])
def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The hub itself is out of reach: local files stand behind the builder that it would give."""
    folder = tmp_path / "data"
    if kind == "webdataset":
        files = one_tar(folder)
    elif kind == "parquet":
        files = one_parquet(folder)
    else:
        files = str(next(Path(saved_dataset(folder)).glob("*.arrow")))
    builder = datasets.load_dataset_builder(kind, data_files={"train": [files]}, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(image_files.datasets, "load_dataset_builder", lambda name: builder)
    captions, _ = take(stream_of("org/name", batch_size=5), 4)
    assert sorted(captions[:COUNT]) == sorted(captions[COUNT:]) == [f"picture {i}" for i in range(COUNT)]


def test_hub_datasets_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("image,text\n1,2\n")
    builder = datasets.load_dataset_builder("csv", data_files=str(tmp_path / "a.csv"), cache_dir=str(tmp_path))
    monkeypatch.setattr(image_files.datasets, "load_dataset_builder", lambda name: builder)
    with pytest.raises(InputError, match="download it and pass its folder"):
        open_images("org/name")


def test_huge_and_narrow_images_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path, count=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(InputError, match="decompression bomb"):
        take(stream_of(str(tmp_path)), 1)
    Image.new("RGB", (1, 390)).save(tmp_path / "0.png")
    with pytest.raises(InputError, match="too narrow: 1 by 390"):
        take(stream_of(str(tmp_path)), 1)


def test_only_common_formats_are_decoded(tmp_path: Path) -> None:
    save_images(tmp_path, count=1)
    Image.new("RGB", (30, 20)).save(tmp_path / "0.png", "EPS")
    with pytest.raises(InputError, match="can't decode"):
        take(stream_of(str(tmp_path)), 1)


def test_orientation_transparency_and_depth() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (30, 20)).save(out, "JPEG", exif=exif)
    assert rgb_of(Image.open(out)).size == (20, 30)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert rgb_of(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = clear.quantize()
    assert rgb_of(palette).getpixel((0, 0)) == (255, 255, 255)
    assert rgb_of(Image.new("RGBA", (2, 2), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)
    assert rgb_of(Image.fromarray(np.full((2, 2), 32896, dtype=np.uint16))).getpixel((0, 0)) == (128, 128, 128)
    assert rgb_of(Image.new("CMYK", (2, 2))).mode == "RGB"


def test_names_with_several_dots_in_a_tar(tmp_path: Path) -> None:
    """As WebDataset: a sample's name ends at the first dot."""
    members = {
        "0.v2.jpg": encoded(0),
        "0.v2.txt": b"zero",
        "1.jpg": encoded(1),
        "1.seg.png": encoded(5),
        "1.txt": b"one",
    }
    path = write_tar(tmp_path / "a.tar", members)
    stream = stream_of(str(path), batch_size=2)
    captions, pixels = take(stream, 1)
    assert sorted(captions) == ["one", "zero"]
    assert pixels[captions.index("one")].mean().item() == pytest.approx(20 / 127.5 - 1, abs=0.02)
    assert in_words(stream.notes) == ["1 of 2 samples with members that are not used (.seg.png)"]
    write_tar(path, {"a.1.jpg": encoded(0), "a.1.txt": b"zero", "a.2.jpg": encoded(1), "a.2.txt": b"one"})
    with pytest.raises(InputError, match=r"several members of one name up to the first dot: 1\.jpg, 2\.jpg"):
        take(stream_of(str(path)), 1)


def test_names_that_come_twice_and_parts_that_stand_apart(tmp_path: Path) -> None:
    for names in (
        ("0.jpg", "0.JPG", "0.txt"),
        ("0.jpg", "1.jpg", "0.txt", "1.txt"),
        ("0.jpg", "0.txt", "1.txt", "./0.jpg"),
    ):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
        with pytest.raises(InputError, match=r"twice, or apart from the other parts of its sample: .* --sort=name"):
            take(stream_of(str(tmp_path / "a.tar")), 1)


def test_links_and_folders_in_a_tar(tmp_path: Path) -> None:
    save_images(tmp_path / "f", count=2)
    (tmp_path / "f" / "2.png").symlink_to("0.png")
    (tmp_path / "f" / "2.txt").write_text("linked")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "f", "f")
    with pytest.raises(InputError, match=r"a link in the archive.*--dereference"):
        take(stream_of(str(tmp_path / "a.tar")), 1)
    stream = stream_of(str(tmp_path / "a.tar"), max_bad_samples=1, batch_size=3)
    assert set(take(stream, 1)[0]) == {"picture 0", "picture 1"}
    assert "1 of 3 samples left out: a link in the archive" in in_words(stream.notes)[0]


def test_a_folder_of_other_types_and_links(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "0"
    (folder / "deep").mkdir(parents=True)
    for number, ending in enumerate(("bmp", "GIF", "tif", "avif", "JFIF", "webp")):
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(folder / f"{number}.x.{ending}")
        (folder / f"{number}.x.TXT").write_bytes(f"\ufeffpicture {number}\r\n".encode())
    (tmp_path / "blob").write_bytes(encoded(6))
    (folder / "deep" / "6.png").symlink_to(tmp_path / "blob")
    (folder / "deep" / "6.txt").write_bytes("picture 6".encode("utf-16"))
    (folder / "photo.heic").write_bytes(b"")
    data = open_images(str(folder))
    assert data.notes == (f"1 files in {folder} are not used: 1 .heic",)
    captions, pixels = take(stream_of(str(folder), batch_size=7), 1)
    assert sorted(captions) == [f"picture {number}" for number in range(7)]
    for caption, picture in zip(captions, pixels, strict=True):
        assert picture.mean().item() == pytest.approx(20 * int(caption[-1]) / 127.5 - 1, abs=0.03)


def test_a_caption_of_several_lines_is_one_text(tmp_path: Path) -> None:
    """As in tars."""
    save_images(tmp_path / "images", 1)
    (tmp_path / "images" / "0.txt").write_text("\na red cat\n  sits on a hill\n\nwhite fish\n")
    assert set(stream_of(str(tmp_path / "images")).captions(1)) == {"a red cat sits on a hill white fish"}


@pytest.mark.parametrize("count", [2, 0])
def test_saved_datasets_that_hold_no_images(tmp_path: Path, count: int) -> None:
    table = datasets.Dataset.from_dict({"image": [1, 2], "text": ["a cat"] * 2})
    table.select(range(count)).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"the dataset .*saved") as caught:
        open_images(str(tmp_path / "saved"))
    assert "\n" not in str(caught.value)


def test_a_table_of_captions(tmp_path: Path) -> None:
    save_images(tmp_path, count=3)
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\n0.png,"one, two"\n1.png,three\n')
    data = open_images(str(tmp_path))
    assert {row.caption for row in data.rows(0, 0, 0)} == {"one, two", "three"}
    assert data.notes == (f"4 files in {tmp_path} are not used: 3 .txt, 1 .png",)


def test_what_is_listed_tells_other_content(tmp_path: Path) -> None:
    save_images(tmp_path, count=2)
    before = open_images(str(tmp_path)).content()
    (tmp_path / "1.txt").write_text("picture 7\n")
    changed = open_images(str(tmp_path)).content()
    assert [name for name, value in changed if dict(before)[name] != value] == ["1.txt"]
    Image.new("RGB", (31, 20)).save(tmp_path / "2.png")
    assert len(open_images(str(tmp_path)).content()) == len(before) + 1


def test_an_animation_and_a_long_caption_are_counted(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "0.txt").write_text("a cat")
    stream = stream_of(str(tmp_path), batch_size=2, note_on=lambda caption: "cut" if len(caption) > 3 else "")
    take(stream, 1)
    assert in_words(stream.notes) == [
        "2 of 2 samples cut",
        "2 of 2 samples with several frames or pages, of which the first is used",
    ]
