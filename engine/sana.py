"""Sana: a transformer of linear attention, flow matching, Gemma as text encoder, a VAE of 32 pixels per latent."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SanaPipeline, SanaTransformer2DModel

from .checks import ComponentConfigs, check_vae, positive_ints
from .conditions import PromptEmbeds
from .errors import InputError
from .family import ATTENTION, Family

TEXT_OPTIONS = ("clean_caption", "max_sequence_length", "complex_human_instruction")
"""Arguments of the stock pipeline that decide how a prompt is encoded: its defaults are taken."""

# Not `conv_depth`, whose groups of one channel have no low rank.
FEED_FORWARD = ("conv_inverted", "conv_point")


def _text_options() -> dict[str, Any]:
    parameters = inspect.signature(SanaPipeline.__call__).parameters
    return {name: parameters[name].default for name in TEXT_OPTIONS}


class Sana(Family):
    """Sana 0.6B to 4.8B, of 512 to 4096 pixels; not Sana Sprint, which is distilled already."""

    name = "sana"
    pipeline_class = SanaPipeline
    denoiser = "transformer"
    denoiser_class = SanaTransformer2DModel
    text_encoders = ("text_encoder",)
    flow = True
    half = torch.bfloat16
    float32_latents = True
    targets: ClassVar = {
        "attention": ATTENTION,
        "transformer": (*ATTENTION, *FEED_FORWARD),
        "all": (*ATTENTION, *FEED_FORWARD, "linear", "linear_1", "linear_2", "patch_embed.proj", "proj_out"),
    }

    @property
    def component_classes(self) -> dict[str, tuple[str, ...]]:
        return {
            "transformer": ("SanaTransformer2DModel",),
            "vae": ("AutoencoderDC",),
            "text_encoder": ("Gemma2Model",),
            "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
            "scheduler": (),
        }

    def checks(self, components: ComponentConfigs) -> dict[str, Callable[[], None]]:
        def transformer() -> None:
            config = components["transformer"]
            positive_ints(config, "sample_size", "patch_size")
            inputs, outputs, heads, width = positive_ints(
                config, "in_channels", "out_channels", "num_attention_heads", "attention_head_dim"
            )
            (latents,) = positive_ints(components["vae"], "latent_channels")
            if inputs != latents or outputs not in (inputs, 2 * inputs):
                raise InputError(
                    f"the transformer takes {inputs} channels and gives {outputs}, the VAE has {latents}: "
                    "it must give as many as both have, or twice as many with a variance"
                )
            if components["scheduler"].get("use_dynamic_shifting"):
                raise InputError("the scheduler's use_dynamic_shifting can't be used: Sana's pipeline gives no shift")
            if config["guidance_embeds"]:
                raise InputError("guidance_embeds is true: it is distilled already")
            if config["cross_attention_dim"] != heads * width:
                raise InputError(
                    f"cross_attention_dim is {config['cross_attention_dim']!r}, not the {heads * width} of its heads"
                )
            (given,) = positive_ints(components["text_encoder"], "hidden_size")
            if config["caption_channels"] != given:
                raise InputError(f"caption_channels is {config['caption_channels']!r}, where Gemma gives {given}")

        return {"transformer": transformer, "vae": lambda: check_vae(components["vae"], pipeline="SanaPipeline")}

    def max_tokens(self, pipeline: DiffusionPipeline, tokenizer: str) -> int:
        """See `Family.max_tokens`; the tokenizer's own length is not used."""
        tokens: int = _text_options()["max_sequence_length"]
        return tokens

    def encoded_tokens(self, pipeline: DiffusionPipeline, text_encoder: str) -> int:
        """See `Family.encoded_tokens`; the instruction stands before every prompt."""
        instruction = "\n".join(_text_options()["complex_human_instruction"])
        return len(pipeline.tokenizer.encode(instruction)) + self.max_tokens(pipeline, "tokenizer") - 2

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        return self._embed(pipeline, prompts, **_text_options())

    def embed_negative(self, pipeline: DiffusionPipeline, prompt: str) -> PromptEmbeds:
        """See `Family.embed_negative`; the stock pipeline gives a negative prompt no instruction."""
        return self._embed(pipeline, [prompt], **_text_options() | {"complex_human_instruction": None})

    def _embed(self, pipeline: DiffusionPipeline, prompts: list[str], **options: Any) -> PromptEmbeds:
        hidden, mask, _, _ = pipeline.encode_prompt(prompts, False, device=pipeline.device, **options)
        return PromptEmbeds(encoder_hidden_states=hidden, encoder_attention_mask=mask)

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        tokens = self.max_tokens(pipeline, "tokenizer")
        return {
            "encoder_hidden_states": (tokens, pipeline.transformer.config["caption_channels"]),
            "encoder_attention_mask": (tokens,),
        }

    def forward(self, denoiser: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        scale: float = denoiser.config["timestep_scale"]  # type: ignore[index, assignment]
        sample, mask = inputs["sample"], inputs["encoder_attention_mask"]
        text = inputs["encoder_hidden_states"]
        prediction: torch.Tensor = denoiser(
            sample.to(text.dtype),
            encoder_hidden_states=text,
            # Of the latents' batch, as an exporter must be told.
            encoder_attention_mask=mask.reshape(sample.shape[0], mask.shape[1]),
            timestep=inputs["timestep"] * scale,
            return_dict=False,
        )[0]
        # The other half, where there is one, is the variance.
        return prediction[:, : sample.shape[1]].to(sample.dtype)

    def stock_guidance(self, guidance_scale: float) -> dict[str, Any]:
        return super().stock_guidance(guidance_scale) | {"use_resolution_binning": False}

    def pixels_per_latent(self, vae_config: dict[str, Any]) -> int:
        return 2 ** (len(vae_config.get("encoder_block_out_channels", range(6))) - 1)

    def encode_latents(self, vae: Any, images: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = vae.encode(images.to(vae.device, vae.dtype), return_dict=False)[0].float()
        return latents * vae.config["scaling_factor"]
