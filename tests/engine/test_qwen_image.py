"""What is Qwen-Image's own: guidance of the prompt's norm, texts of several lengths, folders that are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.engine.conditions import PromptEmbeds
from boostdiff.engine.errors import InputError
from boostdiff.engine.model import Model, load, locate
from boostdiff.engine.runners import TorchRunner
from diffusers import QwenImagePipeline
from tiny import CPU, PROMPTS
from tiny_qwen_image import make_qwen_image_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "model"
    make_qwen_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(locate(str(folder)), device=CPU)


def test_latents_are_packed_as_the_stock_pipeline_packs_them(model: Model) -> None:
    latents = torch.randn(2, 4, 8, 12)
    packed = model.family.packed(latents)
    assert torch.equal(packed, QwenImagePipeline._pack_latents(latents, 2, 4, 8, 12))
    assert torch.equal(model.family.unpacked(packed, 8, 12), latents)


def test_guidance_keeps_the_norm_of_each_packed_token(model: Model) -> None:
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8).unbind()
    for scale in (4.0, torch.tensor([1.5, 3.0, 7.0])[:, None, None, None]):
        got = model.family.packed(model.family.guide(unconditional, conditional, scale))
        packed = model.family.packed(conditional)
        combined = model.family.packed(unconditional + scale * (conditional - unconditional))
        assert torch.allclose(got.norm(dim=-1), packed.norm(dim=-1))
        assert torch.allclose(torch.cosine_similarity(got, combined, dim=-1), torch.ones(3, 16))
    assert torch.allclose(model.family.guide(unconditional, conditional, 1.0), conditional, atol=1e-6)


@torch.inference_mode()
def test_a_batch_of_prompts_of_several_lengths_is_each_prompt_alone(model: Model) -> None:
    alone = [model.family.embed(model.pipeline, [prompt]) for prompt in (*PROMPTS, "")]
    together = model.family.embed(model.pipeline, [*PROMPTS, ""])
    lengths = together.tensors()["encoder_hidden_states_mask"].sum(dim=1)
    assert lengths.tolist() == [len(one.encoder_hidden_states[0]) for one in alone]
    assert len(set(lengths.tolist())) > 2
    latents, t = torch.randn(5, 4, 8, 8), torch.tensor(500.0)
    runner = TorchRunner(model.denoiser)
    expected = torch.cat([runner.denoise(z[None], t, one) for z, one in zip(latents, alone, strict=True)])
    for embeds in (together, PromptEmbeds.cat(alone)):
        assert torch.allclose(runner.denoise(latents, t, embeds), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is True"),
        ("transformer", {"sample_size": 9}, "sample_size is 9: it must be a multiple of 2"),
        ("transformer", {"joint_attention_dim": 24}, "joint_attention_dim is 24, where the text encoder gives 16"),
        ("transformer", {"in_channels": 4}, "in_channels, out_channels and patch_size are 4, 4 and 2"),
        ("vae", {"latents_std": None}, "latents_mean and latents_std"),
    ],
)
def test_folders_that_the_pipeline_would_read_otherwise_are_refused(
    folder: Path, tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    for path in folder.rglob("*.json"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    assert locate(str(tmp_path)).family.name == "qwen-image"
    path = tmp_path / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=f"{part}/config.json: .*{message}"):
        locate(str(tmp_path))
