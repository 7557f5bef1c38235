"""Chroma: FLUX's transformer without its guidance input, packed latents, flow matching, T5 as its one text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, DiffusionPipeline
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock

from .checks import ComponentConfigs, check_vae, positive_ints
from .conditions import PromptEmbeds
from .errors import InputError
from .family import ATTENTION, JOINT_ATTENTION
from .packed_latents import PATCH, PackedLatents

TEXT_TOKENS = 512
"""Tokens that the stock pipeline pads every prompt to."""

FEED_FORWARD = ("net.0.proj", "net.2", "proj_mlp", "proj_out")
EMBEDDERS = ("x_embedder", "context_embedder", "in_proj", "linear_1", "linear_2", "out_proj")


class Chroma(PackedLatents):
    """Chroma."""

    name = "chroma"
    pipeline_class = ChromaPipeline
    denoiser = "transformer"
    denoiser_class = ChromaTransformer2DModel
    text_encoders = ("text_encoder",)
    flow = True
    half = torch.bfloat16
    targets: ClassVar = {
        "attention": (*ATTENTION, *JOINT_ATTENTION),
        "transformer": (*ATTENTION, *JOINT_ATTENTION, *FEED_FORWARD),
        "all": (*ATTENTION, *JOINT_ATTENTION, *FEED_FORWARD, *EMBEDDERS),
    }

    @property
    def component_classes(self) -> dict[str, tuple[str, ...]]:
        return {
            "transformer": ("ChromaTransformer2DModel",),
            "vae": ("AutoencoderKL", "AutoencoderTiny"),
            "text_encoder": ("T5EncoderModel",),
            "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
            "scheduler": (),
        }

    def checks(self, components: ComponentConfigs) -> dict[str, Callable[[], None]]:
        def transformer() -> None:
            config = components["transformer"]
            inputs, patch = positive_ints(config, "in_channels", "patch_size")
            outputs = config.get("out_channels") or inputs
            (latents,) = positive_ints(components["vae"], "latent_channels")
            if patch != 1 or not inputs == outputs == PATCH**2 * latents:
                raise InputError(
                    f"patch_size is {patch}, with {inputs} in and {outputs} out, not 1 and {PATCH**2 * latents}"
                )
            if (given := components["text_encoder"].get("d_model")) != (width := config["joint_attention_dim"]):
                raise InputError(f"joint_attention_dim is {width!r}, where T5 gives {given!r}")
            axes, (head,) = config["axes_dims_rope"], positive_ints(config, "attention_head_dim")
            if sum(axes) != head:
                raise InputError(f"axes_dims_rope is {axes!r}, whose sum must be attention_head_dim, {head}")
            (size,) = positive_ints({"sample_size": self.default_side} | config, "sample_size")
            if size % PATCH:
                raise InputError(f"sample_size is {size}: it must be a multiple of {PATCH}")

        def vae() -> None:
            check_vae(components["vae"], pipeline="ChromaPipeline", shifts=True)
            if components["vae"].get("shift_factor") is None:
                raise InputError("there is no shift_factor, which ChromaPipeline needs: it may be 0")

        return {"vae": vae, "transformer": transformer}

    def max_tokens(self, pipeline: DiffusionPipeline, tokenizer: str) -> int:
        """See `Family.max_tokens`; the tokenizer's own length is not used."""
        return TEXT_TOKENS

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        hidden, _, mask, *_ = pipeline.encode_prompt(prompts, device=pipeline.device, do_classifier_free_guidance=False)
        return PromptEmbeds(encoder_hidden_states=hidden, encoder_attention_mask=mask.long())

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        width = pipeline.transformer.config["joint_attention_dim"]
        return {"encoder_hidden_states": (TEXT_TOKENS, width), "encoder_attention_mask": (TEXT_TOKENS,)}

    def forward(self, denoiser: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        batch, rows, columns = sample.shape[0], sample.shape[2] // PATCH, sample.shape[3] // PATCH
        # Numbers, as the stock pipeline passes it: what attention adds to its scores, 1 where a token counts.
        mask = inputs["encoder_attention_mask"].to(sample.dtype)
        mask = torch.cat([mask, mask.new_ones(batch, rows * columns)], dim=1)
        with _mended(denoiser, mask):
            prediction = denoiser(
                hidden_states=self.packed(sample),
                timestep=inputs["timestep"].to(sample.dtype) / 1000,
                encoder_hidden_states=text,
                txt_ids=sample.new_zeros(text.shape[1], 3),
                img_ids=ChromaPipeline._prepare_latent_image_ids(batch, rows, columns, sample.device, sample.dtype),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return self.unpacked(prediction, *sample.shape[2:])


@contextmanager
def _mended(denoiser: Any, mask: torch.Tensor) -> Iterator[None]:
    """Around two faults of diffusers 0.42: an exported batch is constant, and checkpointed blocks lose the mask."""
    embedding, checkpoint = denoiser.time_text_embed, denoiser._gradient_checkpointing_func

    def embed(timestep: torch.Tensor) -> torch.Tensor:  # as its `forward`, which makes a list as long as the batch
        sines = [embedding.time_proj(timestep), embedding.guidance_proj(torch.zeros_like(timestep))]
        layers = embedding.mod_proj.to(timestep.dtype).expand(timestep.shape[0], -1, -1)
        each = torch.cat(sines, dim=1).to(timestep.dtype)[:, None].expand(-1, layers.shape[1], -1)
        return torch.cat([each, layers], dim=-1)

    def with_mask(block: torch.nn.Module, *arguments: Any) -> Any:
        lost = isinstance(block, ChromaSingleTransformerBlock) and len(arguments) == 3
        return checkpoint(block, *arguments, *([mask] if lost else []))

    if torch.compiler.is_exporting():
        embedding.forward = embed
    denoiser._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        embedding.__dict__.pop("forward", None)
        denoiser._gradient_checkpointing_func = checkpoint
