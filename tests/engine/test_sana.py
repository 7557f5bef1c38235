"""Sana alone: its prompts' instruction and length, Euler on the folder's DPM-Solver, and folders that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.cli import app
from boostdiff.engine.conditions import TextEmbeddings
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.model import Model, load, locate
from boostdiff.engine.prompts import truncation_note
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import generate, initial_noise, sample, to_uint8
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import CPU, PROMPTS
from tiny_sana import STOCK, make_sana_pipeline
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sana") / "model"
    make_sana_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(locate(str(folder)), device=CPU)


def encoded(model: Model, prompt: str) -> TextEmbeddings:
    return model.family.encode(model.pipeline, [prompt], negative_prompt="")


def test_euler_is_the_stock_pipelines_of_the_same_shift(model: Model) -> None:
    images = generate(
        model,
        GuidedDenoiser(TorchRunner(model.denoiser), 4.0),
        text=encoded(model, PROMPTS[0]),
        make_scheduler=lambda: model.make_scheduler("euler"),
        steps=4,
        seed=5,
    )
    own, model.pipeline.scheduler = model.pipeline.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)
    generator = torch.Generator().manual_seed(5)
    (stock,) = model.pipeline(
        PROMPTS[0], num_inference_steps=4, guidance_scale=4.0, generator=generator, **STOCK
    ).images
    model.pipeline.scheduler = own
    got = to_uint8(images)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - np.asarray(stock).astype(int)).max() <= 1


@pytest.mark.parametrize("euler", [True, False])
def test_latents_stay_in_float32_between_steps_as_in_the_stock_pipeline(folder: Path, euler: bool) -> None:
    model = load(locate(str(folder)), device=CPU, dtype=torch.bfloat16)
    noise = initial_noise(model.latent_shape, count=1, seed=5)
    assert model.family.latents_dtype(model.denoiser.dtype) == noise.dtype
    if euler:
        model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    got = sample(
        GuidedDenoiser(TorchRunner(model.denoiser), 4.0),
        text=encoded(model, PROMPTS[0]),
        noise=noise,
        scheduler=model.make_scheduler("euler" if euler else "dpm++"),
        steps=4,
    )
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "latents": noise, "output_type": "latent", **STOCK}
    torch.testing.assert_close(got, model.pipeline(PROMPTS[0], **options).images, atol=1e-5, rtol=0)


def test_prompts_are_cut_where_it_is_said(model: Model) -> None:
    # 300 tokens: the start, and words of one each, as the space before one belongs to it.
    longest = " ".join(["d"] * 299)
    texts = [longest, f"{longest} a", f"{longest} c"]
    assert [truncation_note(model.pipeline, [text]) is None for text in texts] == [True, False, False]
    used, one, other = (encoded(model, text).conditional.tensors() for text in texts)
    assert torch.equal(one["encoder_hidden_states"], other["encoder_hidden_states"])
    assert torch.equal(used["encoder_hidden_states"], one["encoder_hidden_states"])
    assert used["encoder_attention_mask"].all()
    shorter = encoded(model, longest[:-2]).conditional.tensors()
    assert shorter["encoder_attention_mask"].sum() == 299


def test_latents_of_images_are_the_vaes(model: Model) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.family.encode_latents(model.pipeline.vae, images)
    assert latents.shape == (2, *model.latent_shape)
    decoded = model.family.denormalized(latents, model.pipeline.vae)
    assert torch.allclose(decoded, model.pipeline.vae.encode(images).latent, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is true: it is distilled already"),
        ("transformer", {"caption_channels": 48}, "caption_channels is 48, where Gemma gives 32"),
        ("vae", {"latent_channels": 8}, "takes 4 channels and gives 4, the VAE has 8"),
        ("scheduler", {"prediction_type": "epsilon"}, "prediction_type 'epsilon' is not supported"),
        ("scheduler", {"flow_shift": 0.0}, "shift 0.0 can't be used"),
    ],
)
def test_folders_that_cannot_be_used(
    folder: Path, tmp_path: Path, name: str, values: dict[str, Any], said: str
) -> None:
    for part in ("transformer", "vae", "scheduler", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        for path in (folder / part).glob("*config.json"):
            write_json(tmp_path / part / path.name, read_json(path) | (values if part == name else {}))
    write_json(tmp_path / "model_index.json", read_json(folder / "model_index.json"))
    result = CliRunner().invoke(app, ["distill", "--dry-run", "--model", str(tmp_path)])
    assert said in str(result.exception)
