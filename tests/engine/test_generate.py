import stat
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from boostdiff.engine.conditions import TextEmbeddings
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import InputError
from boostdiff.engine.generate import Sampling, _write_png, draw, images_of, opened, resolve
from boostdiff.engine.model import ModelFiles
from boostdiff.engine.student import read_student
from PIL import Image

LONG = "a very long prompt " * 20


def written(prompt: str, folder: Path, seed: int = 0) -> str:
    config = GenerateConfig(prompts=[prompt], seed=seed)
    path = _write_png(Image.new("RGB", (8, 8)), config, 0, model="m", folder=folder)
    assert Image.open(path).text["prompt"] == prompt
    return path.name


def test_other_prompts_have_other_names(tmp_path: Path) -> None:
    prompts = ["a red cat", "a-red-cat", "A red cat!", "a red  cat", "猫", "犬", "кошка", "!!"]
    prompts += [f"{LONG} one", f"{LONG} two"]
    names = {prompt: written(prompt, tmp_path) for prompt in prompts}
    assert all(names[one] != names[other] for one, other in combinations(prompts, 2))
    assert names["a red cat"] == "a-red-cat-student-0.png"
    assert all(name.isascii() and len(name) < 100 for name in names.values())
    assert written("猫", tmp_path) == names["猫"]
    assert written("猫", tmp_path, seed=1) != names["猫"]
    assert not list(tmp_path.glob(".*"))


def test_an_image_tells_what_it_was_drawn_by(tmp_path: Path) -> None:
    chosen = {"guidance": 5.0, "timestep_spacing": "trailing", "lora_scale": 1.2}
    for settings in ({}, chosen):
        config = GenerateConfig(prompts=["a cat"], sampler="ddim", steps=8, **settings)
        path = _write_png(Image.new("RGB", (8, 8)), config, 0, model="m", folder=tmp_path)
        shared = {"prompt": "a cat", "model": "m", "seed": "0", "sampler": "ddim", "steps": "8"}
        assert Image.open(path).text == shared | {k.replace("_", " "): str(v) for k, v in settings.items()}


def test_images_of_other_students_stay(tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path) -> None:
    names, told = [], []
    for method in ("lora", "bitfit", "lora"):
        config = GenerateConfig(prompts=["a red cat"], student=students[method], steps=1)
        (path,) = draw(tiny_files, config, output=tmp_path, device="cpu")
        names.append(path.name)
        told.append(Image.open(path).text["adapter sha256"])
    assert names == ["a-red-cat-student-0.png", "a-red-cat-student-0-2.png", "a-red-cat-student-0.png"]
    assert told == [read_student(students[method]).adapter_sha256 for method in ("lora", "bitfit", "lora")]


def test_images_of_other_settings_stay(tmp_path: Path) -> None:
    def write(side: int = 8, **settings: Any) -> str:
        config = GenerateConfig(prompts=["a cat"], **settings)
        return _write_png(Image.new("RGB", (side, side)), config, 0, model="m", folder=tmp_path).name

    assert write(steps=8) == write(steps=8) == "a-cat-student-0.png"
    assert write(steps=9) == write(steps=9) == "a-cat-student-0-2.png"
    assert write(steps=9, negative_prompt="a dog") == "a-cat-student-0-3.png"
    assert write(16, steps=8) == "a-cat-student-0-4.png"
    assert write(steps=8, runner="onnx") == "a-cat-student-0-5.png"
    assert write(steps=8) == "a-cat-student-0.png"
    (tmp_path / "a-cat-teacher-0.png").write_bytes(b"no image")
    assert write(teacher=True) == "a-cat-teacher-0-2.png"
    assert (tmp_path / "a-cat-teacher-0.png").read_bytes() == b"no image"


@pytest.mark.parametrize("target", ["new", "new/below"])
def test_a_link_to_a_folder_that_is_to_be_made(tiny_files: ModelFiles, tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    config = GenerateConfig(prompts=["a cat", "a dog"], teacher=True, steps=1)
    paths = draw(tiny_files, config, output=tmp_path / "link", device="cpu")
    assert [path.parent for path in paths] == 2 * [tmp_path / "link"]
    assert sorted((tmp_path / target).iterdir()) == sorted(path.resolve() for path in paths)


def test_what_is_cut_is_said(tiny_files: ModelFiles, tmp_path: Path) -> None:
    long = " ".join(["cat"] * 40)
    config = GenerateConfig(prompts=[long, "a cat"], teacher=True, negative_prompt=long, steps=1)
    notes: list[str] = []
    paths = draw(tiny_files, config, output=tmp_path / "o", device="cpu", on_note=notes.append)
    assert notes == ["1 of 2 prompts are cut to 16 tokens", "1 of 1 negative prompts are cut to 16 tokens"]
    assert len(paths) == 2
    assert len({stat.S_IMODE(path.stat().st_mode) for path in paths}) == 1


def test_prompts_are_encoded_in_parts(tiny_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole batches: the images are those of one part."""
    texts = [f"a red cat {i}" for i in range(7)]
    config = resolve(tiny_files, GenerateConfig(prompts=texts, teacher=True, steps=1, seed=3, batch_size=2))
    sizes: list[int] = []
    encode = Sampling.encode

    def counted(self: Sampling, prompts: Sequence[str]) -> TextEmbeddings:
        sizes.append(len(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(Sampling, "encode", counted)
    with opened(tiny_files, config, "cpu") as sampling:
        whole = [image.tobytes() for image in images_of(sampling, config, texts, start=1)]
        monkeypatch.setattr("boostdiff.engine.generate.TEXT_BATCH_SIZE", 5)
        parts = [image.tobytes() for image in images_of(sampling, config, texts, start=1)]
    assert sizes == [7, 4, 3]
    assert len(whole) == len(texts)
    assert parts == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": True, "guidance": 1.0, "negative_prompt": "x"}, "--negative-prompt is not used with --guidance 1"),
        ({"prompts": ["caf\udce9"]}, "not UTF-8 text"),
        ({"negative_prompt": "caf\udce9"}, "not UTF-8 text"),
    ],
)
def test_what_would_not_be_used_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateConfig(**{"prompts": ["a cat"], **options})
