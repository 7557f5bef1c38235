"""Stable Diffusion 1.x, 2.x and XL: UNets, CLIP text encoders, variance-preserving noise schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from packaging.version import InvalidVersion, Version

from .checks import ComponentConfigs, check_clip_text, check_unet, check_vae
from .conditions import PromptEmbeds
from .errors import InputError
from .family import ATTENTION, Family

FEED_FORWARD = ("proj_in", "proj_out", "net.0.proj", "net.2")
RESIDUAL = ("conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "linear_1", "linear_2")

NUM_TIME_IDS = 6
"""Numbers in SDXL's `time_ids`."""

PLAIN_INPUTS = ("sample", "timestep", "encoder_hidden_states", "timestep_cond")


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder."""

    name = "stable-diffusion"
    pipeline_class = StableDiffusionPipeline
    denoiser = "unet"
    denoiser_class = UNet2DConditionModel
    text_encoders: tuple[str, ...] = ("text_encoder",)
    exported_text_encoders = text_encoders
    load_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}
    takes_more = True
    text_chunks = True
    targets: ClassVar = {
        "attention": ATTENTION,
        "transformer": (*ATTENTION, *FEED_FORWARD),
        "all": (*ATTENTION, *FEED_FORWARD, *RESIDUAL),
    }

    @property
    def component_classes(self) -> dict[str, tuple[str, ...]]:
        classes = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
        return {
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL", "AutoencoderTiny"),
            **{name: classes[name] for name in self.text_encoders},
            **dict.fromkeys(self.tokenizers, ("CLIPTokenizer", "CLIPTokenizerFast")),
            # `schedulers.check_schedule` says why others are refused.
            "scheduler": (),
        }

    def checks(self, components: ComponentConfigs) -> dict[str, Callable[[], None]]:
        pipeline = self.pipeline_class.__name__

        def unet() -> None:
            check_unet(components, self.text_encoders)
            self.check_added_conditions(components)
            # Refuses a version that is none.
            self.denoiser_config(components["unet"])

        return {
            "unet": unet,
            "vae": lambda: check_vae(components["vae"], pipeline=pipeline, normalizes=self.normalizes_latents),
            "tokenizer": lambda: check_clip_text(components, self.text_encoders, self.tokenizers),
        }

    def check_added_conditions(self, components: ComponentConfigs) -> None:
        """Refuse a UNet that takes other conditions beside the text embedding than `embed` gives.

        "text" is an embedding of the text that is there anyway.
        """
        if (added := components["unet"].get("addition_embed_type")) not in (None, "text"):
            raise InputError(f"addition_embed_type is {added!r}, a condition that {self.name} does not have")

    def denoiser_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.denoiser_config`; the stock pipeline takes a size below 64 of diffusers before 0.9 for a mistake.

        Raises:
            InputError: the version of diffusers is none.
        """
        size, saved_by = config.get("sample_size"), config.get("_diffusers_version", "0.9")
        try:
            before = Version(saved_by).release < (0, 9)
        except (TypeError, InvalidVersion):
            raise InputError(f"_diffusers_version is {saved_by!r}: it must be a version") from None
        return config | ({"sample_size": 64} if before and isinstance(size, int) and size < 64 else {})

    def scheduler_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.scheduler_config`; the stock pipeline sets `steps_offset` to 1."""
        return config | ({"steps_offset": 1} if "steps_offset" in config else {})

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        embeddings, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
        return PromptEmbeds(encoder_hidden_states=embeddings)

    def text_shape(self, pipeline: DiffusionPipeline) -> tuple[int, int]:
        """Tokens and width of one prompt's embedding."""
        width = sum(getattr(pipeline, name).config.hidden_size for name in self.text_encoders)
        return pipeline.tokenizer.model_max_length, width

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": self.text_shape(pipeline)}

    def forward(self, denoiser: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        arguments: dict[str, Any] = {name: inputs[name] for name in PLAIN_INPUTS if name in inputs}
        # diffusers concatenates text_embeds with sines in FP32: torch promotes, an exported graph would not.
        added = {
            name: tensor.float() if name == "text_embeds" else tensor
            for name, tensor in inputs.items()
            if name not in PLAIN_INPUTS
        }
        prediction: torch.Tensor = denoiser(**arguments, added_cond_kwargs=added or None, return_dict=False)[0]
        return prediction

    def latent_multiple(self, denoiser_config: dict[str, Any], *, exported: bool = False) -> int:
        """See `Family.latent_multiple`; each block of a UNet but the last halves them."""
        return 2 ** (len(denoiser_config["block_out_channels"]) - 1) if exported else 1


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL's base model: two text encoders, pooled embeddings and size conditions."""

    name = "stable-diffusion-xl"
    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    exported_text_encoders = text_encoders
    upcast_vae = True
    normalizes_latents = True
    load_options: ClassVar = {"add_watermarker": False}

    def denoiser_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.denoiser_config`; the stock pipeline changes nothing."""
        return config

    def scheduler_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.scheduler_config`; the stock pipeline changes nothing."""
        return config

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.device, do_classifier_free_guidance=False
        )
        return self._with_sizes(pipeline, hidden, pooled)

    def embed_negative(self, pipeline: DiffusionPipeline, prompt: str) -> PromptEmbeds:
        """See `Family.embed_negative`; an empty one is all zeros where the pipeline's configuration says so."""
        _, hidden, _, pooled = pipeline.encode_prompt(
            "", device=pipeline.device, do_classifier_free_guidance=True, negative_prompt=prompt or None
        )
        return self._with_sizes(pipeline, hidden, pooled)

    def _with_sizes(self, pipeline: DiffusionPipeline, hidden: torch.Tensor, pooled: torch.Tensor) -> PromptEmbeds:
        _, height, width = self.latent_shape(pipeline.unet.config)
        size = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
        # As the stock pipeline: the original and the target size are the image's, without a crop.
        time_ids = torch.tensor([[*size, 0, 0, *size]], device=hidden.device, dtype=hidden.dtype)
        return PromptEmbeds(encoder_hidden_states=hidden, text_embeds=pooled, time_ids=time_ids.repeat(len(hidden), 1))

    def check_added_conditions(self, components: ComponentConfigs) -> None:
        unet, pooled = components["unet"], components["text_encoder_2"]["projection_dim"]
        if (added := unet.get("addition_embed_type")) != "text_time":
            raise InputError(f"addition_embed_type is {added!r}, where {self.name} has 'text_time'")
        width, each = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
        if not isinstance(each, int) or width != pooled + NUM_TIME_IDS * each:
            raise InputError(
                f"projection_class_embeddings_input_dim is {width!r}, where text embeddings of {pooled} and "
                f"{NUM_TIME_IDS} numbers of size of {each} each make another: refiners and models of other conditions "
                "can't be used"
            )

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": self.text_shape(pipeline),
            "text_embeds": (pipeline.text_encoder_2.config.projection_dim,),
            "time_ids": (NUM_TIME_IDS,),
        }
