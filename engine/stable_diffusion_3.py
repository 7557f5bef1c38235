"""Stable Diffusion 3 and 3.5: MMDiT, flow matching, two CLIP text encoders and T5, which a folder may leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline

from .checks import ComponentConfigs, check_clip_text, check_vae, positive_ints
from .conditions import PromptEmbeds
from .errors import InputError
from .family import ATTENTION, JOINT_ATTENTION, Family
from .schedulers import shift_of_size

T5_TOKENS = 256
"""Tokens of T5, as the stock pipeline takes them by default."""

FEED_FORWARD = ("net.0.proj", "net.2")
CLIPS = ("text_encoder", "text_encoder_2")

PATCH = 2
"""Side of a patch, in latents, that the stock pipeline counts tokens by."""


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    name = "stable-diffusion-3"
    pipeline_class = StableDiffusion3Pipeline
    denoiser = "transformer"
    denoiser_class = SD3Transformer2DModel
    text_encoders = (*CLIPS, "text_encoder_3")
    exported_text_encoders = CLIPS
    optional_components = ("text_encoder_3", "tokenizer_3")
    flow = True
    targets: ClassVar = {
        "attention": (*ATTENTION, *JOINT_ATTENTION),
        "transformer": (*ATTENTION, *JOINT_ATTENTION, *FEED_FORWARD),
        "all": (
            *(*ATTENTION, *JOINT_ATTENTION, *FEED_FORWARD),
            *("linear", "linear_1", "linear_2", "context_embedder", "proj", "proj_out"),
        ),
    }

    @property
    def component_classes(self) -> dict[str, tuple[str, ...]]:
        return {
            "transformer": ("SD3Transformer2DModel",),
            "vae": ("AutoencoderKL", "AutoencoderTiny"),
            **dict.fromkeys(CLIPS, ("CLIPTextModelWithProjection",)),
            "text_encoder_3": ("T5EncoderModel",),
            **dict.fromkeys(self.tokenizers[:2], ("CLIPTokenizer", "CLIPTokenizerFast")),
            "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
            "scheduler": (),
        }

    def checks(self, components: ComponentConfigs) -> dict[str, Callable[[], None]]:
        def transformer() -> None:
            config = components["transformer"]
            channels = positive_ints(config, "in_channels", "out_channels")
            channels += positive_ints(components["vae"], "latent_channels")
            size, patch = positive_ints(config, "sample_size", "patch_size")
            if size % patch:
                raise InputError(f"sample_size is {size}: it must be a multiple of patch_size, {patch}")
            if components["scheduler"].get("use_dynamic_shifting") and patch != PATCH:
                raise InputError(f"patch_size is {patch}: with use_dynamic_shifting it must be {PATCH}")
            if config["pos_embed_max_size"] is not None:
                positive_ints(config, "pos_embed_max_size")
            if (most := self.largest_side(config)) and size > most:
                raise InputError(f"sample_size is {size}: it must be at most {most}, pos_embed_max_size × patch_size")
            if len(set(channels)) > 1:
                raise InputError(f"transformer and VAE have {', '.join(map(str, channels))} channels, not all the same")
            pooled = sum(positive_ints(components[name], "projection_dim")[0] for name in CLIPS)
            if config["pooled_projection_dim"] != pooled:
                raise InputError(f"pooled_projection_dim is {config['pooled_projection_dim']!r}, not CLIP's {pooled}")
            width = config["joint_attention_dim"]
            if (t5 := components.get("text_encoder_3")) is not None and t5.get("d_model") != width:
                raise InputError(f"joint_attention_dim is {width!r}, where T5 gives {t5.get('d_model')!r}")
            if (clip := sum(positive_ints(components[name], "hidden_size")[0] for name in CLIPS)) > width:
                raise InputError(f"joint_attention_dim is {width!r}, less than the {clip} that CLIP gives")

        def tokenizer_3() -> None:
            if "text_encoder_3" in components and "tokenizer_3" not in components:
                raise InputError("model_index.json leaves it out, but not text_encoder_3, which needs it")

        return {
            "transformer": transformer,
            "vae": lambda: check_vae(components["vae"], pipeline="StableDiffusion3Pipeline", shifts=True),
            "tokenizer_3": tokenizer_3,
            "tokenizer": lambda: check_clip_text(components, CLIPS, self.tokenizers[:2]),
        }

    def max_tokens(self, pipeline: DiffusionPipeline, tokenizer: str) -> int:
        """See `Family.max_tokens`; T5's own length is not used."""
        return T5_TOKENS if tokenizer == "tokenizer_3" else super().max_tokens(pipeline, tokenizer)

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=pipeline.device, do_classifier_free_guidance=False
        )
        return PromptEmbeds(encoder_hidden_states=hidden, pooled_projections=pooled)

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        tokens = pipeline.tokenizer.model_max_length + T5_TOKENS
        config = pipeline.transformer.config
        return {
            "encoder_hidden_states": (tokens, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    def forward(self, denoiser: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        arguments = {"hidden_states" if name == "sample" else name: tensor for name, tensor in inputs.items()}
        prediction: torch.Tensor = denoiser(**arguments, return_dict=False)[0]
        return prediction

    def largest_side(self, denoiser_config: dict[str, Any]) -> int | None:
        """See `Family.largest_side`; positions are cut from a table, where there is one."""
        positions: int | None = denoiser_config["pos_embed_max_size"]
        return positions and positions * denoiser_config["patch_size"]

    def timesteps(self, scheduler_config: Any, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        """See `Family.timesteps`."""
        _, height, width = latent_shape
        return shift_of_size(scheduler_config, (height // PATCH) * (width // PATCH), max_shift=1.16)
