"""What Chroma alone has: the mask of its text's tokens, and folders that its pipeline would not take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.model import Model, load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import initial_noise, sampling
from diffusers import ChromaPipeline
from tiny import CPU, PROMPTS
from tiny_chroma import make_chroma_pipeline

LONGEST = max(PROMPTS, key=len)
DIFFERENT = ["a", LONGEST, "two birds"]
"""Prompts of 1, many and 2 words: all are padded to one length."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chroma")
    make_chroma_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> Model:
    return load(locate(str(folder)), device=CPU)


def last_latents(model: Model, prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
    text = model.family.encode(model.pipeline, prompts, negative_prompt="a hill")
    denoiser = GuidedDenoiser(TorchRunner(model.denoiser), 4.0)
    with torch.inference_mode():
        *_, last = sampling(denoiser, text=text, noise=noise, scheduler=model.make_scheduler("euler"), steps=2)
    return last


def test_padded_tokens_count_as_in_the_stock_pipeline_whatever_else_is_in_the_batch(folder: Path, model: Model) -> None:
    noise = initial_noise(model.latent_shape, count=len(DIFFERENT), seed=3)
    together = last_latents(model, DIFFERENT, noise)
    for i, prompt in enumerate(DIFFERENT):
        torch.testing.assert_close(last_latents(model, [prompt], noise[i : i + 1]), together[i : i + 1])
    pipeline = ChromaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline(
        DIFFERENT,
        negative_prompt=["a hill"] * len(DIFFERENT),
        guidance_scale=4.0,
        num_inference_steps=2,
        height=16,
        width=16,
        latents=model.family.packed(noise),
        output_type="latent",
    ).images
    torch.testing.assert_close(together, model.family.unpacked(packed, 8, 8))


def test_the_mask_decides(model: Model) -> None:
    inputs = model.family.example_inputs(model.pipeline, batch=1)
    plain = model.family.forward(model.denoiser, inputs)
    inputs["encoder_attention_mask"][:, 8:] = 0
    assert not torch.allclose(model.family.forward(model.denoiser, inputs), plain, atol=1e-4)


def test_checkpointed_blocks_keep_the_mask(model: Model) -> None:
    inputs = model.family.example_inputs(model.pipeline, batch=2)
    inputs["encoder_attention_mask"][:, 8:] = 0
    weight = model.denoiser.x_embedder.weight.requires_grad_()
    results = []
    for prepare in (model.denoiser.disable_gradient_checkpointing, model.denoiser.enable_gradient_checkpointing):
        prepare()
        prediction = model.family.forward(model.denoiser, inputs)
        (gradient,) = torch.autograd.grad(prediction.square().sum(), weight)
        results.append((prediction.detach(), gradient))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("part", "changes", "complaint"),
    [
        ("transformer", {"joint_attention_dim": 48}, "joint_attention_dim is 48, where T5 gives 32"),
        ("transformer", {"in_channels": 12}, "patch_size is 1, with 12 in and 12 out"),
        ("transformer", {"axes_dims_rope": [4, 4, 4]}, "must be attention_head_dim, 16"),
        ("transformer", {"sample_size": 7}, "sample_size is 7: it must be a multiple of 2"),
        ("vae", {"shift_factor": None}, "there is no shift_factor"),
        ("scheduler", {"use_karras_sigmas": True}, "use_karras_sigmas True is not supported"),
    ],
)
def test_a_folder_that_the_pipeline_would_not_take_is_refused(
    folder: Path, tmp_path: Path, part: str, changes: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "model").mkdir()
    for source in folder.rglob("*.json"):
        target = tmp_path / "model" / source.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        changed = source.relative_to(folder) == Path(part) / name
        write_json(target, read_json(source) | (changes if changed else {}))
    with pytest.raises(InputError, match=complaint):
        locate(str(tmp_path / "model"), weights=False)
