"""A tiny Qwen-Image, randomly initialised."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tiny import PROMPTS
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer


def make_qwen_image_pipeline(seed: int = 0, **schedule: Any) -> QwenImagePipeline:
    """A randomly initialised Qwen-Image, tiny in every part."""
    torch.manual_seed(seed)
    pipeline = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.0, 2.0],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            **{
                "use_dynamic_shifting": True,
                "base_shift": 0.5,
                "max_shift": 0.9,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            }
            | schedule
        ),
        text_encoder=None,
        tokenizer=None,
    )
    # As the pipeline takes it for granted, the template's words before the prompt are 34 tokens.
    words = [*PROMPTS, pipeline.prompt_template_encode.replace("<|im_start|>", "").replace("<|im_end|>", "")]
    tokenizer = Qwen2Tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = tokenizer.train_new_from_iterator(words, vocab_size=600)
    before = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    pipeline.register_modules(text_encoder=encoder, tokenizer=tokenizer)
    # As initialised, the text hardly matters.
    for weight in pipeline.transformer.parameters():
        weight.data *= 2.0
    # diffusers ignores it; its pipeline has one size, of 128 latents.
    pipeline.transformer.register_to_config(sample_size=8)
    return pipeline
