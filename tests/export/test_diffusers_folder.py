"""The whole pipeline folder in stock diffusers: it gives `generate`'s image, in one pass, at any guidance scale."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import read_json
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance_input import add_guidance_embedding
from boostdiff.engine.merge import merge_in_place
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.sampling import initial_noise
from boostdiff.engine.student import Distilled, read_student
from boostdiff.export.diffusers_folder import GUARD_WIDTH, write_diffusers_folder
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from tiny import CPU, make_pipeline, make_sd3_pipeline, make_xl_pipeline

FIXED = Distilled(method="lora", guidance=3.0)


@pytest.fixture
def merged(tiny_files: ModelFiles, students: dict[str, Path]) -> Model:
    model = load(tiny_files, device=CPU)
    merge_in_place(model.denoiser, students["lora"], read_student(students["lora"]))
    return model


def passes_of(folder: Path, **options: Any) -> tuple[Image.Image, list[int]]:
    """A stock pipeline's image, and the batch of each pass of its UNet."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    batches: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    noise = initial_noise((4, 8, 8), count=1, seed=3)
    return pipeline("a red cat", latents=noise, **options).images[0], batches


def test_it_gives_the_image_of_generate(
    merged: Model, tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path
) -> None:
    before = dict(merged.denoiser.config)
    weights = write_diffusers_folder(merged, read_student(students["lora"]), tmp_path / "diffusers")
    assert set(weights) == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert dict(merged.denoiser.config) == before
    assert merged.denoiser.time_embedding.cond_proj is None
    config = GenerateConfig(prompts=["a red cat"], student=students["lora"], seed=3)
    (path,) = draw(tiny_files, config, output=tmp_path / "images", device="cpu")
    # 20 steps, as `generate`; at diffusers' own default scale, which is 7.5.
    image, batches = passes_of(tmp_path / "diffusers", num_inference_steps=20)
    assert batches == [1] * 20
    assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(path))).max() <= 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_guard_against_two_passes(tmp_path: Path, kind: str) -> None:
    (make_xl_pipeline() if kind == "sdxl" else make_pipeline()).save_pretrained(tmp_path / "base")
    model = load(locate(str(tmp_path / "base")), device=CPU)
    write_diffusers_folder(model, FIXED, tmp_path / "guarded")
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
    for scale in (1.0, 7.5):
        image, batches = passes_of(tmp_path / "guarded", guidance_scale=scale, negative_prompt="blurry", **options)
        assert batches == [1, 1]
        if scale == 1.0:
            first = image
    assert image == first
    # What the guard is for: the same weights without it make two passes.
    _, batches = passes_of(tmp_path / "base", guidance_scale=7.5, **options)
    assert batches == [2, 2]
    with pytest.raises(InputError, match="guidance"):
        locate(str(tmp_path / "guarded"))


def test_a_student_that_takes_its_guidance(tiny: Model, tmp_path: Path) -> None:
    """Its own input is kept, and the card says what to pass."""
    projection = add_guidance_embedding(tiny.denoiser, 8)
    torch.nn.init.normal_(projection.weight)
    student = replace(FIXED, guidance=4.0, guidance_range=(2.0, 6.0))
    write_diffusers_folder(tiny, student, tmp_path / "made")
    assert tiny.denoiser.time_embedding.cond_proj is projection
    images = [passes_of(tmp_path / "made", guidance_scale=scale, num_inference_steps=2) for scale in (2.0, 6.0)]
    assert images[0][1] == images[1][1] == [1, 1]
    assert images[0][0] != images[1][0]
    card = (tmp_path / "made/README.md").read_text()
    assert "Pass any from 2 to 6" in card
    assert "guidance_scale=4)" in card


def test_what_a_folder_says_and_does_not_say(tiny_folder: Path, tmp_path: Path) -> None:
    model = load(locate(str(tiny_folder)), device=CPU)
    base = tmp_path / "base"
    base.mkdir()
    (base / "LICENSE.md").write_text("as you like")
    (base / "README.md").write_text(
        "---\nlicense: openrail++\nlicense_link: there\ntags: [a]\n---\n# Base\nlicense: no\n"
    )
    model = replace(model, files=replace(model.files, folder=base))
    write_diffusers_folder(model, replace(FIXED, negative_prompt="blurry"), tmp_path / "made")
    assert (tmp_path / "made/LICENSE.md").read_text() == "as you like"
    card = (tmp_path / "made/README.md").read_text()
    assert card.startswith("---\nlicense: openrail++\nlicense_link: there\nlibrary_name: diffusers\n")
    assert f"`time_cond_proj_dim` {GUARD_WIDTH}" in card
    assert "distilled with the negative prompt 'blurry'" in card
    said = "".join(path.read_text() for path in (tmp_path / "made").rglob("*.json"))
    assert str(tiny_folder) not in said + card
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "made/scheduler")
    assert (scheduler.config.clip_sample, scheduler.config.prediction_type) == (False, "epsilon")


def test_a_transformers_position_embeddings_are_of_the_size_that_it_was_trained_at(
    tiny_files: ModelFiles, tmp_path: Path
) -> None:
    make_sd3_pipeline(t5=False).save_pretrained(tmp_path / "sd3")
    for files, size in ((locate(str(tmp_path / "sd3")), 8), (tiny_files, 12)):
        model = load(files, device=CPU)
        model.denoiser.register_to_config(sample_size=12)
        folder = tmp_path / files.family.name
        write_diffusers_folder(model, Distilled(method="lora", guidance=3.0), folder)
        assert read_json(folder / files.family.denoiser / "config.json")["sample_size"] == size
