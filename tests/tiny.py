"""A tiny Stable Diffusion, randomly initialised, and what saves tests from making things twice."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.engine.files import read_json
from boostdiff.engine.student import read_student
from boostdiff.export.graph import onnx_from_part
from boostdiff.export.parts import Part
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from filelock import FileLock
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

PROMPTS = ("a red cat", "a blue dog on a hill", "two green birds", "a white fish")
CPU = torch.device("cpu")
ONNX_FROM_PART = "boostdiff.export.export.onnx_from_part"
"""What makes a graph, to be replaced by `graphs_of`."""


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of pytest-xdist's processes that needs it makes, for all of them."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def make_words() -> tuple[CLIPTokenizer, CLIPTextConfig]:
    """A tokenizer of `PROMPTS`, and a tiny text encoder's configuration for it."""
    tokenizer = CLIPTokenizer(model_max_length=16).train_new_from_iterator(PROMPTS, vocab_size=300)
    return tokenizer, CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_pipeline(seed: int = 0, *, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A randomly initialised Stable Diffusion, tiny in every part."""
    torch.manual_seed(seed)
    tokenizer, text_config = make_words()
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=4,
            cross_attention_dim=32,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_xl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """A randomly initialised Stable Diffusion XL, tiny in every part."""
    base = make_pipeline(seed)
    text_config = CLIPTextConfig(**base.text_encoder.config.to_dict() | {"hidden_size": 48, "projection_dim": 24})
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=24 + 6 * 8,
        cross_attention_dim=32 + 48,
    )
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


def make_t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A tokenizer of `PROMPTS` and single letters, and a tiny T5 encoder of this width."""
    words = dict.fromkeys(f"▁{word}" for prompt in PROMPTS for word in prompt.split())
    pieces = [*words, "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        *((piece, -1.0) for piece in pieces),
    ]
    config = T5Config(
        vocab_size=len(vocab), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False
    )
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512), T5EncoderModel(config)


def make_sd3_pipeline(seed: int = 0, *, t5: bool = True, **schedule: Any) -> StableDiffusion3Pipeline:
    """A randomly initialised Stable Diffusion 3, tiny in every part."""
    torch.manual_seed(seed)
    tokenizer, clip = make_words()
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(**clip.to_dict() | {"projection_dim": 16})) for _ in range(2)]
    tokenizer_3, text_encoder_3 = make_t5(64) if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | schedule),
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def with_another_unet(folder: Path, copy: Path, **changes: Any) -> Path:
    """A copy of a model's folder with a random UNet, of its own configuration but for these changes."""
    shutil.copytree(folder, copy)
    torch.manual_seed(0)
    config = read_json(folder / "unet/config.json") | changes
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    return copy


def graphs_of(engine: Path, *, fresh: Sequence[str] = ()) -> Callable[[Part, Path], None]:
    """In place of `onnx_from_part`, which takes many seconds: an engine's graphs, but for these parts."""

    def taken(part: Part, path: Path) -> None:
        if part.name in fresh:
            onnx_from_part(part, path)
            return
        half = next(part.module.parameters()).dtype == torch.float16
        name = "model.fp16.onnx" if half else "model.onnx"
        shutil.copy(engine / part.name / name, path)
        # The graph names the file of its weights.
        shutil.copy(engine / part.name / f"{name}.data", path.parent)

    return taken


def save_images(folder: Path, count: int = 5) -> None:
    """Plain grey PNGs of 30 by 20 pixels, captioned "picture 0" and so on in text files."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.full((20, 30, 3), 40 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}\n")


def few_step_copy(student: Path, folder: Path, steps: int) -> Path:
    """A student that says that it takes so many steps; its weights are of any number."""
    shutil.copytree(student, folder)
    replace(read_student(student), sampler="ddim", steps=steps, timestep_spacing="trailing").write(folder)
    return folder
