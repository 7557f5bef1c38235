"""Model families: the one place that knows how prompts are encoded and which inputs a denoiser takes.

A new family is a subclass of `Family` and a row in `FAMILIES`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from .errors import InputError

ENCODED_TOGETHER = 64
"""Prompts that the text encoder takes at once."""

SIZES = 6
"""Numbers in SDXL's `time_ids`."""


@dataclass(frozen=True, kw_only=True)
class PromptEmbeds:
    """Conditioning of the UNet on B prompts, by the names that diffusers gives its inputs.

    Attributes:
        encoder_hidden_states: `(B, L, D)`, one vector a token.
        text_embeds: `(B, P)`, one vector a prompt; SDXL only.
        time_ids: `(B, 6)`, original size, crop and target size in pixels; SDXL only.
    """

    encoder_hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.encoder_hidden_states.dtype

    def __getitem__(self, index: slice | torch.Tensor) -> PromptEmbeds:
        return self.map(lambda tensor: tensor[index])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that this family has, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PromptEmbeds:
        """The function's result for every tensor."""
        return PromptEmbeds(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbeds:
        """As `torch.Tensor.to`, for all."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def expand(self, count: int) -> PromptEmbeds:
        """One prompt's embeddings for `count` images, without a copy."""
        return self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def unet_arguments(self) -> dict[str, Any]:
        """As keyword arguments of `UNet2DConditionModel.forward`."""
        added = {name: tensor for name, tensor in self.tensors().items() if name != "encoder_hidden_states"}
        arguments: dict[str, Any] = {"encoder_hidden_states": self.encoder_hidden_states}
        return arguments | ({"added_cond_kwargs": added} if added else {})

    @classmethod
    def cat(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Several in one batch."""
        return cls(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings:
    """Embeddings of B prompts and, for guidance, of what it leads away from.

    Attributes:
        conditional: embeddings of the prompts (c), a batch of B.
        unconditional: embeddings of the empty or a negative prompt (∅), a batch of 1, or of B negative prompts; None
            without guidance.
    """

    conditional: PromptEmbeds
    unconditional: PromptEmbeds | None

    def __len__(self) -> int:
        return len(self.conditional)

    def __getitem__(self, index: slice | torch.Tensor) -> TextEmbeddings:
        unconditional = self.unconditional
        if unconditional is not None and len(unconditional) > 1:
            unconditional = unconditional[index]
        return TextEmbeddings(conditional=self.conditional[index], unconditional=unconditional)

    def joined(self) -> PromptEmbeds:
        """Both along the tokens, `(B, 2L, D)`, the unconditional first: what a student of live negative prompts reads.

        All else, such as SDXL's pooled embedding, is the prompts'.
        """
        assert self.unconditional is not None, "encoded without the unconditional prompt"
        negative = self.unconditional.expand(len(self)).encoder_hidden_states
        tokens = torch.cat([negative, self.conditional.encoder_hidden_states], dim=1)
        return replace(self.conditional, encoder_hidden_states=tokens)

    def both(self) -> PromptEmbeds:
        """A batch of 2B: ∅ B times, then the prompts."""
        assert self.unconditional is not None, "encoded without the unconditional prompt"
        return PromptEmbeds.cat([self.unconditional.expand(len(self)), self.conditional])

    def to(self, *args: Any, **kwargs: Any) -> TextEmbeddings:
        """As `torch.Tensor.to`, for both."""
        return TextEmbeddings(
            conditional=self.conditional.to(*args, **kwargs),
            unconditional=None if self.unconditional is None else self.unconditional.to(*args, **kwargs),
        )


BOTH_TEXTS = "a student of live negative prompts takes both texts as one: torch.cat([negative, prompt], dim=1)"


def is_live(unet_config: Any) -> bool:
    """Whether a UNet of this configuration takes `TextEmbeddings.joined`; see `live_negative`."""
    return bool(unet_config.get("live_negative_prompt"))


class Family(ABC):
    """What differs between model families."""

    name: str
    pipeline_class: type[DiffusionPipeline]
    upcast_vae = False
    """Whether stock diffusers runs the VAE in FP32 where its configuration says `force_upcast`."""
    normalizes_latents = False
    """Whether stock diffusers honours the VAE's `latents_mean` and `latents_std`."""
    text_encoders: tuple[str, ...]
    """The pipeline's attributes that hold them."""
    load_options: ClassVar[dict[str, Any]]
    """Arguments of the pipeline's `from_pretrained` that this class alone takes."""

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The pipeline's parts, and the classes that each may be of."""
        classes = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
        return {
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL", "AutoencoderTiny"),
            **{name: classes[name] for name in self.text_encoders},
            **dict.fromkeys(self.tokenizers, ("CLIPTokenizer", "CLIPTokenizerFast")),
            # `schedulers.check_schedule` says why others are refused.
            "scheduler": (),
        }

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The pipeline's attributes that hold the tokenizer of each text encoder."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    def assemble(self, components: dict[str, Any]) -> DiffusionPipeline:
        """A pipeline of parts, real or exported, by their names in `model_index.json`; without a safety checker."""
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        optional = {"feature_extractor": None, "image_encoder": None, **self.load_options}
        return self.pipeline_class(
            **{name: value for name, value in optional.items() if name in parameters} | components
        )

    @abstractmethod
    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        """Embeddings of a few prompts, as the stock pipeline computes them."""

    def encode(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], *, negative_prompt: str | Sequence[str] | None = ""
    ) -> TextEmbeddings:
        """Text embeddings of B prompts, on the pipeline's device and in its dtype.

        `negative_prompt` is what guidance leads away from, one for all or one each; None leaves the unconditional
        embedding out.
        """
        chunks = [
            self.embed(pipeline, list(prompts[i : i + ENCODED_TOGETHER]))
            for i in range(0, len(prompts), ENCODED_TOGETHER)
        ]
        unconditional = None
        if negative_prompt is not None:
            negatives = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
            unconditional = PromptEmbeds.cat([self.embed_negative(pipeline, each) for each in negatives])
        return TextEmbeddings(conditional=PromptEmbeds.cat(chunks), unconditional=unconditional)

    def embed_negative(self, pipeline: DiffusionPipeline, prompt: str) -> PromptEmbeds:
        """The unconditional embedding, a batch of 1."""
        return self.embed(pipeline, [prompt])

    @abstractmethod
    def check_added_conditions(self, parts: dict[str, dict[str, Any]]) -> None:
        """Refuse, by an InputError, a UNet that takes other conditions beside the text embedding than `embed` gives.

        `parts` are the configurations of all parts.
        """

    def scheduler_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A folder's scheduler configuration as the pipeline changes it when it is made."""
        return config

    def upcasts(self, vae_config: Any) -> bool:
        """Whether a VAE overflows in FP16 and is run in FP32."""
        return self.upcast_vae and vae_config.force_upcast

    @abstractmethod
    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        """Shapes of `PromptEmbeds`' tensors by name, without the batch."""

    def text_shape(self, pipeline: DiffusionPipeline) -> tuple[int, int]:
        """Tokens and width of one prompt's embedding."""
        width = sum(getattr(pipeline, name).config.hidden_size for name in self.text_encoders)
        return pipeline.tokenizer.model_max_length, width

    def example_inputs(self, pipeline: DiffusionPipeline, batch: int) -> dict[str, torch.Tensor]:
        """Random denoiser inputs by name, in the order in which a runner takes them; used to trace and compare."""
        unet = pipeline.unet
        generator = torch.Generator().manual_seed(0)
        shapes = {"sample": self.latent_shape(unet.config), **self.prompt_shapes(pipeline)}
        if is_live(unet.config):
            length, width = shapes["encoder_hidden_states"]
            shapes["encoder_hidden_states"] = (2 * length, width)
        if unet.config.time_cond_proj_dim is not None:
            shapes["timestep_cond"] = (unet.config.time_cond_proj_dim,)
        inputs = {}
        for name, shape in shapes.items():
            inputs[name] = torch.randn(batch, *shape, generator=generator).to(unet.device, unet.dtype)
            if name == "sample":
                # A float: some schedulers' timesteps are fractional.
                inputs["timestep"] = torch.full((batch,), 501.0, device=unet.device)
        return inputs

    def latent_shape(self, unet_config: dict[str, Any]) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents at the model's size."""
        size = unet_config["sample_size"]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return unet_config["in_channels"], height, width


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder."""

    name = "stable-diffusion"
    pipeline_class = StableDiffusionPipeline
    text_encoders = ("text_encoder",)
    load_options: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        embeddings, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
        return PromptEmbeds(encoder_hidden_states=embeddings)

    def check_added_conditions(self, parts: dict[str, dict[str, Any]]) -> None:
        """See `Family.check_added_conditions`; "text" is an embedding of the text that is there anyway."""
        if (added := parts["unet"].get("addition_embed_type")) not in (None, "text"):
            raise InputError(f"addition_embed_type is {added!r}, a condition that {self.name} does not have")

    def scheduler_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """See `Family.scheduler_config`; the stock pipeline sets `steps_offset` to 1."""
        return config | ({"steps_offset": 1} if "steps_offset" in config else {})

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": self.text_shape(pipeline)}


class StableDiffusionXL(Family):
    """Stable Diffusion XL's base model: two text encoders, pooled embeddings and size conditions."""

    name = "stable-diffusion-xl"
    pipeline_class = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    upcast_vae = True
    normalizes_latents = True
    load_options: ClassVar = {"add_watermarker": False}

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

    def check_added_conditions(self, parts: dict[str, dict[str, Any]]) -> None:
        unet, pooled = parts["unet"], parts["text_encoder_2"]["projection_dim"]
        if (added := unet.get("addition_embed_type")) != "text_time":
            raise InputError(f"addition_embed_type is {added!r}, where {self.name} has 'text_time'")
        width, each = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
        if not isinstance(each, int) or width != pooled + SIZES * each:
            raise InputError(
                f"projection_class_embeddings_input_dim is {width!r}, where text embeddings of {pooled} and {SIZES} "
                f"numbers of size of {each} each make another: refiners and models of other conditions can't be used"
            )

    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": self.text_shape(pipeline),
            "text_embeds": (pipeline.text_encoder_2.config.projection_dim,),
            "time_ids": (SIZES,),
        }


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
}
"""By the `_class_name` of a folder's `model_index.json`."""


def family_of(model_index: dict[str, Any]) -> Family:
    """The family of a pipeline folder.

    Raises:
        InputError: none handles this pipeline class.
    """
    class_name = model_index.get("_class_name")
    if class_name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"models of class {class_name} are not supported; supported: {known}")
    return FAMILIES[class_name]
