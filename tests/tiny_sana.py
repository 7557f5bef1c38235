"""A tiny Sana, randomly initialised."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tiny import PROMPTS
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

STOCK = {"height": 32, "width": 32, "use_resolution_binning": False}
"""Arguments of the stock pipeline: it draws 1024 pixels by default, and bins sizes by those of public models."""


def make_gemma(width: int) -> tuple[GemmaTokenizer, Gemma2Model]:
    """A tokenizer of letters and pairs of them, and a tiny Gemma of this width."""
    letters = sorted({*"".join(PROMPTS), *"abcdefghijklmnopqrstuvwxyz", "▁"} - {" "})
    pairs = [("▁", letter) for letter in letters if letter != "▁"]
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    pieces = [*special, *letters, *("".join(pair) for pair in pairs)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=pairs, add_bos_token=True)
    return tokenizer, Gemma2Model(
        Gemma2Config(
            vocab_size=len(pieces),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
        )
    )


def make_sana_pipeline(seed: int = 0, *, euler: bool = False, **changes: Any) -> SanaPipeline:
    """A randomly initialised Sana, tiny in every part; `changes` are the transformer's."""
    torch.manual_seed(seed)
    tokenizer, text_encoder = make_gemma(32)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 32,
        "sample_size": 8,
    }
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(**config | changes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
        if euler
        else DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    )
