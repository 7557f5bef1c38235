"""Qwen-Image: MMDiT on packed latents, flow matching, a language model as text encoder, norm-preserving guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, QwenImagePipeline, QwenImageTransformer2DModel

from .checks import ComponentConfigs, check_vae, positive_ints
from .conditions import PromptEmbeds
from .errors import InputError
from .family import ATTENTION, JOINT_ATTENTION
from .guidance import combine
from .packed_latents import PATCH, PackedLatents
from .qwen_rotary import rotary_for_graphs

TEXT_TOKENS = 512
"""Tokens of a prompt that the stock pipeline takes by default."""

FEED_FORWARD = ("net.0.proj", "net.2")
PLAIN = {"guidance_embeds": False, "zero_cond_t": False, "use_additional_t_cond": False, "use_layer3d_rope": False}
"""Settings of transformers that take more than this pipeline gives: of distilled, of editing and of layered models."""


class QwenImage(PackedLatents):
    """Qwen-Image."""

    name = "qwen-image"
    pipeline_class = QwenImagePipeline
    denoiser = "transformer"
    denoiser_class = QwenImageTransformer2DModel
    text_encoders = ("text_encoder",)
    flow = True
    half = torch.bfloat16
    video_vae = True
    text_lengths = (4, 128, TEXT_TOKENS)
    targets: ClassVar = {
        "attention": (*ATTENTION, *JOINT_ATTENTION),
        "transformer": (*ATTENTION, *JOINT_ATTENTION, *FEED_FORWARD),
        "all": (
            *(*ATTENTION, *JOINT_ATTENTION, *FEED_FORWARD),
            *("img_mod.1", "txt_mod.1", "img_in", "txt_in", "linear", "linear_1", "linear_2", "proj_out"),
        ),
    }

    @property
    def component_classes(self) -> dict[str, tuple[str, ...]]:
        return {
            "transformer": ("QwenImageTransformer2DModel",),
            "vae": ("AutoencoderKLQwenImage",),
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
            "scheduler": (),
        }

    def checks(self, components: ComponentConfigs) -> dict[str, Callable[[], None]]:
        def transformer() -> None:
            config = components["transformer"]
            for name, value in PLAIN.items():
                if config.get(name) != value:
                    raise InputError(f"{name} is {config[name]!r}: distilled, editing and layered models can't be used")
            inputs, outputs, patch = positive_ints(config, "in_channels", "out_channels", "patch_size")
            (latents,) = positive_ints(components["vae"], "z_dim")
            if patch != PATCH or inputs != PATCH**2 * latents or outputs != latents:
                raise InputError(
                    f"in_channels, out_channels and patch_size are {inputs}, {outputs} and {patch}, where squares of "
                    f"{PATCH} by {PATCH} latents of {latents} channels make {PATCH**2 * latents}, {latents} and {PATCH}"
                )
            text = components["text_encoder"]
            given, width = (text.get("text_config") or text).get("hidden_size"), config["joint_attention_dim"]
            if given != width:
                raise InputError(f"joint_attention_dim is {width!r}, where the text encoder gives {given!r}")
            (size,) = positive_ints({"sample_size": self.default_side} | config, "sample_size")
            if size % PATCH:
                raise InputError(f"sample_size is {size}: it must be a multiple of {PATCH}")

        def vae() -> None:
            config = components["vae"]
            if not config.get("latents_mean") or not config.get("latents_std"):
                raise InputError("latents_mean and latents_std must be one number per channel")
            positive_ints(config, "z_dim")
            same = {"scaling_factor": 1, "in_channels": config["input_channels"], "out_channels": 3}
            check_vae(config | same | {"latent_channels": config["z_dim"]}, pipeline=self.name, normalizes=True)

        return {"vae": vae, "transformer": transformer}

    def max_tokens(self, pipeline: DiffusionPipeline, tokenizer: str) -> int:
        """See `Family.max_tokens`; the tokenizer's own length is the language model's."""
        return TEXT_TOKENS

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        hidden, mask = pipeline.encode_prompt(prompts, device=pipeline.device, max_sequence_length=TEXT_TOKENS)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return PromptEmbeds(encoder_hidden_states=hidden, encoder_hidden_states_mask=mask)

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        width = pipeline.transformer.config["joint_attention_dim"]
        return {"encoder_hidden_states": (TEXT_TOKENS, width), "encoder_hidden_states_mask": (TEXT_TOKENS,)}

    def forward(self, denoiser: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sample = inputs["sample"]
        height, width = sample.shape[2:]
        arguments = {name: tensor for name, tensor in inputs.items() if name != "sample"}
        with rotary_for_graphs(denoiser):
            prediction = denoiser(
                **arguments | {"timestep": inputs["timestep"].to(sample.dtype) / 1000},
                hidden_states=self.packed(sample),
                img_shapes=[[(1, height // PATCH, width // PATCH)]],
                return_dict=False,
            )[0]
        return self.unpacked(prediction, height, width)

    def guide(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float | torch.Tensor
    ) -> torch.Tensor:
        """See `Family.guide`: equation (3), each token of it scaled to the norm that the conditional one has."""
        combined = self.packed(combine(unconditional, conditional, guidance_scale))
        norm = torch.norm(self.packed(conditional), dim=-1, keepdim=True)
        guided = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
        return self.unpacked(guided, *unconditional.shape[2:])

    def stock_guidance(self, guidance_scale: float) -> dict[str, Any]:
        """See `Family.stock_guidance`; without a negative prompt the stock pipeline guides at no scale."""
        return {"true_cfg_scale": guidance_scale, "negative_prompt": ""}

    def pixels_per_latent(self, vae_config: dict[str, Any]) -> int:
        return 2 ** len(vae_config["temperal_downsample"])
