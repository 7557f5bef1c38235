import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.engine.pictures import FIRST_FRAME, PICTURE_TYPES, PictureError, files_in, labelled_grid, read_picture
from PIL import Image, ImageCms


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("ending", ["bmp", "gif", "tif", "TIFF", "avif", "jfif", "webp", "jp2", "PNG"])
def test_every_type_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (8, 8), (200, 30, 60)).save(path)
    assert ending.lower() in PICTURE_TYPES
    image, notes = read_picture(path)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 60)).max() < 12
    assert not notes


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "TIFF", "WEBP"):
        image, notes = read_picture(stored(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert image.getpixel((4, 4))[0] > 240
        assert notes == {FIRST_FRAME: 1}


def swapped_profile() -> bytes:
    """sRGB's profile with red and green in each other's place."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"----"), (b"gXYZ", b"rXYZ"), (b"----", b"gXYZ")):
        profile = profile.replace(old, new)
    return profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_of_the_profile(mode: str) -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode)
    assert read_picture(stored(red, "PNG"))[0].getpixel((0, 0)) == (255, 0, 0)
    image, _ = read_picture(stored(red, "PNG", icc_profile=swapped_profile()))
    assert image.getpixel((0, 0))[1] > 200
    assert image.getpixel((0, 0))[0] < 60
    # A damaged profile is passed over, as viewers do.
    assert read_picture(stored(red, "PNG", icc_profile=b"nothing"))[0].getpixel((0, 0)) == (255, 0, 0)


def test_modes_that_are_not_rgb() -> None:
    assert read_picture(stored(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"))[0].getpixel((0, 0))[0] > 240
    assert read_picture(stored(Image.new("LA", (4, 4), (0, 0)), "PNG"))[0].getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert read_picture(stored(half, "PNG"))[0].getpixel((0, 0)) == (255, 127, 127)
    clear = Image.new("RGB", (4, 4), (1, 2, 3))
    assert read_picture(stored(clear, "PNG", transparency=(1, 2, 3)))[0].getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert read_picture(stored(deep, kind))[0].getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(PictureError, match="32-bit floats"):
        read_picture(stored(Image.new("F", (4, 4), 0.5), "TIFF"))
    with pytest.raises(PictureError, match="none of"):
        read_picture(b"no picture")


def test_links_are_followed_once(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    (snapshot / "deep").mkdir(parents=True)
    (blobs / "abc").write_bytes(b"content")
    (snapshot / "deep" / "0.png").symlink_to("../../../blobs/abc")
    (snapshot / "gone.png").symlink_to("nowhere")
    (snapshot / ".hidden").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").write_bytes(b"content")
    (snapshot / "linked").symlink_to(tmp_path / "other")
    (snapshot / "linked-again").symlink_to(tmp_path / "other")
    (snapshot / "deep" / "loop").symlink_to(snapshot)
    names = [os.path.relpath(path, snapshot) for path in files_in(snapshot)]
    assert names == ["deep/0.png", "linked/1.png"]


def test_long_headings_keep_to_their_columns() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    short, long = (
        labelled_grid({name: images, "b": images}, ["x", "y"])
        for name in ("a", "student lora (outputs/a-student-of-a-long-name)")
    )
    assert short.width == long.width
    assert short.height < long.height < short.height + 60
    # Between the columns, where the text of the first would have gone on, there is paper.
    gap = np.asarray(long)[:40, 190 + 8 + 128 : 190 + 8 + 128 + 8]
    assert (gap == 255).all()
