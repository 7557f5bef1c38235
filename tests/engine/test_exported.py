"""An exported engine in Python: against torch, against the stock pipeline, and when its folder is not what it was."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.generate import draw, resolve
from boostdiff.engine.model import ModelFiles
from boostdiff.engine.student import read_student
from PIL import Image
from tiny import PROMPTS

LONG = " ".join(["cat"] * 40)


@pytest.fixture
def folder(engines: dict[str, Path]) -> Path:
    return engines["lora"]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_it_draws_what_torch_draws(
    folder: Path, tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path
) -> None:
    config = GenerateConfig(prompts=list(PROMPTS), student=students["lora"], steps=5, seed=3)
    expected = [pixels(Image.open(path)) for path in draw(tiny_files, config, output=tmp_path)]
    with Engine.load(folder) as engine:
        images = engine(PROMPTS, steps=5, seed=3, batch_size=3)
        assert engine.runner == ("onnx" if not torch.cuda.is_available() else engine.runner)
        stock = engine.model.pipeline(
            list(PROMPTS),
            num_inference_steps=5,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(3 + i) for i in range(len(PROMPTS))],
        ).images
    for image, same, expected_image in zip(images, stock, expected, strict=True):
        assert np.abs(pixels(image) - expected_image).max() <= 1
        assert np.abs(pixels(image) - pixels(same)).max() <= 1
    assert np.abs(pixels(images[0]) - pixels(images[1])).max() > 2


def test_timesteps_are_spaced_as_asked(
    folder: Path, tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path
) -> None:
    config = GenerateConfig(prompts=[PROMPTS[0]], student=students["lora"], steps=4, timestep_spacing="trailing")
    on_engine = replace(config, student=None, engine=folder, runner="onnx")
    drawn = [*draw(tiny_files, config, output=tmp_path / "torch"), *draw(None, on_engine, output=tmp_path / "onnx")]
    with Engine.load(folder) as engine:
        (default,) = engine(PROMPTS[0], steps=4)
        (trailing,) = engine(PROMPTS[0], steps=4, timestep_spacing="trailing")
        *_, last = engine.stream(PROMPTS[0], steps=4, timestep_spacing="trailing")
        (streamed,) = last.images()
    for other in (*map(Image.open, drawn), streamed):
        assert np.abs(pixels(trailing) - pixels(other)).max() <= 1
    assert np.abs(pixels(trailing) - pixels(default)).max() > 2


def test_one_prompt_is_the_first_of_many(folder: Path) -> None:
    with Engine.load(folder) as engine:
        (alone,) = engine(PROMPTS[0], steps=3)
        first, *_ = engine(PROMPTS, steps=3)
    assert np.abs(pixels(alone) - pixels(first)).max() <= 1


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([f"{LONG} one", f"{LONG} two", "a red cat"], "2 of 3 prompts are cut to 16 tokens"),
        (LONG, "1 of 1 prompts are cut to 16 tokens"),
    ],
)
def test_a_call_says_once_what_is_cut(folder: Path, prompts: list[str] | str, says: str) -> None:
    with Engine.load(folder) as engine:
        calls = (
            lambda: engine(prompts, steps=1, batch_size=1),
            lambda: list(engine.stream(prompts, steps=1)),
            lambda: engine.encode(prompts),
        )
        for call in calls:
            with pytest.warns(UserWarning, match="are cut") as warned:
                call()
            assert [str(each.message) for each in warned] == [says]


def test_threads_share_an_engine(folder: Path) -> None:
    """Prompts of several lengths, as a tokenizer keeps its padding, and sessions what they were last given."""
    work = [("a red cat" + " on a mat" * (number % 3), number) for number in range(12)]
    with Engine.load(folder, device="cpu", runner="onnx") as engine:

        def draw(prompt: str, seed: int) -> np.ndarray:
            return pixels(engine(prompt, steps=8, seed=seed)[0])

        alone = [draw(*each) for each in work]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(draw, *zip(*work, strict=True)))
    for image, expected in zip(together, alone, strict=True):
        assert np.abs(image - expected).max() <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompts", ["a red cat", PROMPTS])
def test_a_call_that_cuts_nothing_says_nothing(folder: Path, prompts: list[str] | str) -> None:
    with Engine.load(folder) as engine:
        engine(prompts, steps=1)


def test_a_stream_ends_with_the_image(folder: Path) -> None:
    with Engine.load(folder) as engine:
        steps = list(engine.stream(PROMPTS[:2], steps=4, seed=1))
        images = engine(PROMPTS[:2], steps=4, seed=1)
        finished, begun = steps[-1].images(), steps[0].images()
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in range(4)]
    for last, image in zip(finished, images, strict=True):
        assert np.abs(pixels(last) - pixels(image)).max() <= 1
    assert np.abs(pixels(begun[0]) - pixels(images[0])).max() > 2


def test_generate_runs_wholly_on_the_engine(
    folder: Path, tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path
) -> None:
    config = GenerateConfig(prompts=[PROMPTS[0]], student=students["lora"], steps=4)
    (torch_path,) = draw(tiny_files, config, output=tmp_path / "torch")
    for precision in ("fp32", "fp16"):
        onnx_config = replace(config, engine=folder, runner="onnx", precision=precision)
        (path,) = draw(tiny_files, onnx_config, output=tmp_path / precision)
        assert np.abs(pixels(Image.open(path)) - pixels(Image.open(torch_path))).max() <= (
            1 if precision == "fp32" else 8
        )


def test_an_engine_draws_without_model_and_student(folder: Path, tmp_path: Path) -> None:
    config = GenerateConfig(prompts=[PROMPTS[0]], engine=folder, runner="onnx", steps=2)
    (path,) = draw(None, config, output=tmp_path, device="cpu")
    assert path.name == "a-red-cat-student-0.png"
    with pytest.raises(InputError, match="no negative prompt"):
        draw(None, replace(config, negative_prompt="blurry"), output=tmp_path)
    with pytest.raises(InputError, match="distilled at guidance 3"):
        draw(None, replace(config, guidance=7.0), output=tmp_path, device="cpu")
    with pytest.raises(InputError, match="distilled with the guider cfg"):
        draw(None, replace(config, guider="apg"), output=tmp_path, device="cpu")


def test_an_interruption_keeps_what_is_drawn(tiny_files: ModelFiles, tmp_path: Path) -> None:
    config = GenerateConfig(prompts=list(PROMPTS), teacher=True, steps=2, batch_size=2)
    taken = []

    def on_step(images: int) -> None:
        taken.append(images)
        if len(taken) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tiny_files, config, output=tmp_path / "images", device="cpu", on_step=on_step)
    names = [path.name for path in sorted((tmp_path / "images").iterdir())]
    assert names == ["a-blue-dog-on-a-hill-teacher-1.png", "a-red-cat-teacher-0.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dora"}, "not dora ones"),
        ({"guidance_range": (1.5, 7.5)}, "not guidance-conditioned ones"),
    ],
)
def test_the_lora_scale_is_for_lora_of_one_scale(
    tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A DoRA's magnitudes and a guidance input stay at weight 0."""
    student = shutil.copytree(students["lora"], tmp_path / "student")
    replace(read_student(student), **changes).write(student)
    config = GenerateConfig(prompts=["x"], student=student, lora_scale=0.5)
    with pytest.raises(InputError, match=message):
        draw(tiny_files, config, output=tmp_path / "images")


def test_what_the_engine_can_not_do(folder: Path, engines: dict[str, Path]) -> None:
    with Engine.load(folder) as engine:
        with pytest.raises(InputError, match="distilled at guidance 3"):
            engine(PROMPTS[0], guidance=7.0)
        with pytest.raises(InputError, match="prompt is empty"):
            engine(["a red cat", " "])
        with pytest.raises(InputError, match=r"--steps 0 can.t be used"):
            engine(PROMPTS[0], steps=0)
        assert engine(PROMPTS[0], steps=np.int64(2))
        for steps in (2.5, "2", True):
            with pytest.raises(InputError, match="pass a whole number"):
                engine(PROMPTS[0], steps=steps)
        with pytest.raises(InputError, match="a prompt is no text"):
            engine(["a red cat", None])
        for number in (0, -1):
            with pytest.raises(InputError, match=f"batch size {number} can't be used"):
                engine(PROMPTS, batch_size=number)
        with pytest.raises(InputError, match="sampler"):
            engine(PROMPTS[0], sampler="magic")
        for spacing in ("linspace", "magic", ""):
            with pytest.raises(InputError, match=f"unknown timestep spacing '{spacing}'"):
                engine(PROMPTS[0], timestep_spacing=spacing)
        with pytest.raises(InputError, match=r"can't draw 32x16 pixels: it was exported for 16x16"):
            engine(PROMPTS[0], height=32)
    with pytest.raises(InputError, match="unknown precision 'int4'"):
        Engine.load(folder, runner="onnx", precision="int4")
    with pytest.raises(InputError, match="--quantize int8` makes int8"):
        Engine.load(folder, runner="onnx", precision="int8")
    with pytest.raises(InputError, match="no runner 'torch'"):
        Engine.load(folder, runner="torch")
    with pytest.raises(BoostDiffError, match="exported without --trt"):
        Engine.load(engines["bitfit"], runner="tensorrt")
    with pytest.raises(BoostDiffError, match="engine is closed"):
        engine(PROMPTS[0])
    with pytest.raises(InputError, match="run `boostdiff export` first"):
        Engine.load(folder.parent / "nowhere")


@pytest.mark.parametrize("asked", ["auto", "mps"])
def test_devices_that_onnx_runtime_does_not_know(folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """As Macs' accelerator: what the machine chose gives way to the CPU, what was asked for is refused."""
    monkeypatch.setattr("boostdiff.engine.exported.resolve_device", lambda device: torch.device("mps"))
    if asked == "auto":
        with Engine.load(folder) as engine:
            assert engine.model.device.type == "cpu"
    else:
        with pytest.raises(BoostDiffError, match="can't run on mps: choose --device cpu"):
            Engine.load(folder, device=asked)


def test_a_precision_is_one_of_the_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that could run the plan must not take it then."""
    monkeypatch.setattr("boostdiff.engine.exported.unavailable", lambda *arguments: None)
    with Engine.load(folder, precision="fp32") as engine:
        assert engine.runner == "onnx"


def test_an_engine_that_is_not_square_draws_its_own_size_alone(folder: Path) -> None:
    with Engine.load(folder) as engine:
        engine.manifest.denoiser_config["sample_size"] = engine.model.denoiser.config["sample_size"] = [8, 16]
        height, width = (engine.model.pipeline.vae_scale_factor * side for side in engine.model.latent_shape[1:])
        assert engine.sized(height, width).latent_shape == engine.model.latent_shape
        for size in ((height, height), (width, height), (width, width)):
            with pytest.raises(InputError, match=f"exported for {height}x{width}"):
                engine.sized(*size)


def test_only_what_is_wanted_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT is not, on a machine with a GPU, for ONNX Runtime or for a CPU."""

    def load(flavour: str) -> None:
        raise AssertionError(f"{flavour} was loaded")

    monkeypatch.setattr("boostdiff.engine.trt.load_tensorrt", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for runner in ("onnx", "auto"):
        with Engine.load(folder, runner=runner, device="cpu") as engine:
            assert engine.runner == "onnx"
    with pytest.raises(BoostDiffError, match="needs an NVIDIA GPU, and the device is cpu"):
        Engine.load(folder, runner="tensorrt", device="cpu")


PARTS = ("unet", "text_encoder", "vae_decoder")


@pytest.mark.parametrize(
    "name",
    [
        *(f"{part}/model.onnx" for part in PARTS),
        *(f"{part}/model.onnx.data" for part in PARTS),
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_engine_is_refused(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    engine = shutil.copytree(folder, tmp_path / "engine")
    path = engine / name
    if damage == "remove":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(InputError, match=r"export again|export` first|can't read") as refused:
        Engine.load(engine)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_settings_are_checked_before_they_are_read(folder: Path, tmp_path: Path, name: str) -> None:
    engine = shutil.copytree(folder, tmp_path / "engine")
    (engine / name).write_text("{}")
    with pytest.raises(InputError, match="does not match its manifest"):
        resolve(None, GenerateConfig(prompts=["x"], runner="onnx", engine=engine))


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_files_that_a_tokenizer_would_read_with_its_own_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    engine = shutil.copytree(folder, tmp_path / "engine")
    (engine / "tokenizer" / ".DS_Store").write_bytes(b"")
    Engine.load(engine, device="cpu").close()
    (engine / "tokenizer" / name).write_text("{}")
    with pytest.raises(InputError, match=rf"{name} is no part of the engine: remove it, or export again"):
        Engine.load(engine, device="cpu")


def test_a_manifest_of_another_student_is_refused(
    folder: Path,
    engines: dict[str, Path],
    tiny_files: ModelFiles,
    students: dict[str, Path],
    tmp_path: Path,
) -> None:
    engine = shutil.copytree(folder, tmp_path / "engine")
    shutil.copy(engines["bitfit"] / "manifest.json", engine / "manifest.json")
    with pytest.raises(InputError, match=r"does not match its manifest|is incomplete"):
        Engine.load(engine)
    config = GenerateConfig(prompts=["x"], student=students["lora"], engine=engines["bitfit"], runner="onnx")
    with pytest.raises(InputError, match="exported from another student"):
        draw(tiny_files, config, output=tmp_path / "images")


def test_a_manifest_that_was_edited_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(folder, tmp_path / "engine")
    values = json.loads((engine / "manifest.json").read_text())
    values["student"]["guidance"] = 7.5
    (engine / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="damaged"):
        Engine.load(engine)
