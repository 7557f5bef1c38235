"""Families of flow matching against their stock pipelines: teacher, student, adapter, merge, engine, resume."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.benchmarks.speed.stock import StockVariant, stock_pipeline
from boostdiff.benchmarks.speed.throughput import TimedVariant, measure
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.generate import draw, resolve
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.merge import merge_and_check, merge_in_place, merged_copy
from boostdiff.engine.model import load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import generate, to_uint8
from boostdiff.engine.student import read_student
from boostdiff.export.config import ExportConfig
from boostdiff.export.diffusers_folder import write_diffusers_folder
from boostdiff.export.export import export
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import Image
from tiny import CPU, PROMPTS, make_pipeline, make_sd3_pipeline
from tiny_chroma import make_chroma_pipeline
from tiny_qwen_image import make_qwen_image_pipeline
from tiny_sana import make_sana_pipeline

STEPS, SEED = 4, 5


def make_unet_pipeline() -> DiffusionPipeline:
    """Stable Diffusion whose UNet is one of flow matching."""
    pipeline = make_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return pipeline


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd3": make_sd3_pipeline,
    "sd3-without-t5": lambda: make_sd3_pipeline(t5=False, shift=1.0, use_dynamic_shifting=True),
    "sana": make_sana_pipeline,
    "sana-euler": lambda: make_sana_pipeline(euler=True, out_channels=8, timestep_scale=0.5),
    "chroma": make_chroma_pipeline,
    "chroma-of-beta-sigmas": lambda: make_chroma_pipeline(use_beta_sigmas=True, use_dynamic_shifting=True),
    "qwen-image": make_qwen_image_pipeline,
    "unet": make_unet_pipeline,
}
"""By name, what makes a tiny model by diffusers' own classes."""

SAMPLERS = {"sana": "dpm++", "unet": "dpm++"}
"""By kind, the sampler that is the scheduler of its folder, if not Euler's."""

DISTILLED = ("sd3", "sana", "chroma", "qwen-image", "unet")

SLOWER = [kind if kind == "sd3" else pytest.param(kind, marks=pytest.mark.slow) for kind in DISTILLED]
"""Graphs take half a minute each: one family at once, the others among the slow proofs."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    for kind, make in KINDS.items():
        make().save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def students(folders: dict[str, Path], prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow-students")
    for kind in DISTILLED:
        config = DistillConfig(prompts=prompt_file, updates=20, batch_size=2, learning_rate=0.02)
        observers = Observers(preview=False)
        distill(locate(str(folders[kind])), config, output=root / kind, device="cpu", observers=observers)
    return {kind: root / kind for kind in DISTILLED}


def stock_image(
    folder: Path, *, w: float | None, student: Path | None = None, written: Path | None = None, **options: Any
) -> np.ndarray:
    """The stock pipeline's own image, by its own scheduler; at guidance w, or in one pass with a student's LoRA.

    `written` is a folder that was written of this one, to draw with in its place.
    """
    pipeline = DiffusionPipeline.from_pretrained(written or folder, **locate(str(folder)).absent_components)
    pipeline.set_progress_bar_config(disable=True)
    if student is not None:
        pipeline.load_lora_weights(student, weight_name=LORA_FILE)
    files = locate(str(folder))
    _, *size = files.family.latent_shape(files.denoiser_config)
    height, width = (pipeline.vae_scale_factor * side for side in size)
    guidance = files.family.stock_guidance(1.0 if w is None else w)
    (image,) = pipeline(
        PROMPTS[0],
        height=height,
        width=width,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        **guidance | options,
    ).images
    return np.asarray(image).astype(int)


def same(one: np.ndarray, other: np.ndarray, tolerance: int = 1) -> bool:
    assert one.shape == other.shape
    assert one.std() > 1, "a picture of one colour shows nothing"
    return int(np.abs(one - other).max()) <= tolerance


@pytest.mark.parametrize("negative_prompt", ["", "a white fish"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_stock_pipelines_own_guidance(
    folders: dict[str, Path], kind: str, negative_prompt: str
) -> None:
    model = load(locate(str(folders[kind])), device=CPU)
    images = generate(
        model,
        GuidedDenoiser(TorchRunner(model.denoiser), 4.0),
        text=model.family.encode(model.pipeline, PROMPTS[:1], negative_prompt=negative_prompt),
        make_scheduler=lambda: model.make_scheduler(SAMPLERS.get(kind, "euler")),
        steps=STEPS,
        seed=SEED,
    )
    got = to_uint8(images)[0].permute(1, 2, 0).numpy().astype(int)
    assert same(got, stock_image(folders[kind], w=4.0, negative_prompt=negative_prompt))
    assert not same(got, stock_image(folders[kind], w=None), 3)


@pytest.mark.parametrize("kind", DISTILLED)
def test_a_student_draws_the_same_in_the_stock_pipeline(
    folders: dict[str, Path], students: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    sampler: Any = SAMPLERS.get(kind, "euler")
    config = GenerateConfig(prompts=[PROMPTS[0]], student=students[kind], sampler=sampler, steps=STEPS, seed=SEED)
    (path,) = draw(locate(str(folders[kind])), config, output=tmp_path, device="cpu")
    got = np.asarray(Image.open(path)).astype(int)
    assert same(got, stock_image(folders[kind], w=None, student=students[kind]))
    assert not same(got, stock_image(folders[kind], w=None), 3)


@pytest.mark.parametrize("kind", DISTILLED)
def test_merged_equals_base_and_adapter(folders: dict[str, Path], students: dict[str, Path], kind: str) -> None:
    model = load(locate(str(folders[kind])), device=CPU)
    info = read_student(students[kind], model.files)
    merged = merged_copy(model, students[kind], info)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert merge_and_check(model, students[kind], info).relative < 1e-4


@pytest.mark.parametrize("kind", DISTILLED)
def test_a_large_one_is_merged_at_a_size_of_whole_patches(
    folders: dict[str, Path], students: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of 12 by 20 is 3 by 5."""
    monkeypatch.setattr("boostdiff.engine.merge.LARGE_PARAMETERS", 0)
    model = load(locate(str(folders[kind])), device=CPU)
    model.denoiser.register_to_config(sample_size=[12, 20])
    assert merge_and_check(model, students[kind], read_student(students[kind])).relative < 1e-4


@pytest.mark.parametrize("kind", DISTILLED)
def test_a_pipeline_folder_draws_the_students_image(
    folders: dict[str, Path], students: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model = load(locate(str(folders[kind])), device=CPU)
    info = read_student(students[kind], model.files)
    merge_in_place(model.denoiser, students[kind], info)
    write_diffusers_folder(model, info, tmp_path / "pipeline")
    (one_pass,) = (name for name in model.family.stock_guidance(1.0) if name.endswith(("guidance_scale", "cfg_scale")))
    assert f"`{one_pass}=1.0`" in (tmp_path / "pipeline/README.md").read_text(encoding="utf-8")
    got = stock_image(folders[kind], w=None, written=tmp_path / "pipeline")
    assert same(got, stock_image(folders[kind], w=None, student=students[kind]))


@pytest.mark.parametrize("kind", SLOWER)
def test_speed_has_the_stock_pipelines_row(folders: dict[str, Path], kind: str) -> None:
    model = load(locate(str(folders[kind])), device=CPU)
    runner = TorchRunner(model.denoiser)
    speed = measure(
        [
            TimedVariant(mode="student", runner=runner),
            StockVariant(mode="teacher", runner=runner, pipeline=stock_pipeline(model)),
        ],
        model,
        prompts=PROMPTS[:2],
        guidance=3.0,
        make_scheduler=partial(model.make_scheduler, SAMPLERS.get(kind, "euler")),
        steps=2,
        batch_sizes=(2,),
        runs=3,
    )
    assert not speed.left_out
    assert {(row.runner, row.mode) for row in speed.rows} == {("torch", "student"), ("stock diffusers", "teacher")}


@pytest.mark.parametrize("kind", DISTILLED)
@torch.no_grad()
def test_latents_of_images_are_those_that_the_vae_decodes(folders: dict[str, Path], kind: str) -> None:
    model = load(locate(str(folders[kind])), device=CPU)
    vae, family = model.pipeline.vae, model.family
    channels, height, width = model.latent_shape
    factor = model.pipeline.vae_scale_factor
    images = torch.rand(2, 3, factor * height, factor * width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_latents(vae, images)
    assert latents.shape == (2, channels, height, width)
    encoded = vae.encode(images[:, :, None] if family.video_vae else images)
    # Sana's has no distribution of latents.
    raw = encoded.latent if hasattr(encoded, "latent") else retrieve_latents(encoded, sample_mode="argmax")
    expected = raw[:, :, 0] if family.video_vae else raw
    torch.testing.assert_close(family.denormalized(latents, vae), expected, atol=1e-5, rtol=1e-4)
    assert family.decode_latents(vae, expected).shape == images.shape


@pytest.mark.parametrize("kind", SLOWER)
def test_the_engine_draws_what_torch_draws(
    folders: dict[str, Path], students: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    files, notes = locate(str(folders[kind])), list[str]()
    manifest = export(
        files, ExportConfig(), student=students[kind], output=tmp_path / "engine", device="cpu", report=notes.append
    )
    assert manifest.artefacts[f"{files.family.denoiser}/model.onnx"]["check"]["relative"] <= 1e-4
    assert manifest.pipeline["onnx fp32"]["image_max"] <= 1 / 255
    with Engine.load(tmp_path / "engine", runner="onnx", device="cpu") as engine:
        (image,) = engine(PROMPTS[0], steps=STEPS, sampler=SAMPLERS.get(kind, "euler"), seed=SEED)
    stock = stock_image(folders[kind], w=None, student=students[kind])
    assert same(np.asarray(image).astype(int), stock)


@pytest.mark.parametrize("kind", SLOWER)
def test_a_resumed_run_gives_the_same_bytes(
    folders: dict[str, Path], students: dict[str, Path], prompt_file: Path, kind: str, tmp_path: Path
) -> None:
    files = locate(str(folders[kind]))
    config = DistillConfig(prompts=prompt_file, updates=20, batch_size=2, learning_rate=0.02)

    def stop(report: Any) -> None:
        if report.update == 7:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, BoostDiffError)):
        distill(
            files,
            config,
            RunConfig(checkpoint_every=5),
            output=tmp_path / "student",
            device="cpu",
            observers=Observers(preview=False, on_update=stop),
        )
    quiet = Observers(preview=False)
    execution = RunConfig(resume=True)
    info = distill(files, config, execution, output=tmp_path / "student", device="cpu", observers=quiet)
    assert info.result["resumed_at"] == 5
    assert (tmp_path / "student" / LORA_FILE).read_bytes() == (students[kind] / LORA_FILE).read_bytes()


@pytest.mark.parametrize("size", [{"height": 72}, {"height": 32, "width": 80}])
def test_a_size_beyond_the_positions_is_refused(folders: dict[str, Path], size: dict[str, int]) -> None:
    """They are 16 by 16, of patches of 4 pixels."""
    files = locate(str(folders["sd3"]))
    config = GenerateConfig(prompts=["a cat"], teacher=True, **size | {"height": 64, "width": 64})
    assert resolve(files, config)
    with pytest.raises(InputError, match=r"pixels: --height and --width must be at most 64$"):
        resolve(files, GenerateConfig(prompts=["a cat"], teacher=True, **size))
    side = max(size.values())
    with pytest.raises(InputError, match=f"can't draw {side}x{side} pixels: --size"):
        files.family.check_size((side, side), files.denoiser_config, files.vae_config, options="--size", exported=True)


@pytest.mark.parametrize("kind", ["chroma", "qwen-image"])
def test_what_no_cuda_graph_holds_is_refused_before_weights_are_read(folders: dict[str, Path], kind: str) -> None:
    files = locate(str(folders[kind]))
    with pytest.raises(InputError, match=f"CUDA graphs can't hold the denoiser of a {kind} model"):
        resolve(files, GenerateConfig(prompts=["a cat"], teacher=True, runner="captured"))


@pytest.mark.parametrize("changes", [{"sample_size": 34}, {"pos_embed_max_size": 3}])
def test_a_model_beyond_its_own_positions_is_refused(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, int]
) -> None:
    model = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    write_json(model / "transformer/config.json", read_json(model / "transformer/config.json") | changes)
    with pytest.raises(InputError, match=r"sample_size is \d+: it must be at most \d+, pos_embed_max_size"):
        locate(str(model))


@pytest.mark.parametrize("size", [7, 9])
def test_a_size_that_the_patches_do_not_divide_is_refused(folders: dict[str, Path], tmp_path: Path, size: int) -> None:
    config = folders["sd3"] / "transformer/config.json"
    model = tmp_path / "sd3"
    shutil.copytree(folders["sd3"], model)
    write_json(model / "transformer/config.json", read_json(config) | {"sample_size": size})
    with pytest.raises(InputError, match=f"sample_size is {size}: it must be a multiple of patch_size, 2"):
        locate(str(model))
