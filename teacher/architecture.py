"""The networks of `emoji64`: the parts of Stable Diffusion, each as small as the data needs.

Latents are (4, 16, 16) (f = 4); captions are at most `MAX_TOKENS` tokens; betas are Stable Diffusion's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..engine.files import read_json, write_json

MAX_TOKENS = 24
VOCABULARY = 2560
TEXT_WIDTH = 128
TIMESTEPS = 1000
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": TIMESTEPS}


def make_vae() -> AutoencoderKL:
    """A 0.65M-parameter autoencoder, no attention: (3, 64, 64) to (4, 16, 16)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=64,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def make_unet() -> UNet2DConditionModel:
    """The noise predictor: three levels, cross-attention on the two larger ones."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 3, 5),
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
    )


def make_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with a byte-pair vocabulary trained on the captions."""
    blank = CLIPTokenizer(model_max_length=MAX_TOKENS)
    return blank.train_new_from_iterator(captions, vocab_size=VOCABULARY, show_progress=False)


def text_settings(tokenizer: CLIPTokenizer, *, layers: int) -> dict[str, Any]:
    """Settings of a CLIP text transformer, 128 wide."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text transformer of 3 layers, trained from scratch with the UNet."""
    return CLIPTextModel(CLIPTextConfig(**text_settings(tokenizer, layers=3)))


def save_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    flow: bool = False,
) -> None:
    """Write a stock `StableDiffusionPipeline` folder in FP16 safetensors; `flow`: its UNet is one of flow matching."""
    if flow:
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    else:
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    # Without a dtype argument diffusers loads its parts in float32, but transformers in what the config names.
    config = folder / "text_encoder" / "config.json"
    write_json(config, read_json(config) | {"dtype": "float32"})
