"""Every family against the stock pipeline: what it encodes, what the teacher predicts, what a student draws."""

import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.benchmarks.speed.throughput import TimedVariant, measure
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.families import family_of
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.manifest import Manifest
from boostdiff.engine.merge import merged_copy
from boostdiff.engine.model import Model, load, locate
from boostdiff.engine.runners import GraphRunner, TorchRunner
from boostdiff.engine.sampling import generate, to_uint8
from boostdiff.engine.schedulers import make_scheduler
from boostdiff.engine.sessions import OnnxSession
from boostdiff.engine.student import read_student
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from boostdiff.export.parts import denoiser_part
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CPU, PROMPTS, make_pipeline, make_xl_pipeline

KINDS = ("sd", "sd-v", "sdxl")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    pipelines = {
        "sd": make_pipeline(),
        "sd-v": make_pipeline(prediction_type="v_prediction"),
        "sdxl": make_xl_pipeline(),
    }
    # Both of which the stock pipeline honours, of Stable Diffusion XL alone.
    pipelines["sdxl"].vae.register_to_config(
        scaling_factor=0.5, latents_mean=[0.3, -0.2, 0.0, 0.1], latents_std=[1.2, 0.7, 1.0, 0.9]
    )
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in pipelines}


@pytest.fixture(scope="session")
def family_students(
    folders: dict[str, Path], prompt_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("family-students")
    for kind, folder in folders.items():
        config = DistillConfig(prompts=prompt_file, updates=10, batch_size=4, learning_rate=0.02)
        observers = Observers(preview=kind == "sdxl")
        distill(locate(str(folder)), config, output=root / kind, device="cpu", observers=observers)
    return {kind: root / kind for kind in folders}


def stock(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    # Where the folder says "linspace", diffusers' DDIM would not step from one timestep to the next.
    own = {"clip_sample": False, "timestep_spacing": "leading"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(model: Model, negative_prompt: str) -> np.ndarray:
    images = generate(
        model,
        GuidedDenoiser(TorchRunner(model.denoiser), 4.0),
        text=model.family.encode(model.pipeline, PROMPTS[:2], negative_prompt=negative_prompt),
        make_scheduler=lambda: make_scheduler("ddim", model.pipeline.scheduler.config),
        steps=4,
        seed=5,
    )
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("negative_prompt", ["", "a white fish"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_stock_pipelines_own_guidance(
    folders: dict[str, Path], kind: str, negative_prompt: str
) -> None:
    model = load(locate(str(folders[kind])), device=CPU)
    expected = stock(folders[kind])(
        list(PROMPTS[:2]),
        negative_prompt=[negative_prompt] * 2 if negative_prompt else None,
        guidance_scale=4.0,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(5 + i) for i in range(2)],
    ).images
    got = ours(model, negative_prompt)
    assert np.abs(got.astype(int) - np.stack([np.asarray(image) for image in expected])).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_draws_the_same_in_the_stock_pipeline(
    folders: dict[str, Path], family_students: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    config = GenerateConfig(prompts=[PROMPTS[0]], student=family_students[kind], steps=3, seed=9)
    (path,) = draw(locate(str(folders[kind])), config, output=tmp_path / "images", device="cpu")
    pipeline = stock(folders[kind])

    def image() -> np.ndarray:
        generator = torch.Generator().manual_seed(9)
        output = pipeline(PROMPTS[0], guidance_scale=1.0, num_inference_steps=3, generator=generator)
        return np.asarray(output.images[0]).astype(int)

    before = image()
    pipeline.load_lora_weights(family_students[kind], weight_name=LORA_FILE)
    assert np.abs(np.asarray(Image.open(path)).astype(int) - image()).max() <= 1
    assert np.abs(before - image()).max() > 1


@pytest.mark.parametrize("size", [(16, 24), (32, 8)])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_another_size_is_the_stock_pipelines(
    folders: dict[str, Path], kind: str, size: tuple[int, int], tmp_path: Path
) -> None:
    height, width = size
    config = GenerateConfig(
        prompts=[PROMPTS[0]], teacher=True, guidance=4.0, steps=3, seed=9, height=height, width=width
    )
    (path,) = draw(locate(str(folders[kind])), config, output=tmp_path, device="cpu")
    image = Image.open(path)
    assert image.size == (width, height)
    expected = stock(folders[kind])(
        PROMPTS[0],
        guidance_scale=4.0,
        num_inference_steps=3,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_engine_of_another_size_is_the_stock_pipeline(folders: dict[str, Path], kind: str) -> None:
    """SDXL is conditioned on the size. The parts are torch's: a graph of several sizes takes a minute to export."""
    model = load(locate(str(folders[kind])), device=CPU)
    manifest = Manifest(
        model=kind,
        inputs={},
        options={"size": [16, 16, 32]},
        student={"method": "lora", "guidance": 3.0},
        denoiser_config=dict(model.denoiser.config),
    )
    model.pipeline.unet = TorchRunner(model.denoiser)
    with Engine(manifest=manifest, model=model, opened=ExitStack()) as engine:
        (image,) = engine(PROMPTS[0], steps=3, seed=9, height=32, width=24)
        (default,) = engine(PROMPTS[0], steps=3, seed=9)
        with pytest.raises(InputError, match="can't draw 36x16 pixels: it was exported for 16 to 32, in 8s"):
            engine(PROMPTS[0], height=36)
    assert (image.size, default.size) == ((24, 32), (16, 16))
    expected = stock(folders[kind])(
        PROMPTS[0],
        guidance_scale=1.0,
        num_inference_steps=3,
        height=32,
        width=24,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


def test_a_size_that_the_model_can_not_draw(folders: dict[str, Path], tmp_path: Path) -> None:
    config = GenerateConfig(prompts=[PROMPTS[0]], teacher=True, height=17)
    with pytest.raises(InputError, match="can't draw 17x16 pixels: --height and --width must be multiples of 8"):
        draw(locate(str(folders["sd"])), config, output=tmp_path / "images", device="cpu")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_exported_denoiser_is_the_merged_one(
    folders: dict[str, Path], family_students: dict[str, Path], kind: str
) -> None:
    """What the exporter is given; its graphs are compared where engines are made, of SDXL by the slow proof below."""
    model = load(locate(str(folders[kind])), device=CPU)
    merged = merged_copy(model, family_students[kind], read_student(family_students[kind]))
    text = model.family.encode(model.pipeline, list(PROMPTS), negative_prompt=None).conditional
    part = denoiser_part(model, merged, text, ExportConfig(), (1, 999))
    names = {"sample", "timestep", "encoder_hidden_states"} | ({"text_embeds", "time_ids"} if kind == "sdxl" else set())
    assert part.inputs.keys() == names
    with torch.no_grad():
        (got,), expected = part.module(**part.inputs), TorchRunner(merged).predict(part.inputs)
        other = TorchRunner(stock(folders[kind]).unet).predict(part.inputs)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, other, atol=1e-3)
    assert {case.where.split(",")[0] for case in part.cases} >= {"batch 1", "batch 2"}


@pytest.mark.parametrize(
    ("kind", "trt"),
    [
        pytest.param("sd-v", False, marks=pytest.mark.slow),
        pytest.param("sdxl", False, marks=pytest.mark.slow),
        pytest.param("sdxl", True, marks=pytest.mark.slow),
    ],
)
def test_export_of_every_family(
    folders: dict[str, Path],
    family_students: dict[str, Path],
    engines: dict[str, Path],
    reuse_graphs: Callable[..., None],
    kind: str,
    trt: bool,
    tmp_path: Path,
) -> None:
    files = locate(str(folders[kind]))
    config = ExportConfig(precision="both" if trt else None, trt=trt, size=(16, 16, 24) if trt else None)
    # The tiny model's VAE, and Stable Diffusion's text encoder, are of the same weights.
    same = {"vae_decoder": not trt, "text_encoder": kind == "sd-v"}
    parts = ("unet", "vae_decoder", *files.family.text_encoders)
    reuse_graphs(engines["lora"], fresh=[name for name in parts if not same.get(name)])
    manifest = export(files, config, student=family_students[kind], output=tmp_path / "engine", device="cpu")
    names = set(manifest.artefacts["unet/model.onnx"]["inputs"])
    common = {"sample", "timestep", "encoder_hidden_states"}
    assert names == common | ({"text_embeds", "time_ids"} if kind == "sdxl" else set())
    model = load(files, device=CPU)
    merged = merged_copy(model, family_students[kind], read_student(family_students[kind]))
    session = OnnxSession(tmp_path / "engine/unet/model.onnx", device=CPU)
    with GraphRunner(session, family=model.family, denoiser_config=manifest.denoiser_config) as runner:
        inputs = model.family.example_inputs(model.pipeline, 3)
        with torch.no_grad():
            torch.testing.assert_close(
                runner.predict(inputs), TorchRunner(merged).predict(inputs), atol=1e-4, rtol=1e-3
            )
    for width in (16, 24) if trt else (16,):
        drawing = GenerateConfig(
            prompts=list(PROMPTS), student=family_students[kind], steps=4, sampler="euler", width=width
        )
        paths = draw(files, drawing, output=tmp_path / f"{width}")
        expected = [np.asarray(Image.open(path)).astype(int) for path in paths]
        for precision, allowed in {"fp32": 2, "fp16": 8}.items() if trt else [("fp32", 2)]:
            with Engine.load(tmp_path / "engine", runner="onnx", precision=precision) as engine:
                assert engine.model.denoiser.dtype == (torch.float16 if precision == "fp16" else torch.float32)
                got = engine(PROMPTS, steps=4, sampler="euler", width=width)
                for image, torch_image in zip(got, expected, strict=True):
                    assert np.abs(np.asarray(image) - torch_image).max() <= allowed
                # As `pipe.unet` of the stock pipeline.
                images = engine.model.pipeline(
                    PROMPTS[0], num_inference_steps=1, guidance_scale=1.0, height=16, width=width
                ).images
                assert images[0].size == got[0].size == (width, 16)


def test_speed_of_sdxl(folders: dict[str, Path]) -> None:
    model = load(locate(str(folders["sdxl"])), device=CPU)
    speed = measure(
        [TimedVariant(mode=mode, runner=TorchRunner(model.denoiser)) for mode in ("teacher", "student")],
        model,
        prompts=PROMPTS[:1],
        guidance=3.0,
        make_scheduler=lambda: make_scheduler("ddim", model.pipeline.scheduler.config),
        steps=2,
        batch_sizes=(1,),
        runs=3,
    )
    assert [row.mode for row in speed.rows] == ["teacher", "student"], speed.left_out
    assert speed.flops.text_encoder > 0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_two_loras_together_add_both_deltas(
    folders: dict[str, Path], family_students: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """The student's LoRA and a style's LoRA active in one stock pipeline: base + both."""
    torch.manual_seed(1)
    tensors = load_file(family_students[kind] / LORA_FILE)
    save_file({name: 0.1 * torch.randn_like(t) for name, t in tensors.items()}, tmp_path / LORA_FILE)
    name = next(name for name in tensors if name.endswith("attn2.to_v.lora_A.weight")).removesuffix(".lora_A.weight")

    def weight(*loras: Path) -> torch.Tensor:
        pipeline = stock(folders[kind])
        for index, folder in enumerate(loras):
            pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=f"lora{index}")
        if loras:
            pipeline.set_adapters([f"lora{index}" for index in range(len(loras))])
            pipeline.fuse_lora(components=["unet"])
        layer = pipeline.unet.get_submodule(name.removeprefix("unet."))
        return getattr(layer, "base_layer", layer).weight.detach().clone()

    base = weight()
    student, style = weight(family_students[kind]) - base, weight(tmp_path) - base
    assert student.abs().max() > 1e-5
    assert style.abs().max() > 1e-5
    torch.testing.assert_close(weight(family_students[kind], tmp_path), base + student + style, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("class_name", ["FluxPipeline", ["pipeline", "StableDiffusionPipeline"], {"name": 1}, None])
def test_an_unknown_family(class_name: object) -> None:
    with pytest.raises(InputError, match=f"models of class {re.escape(str(class_name))} are not supported"):
        family_of({"_class_name": class_name})


@pytest.mark.parametrize("version", ["0.6.0", "0.8.1", "0.9.0.dev0", None])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_unet_of_an_old_diffusers_is_of_the_stock_pipelines_size(
    folders: dict[str, Path], kind: str, version: str | None, tmp_path: Path
) -> None:
    shutil.copytree(folders[kind], tmp_path / "model")
    path = tmp_path / "model/unet/config.json"
    known = {key: value for key, value in read_json(path).items() if key != "_diffusers_version"}
    write_json(path, known | ({} if version is None else {"_diffusers_version": version}))
    width, height = stock(tmp_path / "model")("a cat", num_inference_steps=1).images[0].size
    for asked in (None, 32):
        config = GenerateConfig(prompts=["a cat"], teacher=True, steps=1, height=asked)
        (drawn,) = draw(locate(str(tmp_path / "model")), config, output=tmp_path / str(asked), device="cpu")
        assert Image.open(drawn).size == (width, asked or height)


@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 32}, {"height": 24, "width": 16}])
@pytest.mark.parametrize("lacks", [(), ("block_out_channels",)])
def test_a_small_vae_is_of_the_stock_pipelines_scale(
    folders: dict[str, Path], lacks: tuple[str, ...], size: dict[str, int], tmp_path: Path
) -> None:
    pipeline = stock(folders["sd"])
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipeline.vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)
    pipeline.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/vae/config.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key not in lacks})
    image = stock(tmp_path / "model")("a cat", num_inference_steps=1, **size).images[0]
    config = GenerateConfig(prompts=["a cat"], teacher=True, steps=1, **size)
    (drawn,) = draw(locate(str(tmp_path / "model")), config, output=tmp_path / "images", device="cpu")
    assert Image.open(drawn).size == image.size
