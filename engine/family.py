"""What differs between model families, in one place: `Family`.

A new family is a subclass in a module of its own and a row in `families.FAMILIES`; docs/families.md shows one.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from .checks import ComponentConfigs
from .conditions import PromptEmbeds, TextEmbeddings, is_live
from .config import PIXEL_MULTIPLE
from .errors import InputError
from .guidance import combine

TEXT_BATCH_SIZE = 64
"""Prompts that the text encoder takes at once."""

ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")
JOINT_ATTENTION = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
"""Projections of the text's tokens, where image and text attend together."""


class Family(ABC):
    """What differs between model families. Shapes: B images, C channels and height H, width W of their latents."""

    name: str
    pipeline_class: type[DiffusionPipeline]
    denoiser: str
    """`unet` or `transformer`: the denoising network's attribute and folder in a pipeline, and its LoRA's prefix."""
    denoiser_class: type[torch.nn.Module]
    text_encoders: tuple[str, ...]
    """The pipeline's attributes that hold them."""
    exported_text_encoders: tuple[str, ...] = ()
    """Those that are exported; the others are large, and stay in torch."""
    load_options: ClassVar[dict[str, Any]] = {}
    """Arguments of the pipeline's `from_pretrained` that this class alone takes."""
    flow: ClassVar[bool] = False
    """Whether it is always of flow matching (α = 1 − σ); others are where their scheduler's `use_flow_sigmas` says so,
    and else variance preserving (α² + σ² = 1)."""
    half: ClassVar[torch.dtype] = torch.float16
    """Precision on an accelerator."""
    capturable: ClassVar[bool] = True
    """Whether a CUDA graph can hold the denoiser: not where its forward pass makes tensors from Python's numbers."""
    takes_more: ClassVar[bool] = False
    """Whether students may be guidance-conditioned, of live negative prompts, soft prompts or trained normalizations:
    they change a UNet."""
    targets: ClassVar[dict[str, tuple[str, ...]]]
    """Endings of the names of the layers that an adapter takes, by `distill --targets`."""
    text_chunks: ClassVar[bool] = False
    """Whether an exported denoiser takes texts of several times the text encoder's length."""
    text_lengths: ClassVar[tuple[int, int, int] | None] = None
    """The fewest, usual and most tokens that an exported denoiser takes, where the lengths of texts differ."""

    # The folder.

    @property
    @abstractmethod
    def component_classes(self) -> dict[str, tuple[str, ...]]:
        """The pipeline's components, and the classes that each may be of."""

    optional_components: ClassVar[tuple[str, ...]] = ()
    """Those that a folder may leave out, see `absent_components`."""

    def absent_components(self, index: Mapping[str, Any]) -> dict[str, None]:
        """Optional components that a `model_index.json` has not, or as null, whatever folders there are."""
        return {name: None for name in self.optional_components if index.get(name, [None, None]) == [None, None]}

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The pipeline's attributes that hold the tokenizer of each text encoder."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    @abstractmethod
    def checks(self, components: ComponentConfigs) -> dict[str, Callable[[], None]]:
        """By component, what refuses, by an InputError, a configuration that the stock pipeline would use otherwise.

        `components` are the configurations of all that are there, completed with the defaults of their classes.
        """

    def settings(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """What a `model_index.json` says of the pipeline itself, such as SDXL's `force_zeros_for_empty_prompt`."""
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        names = parameters.keys() & index.keys() - self.load_options.keys()
        # A list is a component's class, null a component that is left out.
        return {name: index[name] for name in sorted(names) if isinstance(index[name], bool | int | float | str)}

    def assemble(self, components: dict[str, Any], index: Mapping[str, Any]) -> DiffusionPipeline:
        """A pipeline of components, real or exported, by name as in a `model_index.json`; without a safety checker."""
        parameters = inspect.signature(self.pipeline_class.__init__).parameters
        absent = dict.fromkeys(self.optional_components)
        optional = {"feature_extractor": None, "image_encoder": None, **absent, **self.load_options}
        present = {name: value for name, value in optional.items() if name in parameters}
        return self.pipeline_class(**present | self.settings(index) | components)

    def present_text_encoders(self, pipeline: DiffusionPipeline) -> tuple[str, ...]:
        """Those of `text_encoders` that a pipeline has."""
        return tuple(name for name in self.text_encoders if getattr(pipeline, name, None) is not None)

    # Text.

    def max_tokens(self, pipeline: DiffusionPipeline, tokenizer: str) -> int:
        """Tokens of a prompt that the stock pipeline uses, start and end among them; what is beyond is cut."""
        limit: int = getattr(pipeline, tokenizer).model_max_length
        return limit

    def encoded_tokens(self, pipeline: DiffusionPipeline, text_encoder: str) -> int:
        """Tokens that a text encoder runs over for each prompt."""
        return self.max_tokens(pipeline, text_encoder.replace("text_encoder", "tokenizer"))

    @abstractmethod
    def embed(self, pipeline: DiffusionPipeline, prompts: list[str]) -> PromptEmbeds:
        """Embeddings of a few prompts, as the stock pipeline computes them."""

    def embed_negative(self, pipeline: DiffusionPipeline, prompt: str) -> PromptEmbeds:
        """The unconditional embedding, a batch of 1."""
        return self.embed(pipeline, [prompt])

    def encode(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], *, negative_prompt: str | Sequence[str] | None = ""
    ) -> TextEmbeddings:
        """Text embeddings of B prompts, on the pipeline's device and in its dtype.

        `negative_prompt` is what guidance leads away from, one for all or one each; None leaves the unconditional
        embedding out.
        """
        chunks = [
            self.embed(pipeline, list(prompts[i : i + TEXT_BATCH_SIZE]))
            for i in range(0, len(prompts), TEXT_BATCH_SIZE)
        ]
        unconditional = None
        if negative_prompt is not None:
            negatives = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
            distinct = list(dict.fromkeys(negatives))
            unconditional = PromptEmbeds.cat([self.embed_negative(pipeline, each) for each in distinct])
            if len(distinct) < len(negatives):
                unconditional = unconditional[torch.tensor([distinct.index(each) for each in negatives])]
        return TextEmbeddings(conditional=PromptEmbeds.cat(chunks), unconditional=unconditional)

    @abstractmethod
    def prompt_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        """Shapes of `PromptEmbeds`' tensors by name, without the batch; the longest where lengths differ."""

    # The denoiser.

    @abstractmethod
    def forward(self, denoiser: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The denoiser's prediction `(B, C, H, W)`, as the stock pipeline steps on it but for guidance.

        `inputs` are `sample` `(B, C, H, W)`; `timestep` `(B,)`, the scheduler's; the tensors of `PromptEmbeds` by name;
        for a guidance-conditioned student `timestep_cond` `(B, E)`.
        """

    def guide(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float | torch.Tensor
    ) -> torch.Tensor:
        """The guided prediction, see `guidance.combine`; families whose stock pipelines compute another override it."""
        return combine(unconditional, conditional, guidance_scale)

    def stock_guidance(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the stock pipeline by which it draws at guidance scale w of equation (3), 1 being none.

        With them it draws the size that it is asked for, and no other.
        """
        return {"guidance_scale": guidance_scale}

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, C, H, W)` as the stock pipeline's loop has them."""
        return latents

    def unpacked(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The reverse of `packed`."""
        return latents

    def example_inputs(self, pipeline: DiffusionPipeline, batch: int, denoiser: Any = None) -> dict[str, torch.Tensor]:
        """Random denoiser inputs by name, in the order in which a runner takes them; used to trace and compare.

        They are those of a student's denoiser, if one is given, else of the pipeline's.
        """
        denoiser = getattr(pipeline, self.denoiser) if denoiser is None else denoiser
        generator = torch.Generator().manual_seed(0)
        shapes = {"sample": self.latent_shape(denoiser.config), **self.prompt_shapes(pipeline)}
        if is_live(denoiser.config):
            length, width = shapes["encoder_hidden_states"]
            shapes["encoder_hidden_states"] = (2 * length, width)
        if (width := denoiser.config.get("time_cond_proj_dim")) is not None:
            shapes["timestep_cond"] = (width,)
        inputs = {}
        for name, shape in shapes.items():
            if name.endswith("_mask"):
                inputs[name] = torch.ones(batch, *shape, dtype=torch.int64, device=denoiser.device)
                continue
            inputs[name] = torch.randn(batch, *shape, generator=generator).to(denoiser.device, denoiser.dtype)
            if name == "sample":
                # A float: some schedulers' timesteps are fractional.
                inputs["timestep"] = torch.full((batch,), 501.0, device=denoiser.device)
        return inputs

    default_side: ClassVar[int | None] = None
    """Side of the latents where the denoiser's configuration has no `sample_size`, as the stock pipeline takes it."""

    def denoiser_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A folder's denoiser configuration as the pipeline changes it when it is made."""
        return config

    def latent_shape(self, denoiser_config: dict[str, Any]) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents at the model's size."""
        size = denoiser_config.get("sample_size", self.default_side)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return denoiser_config["in_channels"], height, width

    def latent_multiple(self, denoiser_config: dict[str, Any], *, exported: bool = False) -> int:
        """What height and width of latents must be multiples of, for the network or for a graph of several sizes."""
        return denoiser_config.get("patch_size", 1)

    def largest_side(self, denoiser_config: dict[str, Any]) -> int | None:
        """The longest side of latents that the network takes, if there is one."""
        return None

    float32_latents: ClassVar[bool] = False
    """Whether the stock pipeline keeps latents in FP32 between steps, whatever precision the denoiser is in."""

    def latents_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of latents, from the noise on, beside text embeddings of this dtype."""
        return torch.float32 if self.float32_latents else dtype

    # The sampler.

    def scheduler_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A folder's scheduler configuration as the pipeline changes it when it is made."""
        return config

    def timesteps(self, scheduler_config: Any, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        """Arguments of `schedulers.make_scheduler` by which the stock pipeline's timesteps depend on the image size."""
        return {}

    # The VAE.

    def pixels_per_latent(self, vae_config: dict[str, Any]) -> int:
        """Pixels of an image's side for each latent."""
        return 2 ** (len(vae_config["block_out_channels"]) - 1)

    def pixel_multiple(
        self, denoiser_config: dict[str, Any], vae_config: dict[str, Any], *, exported: bool = False
    ) -> int:
        """What height and width of images must be multiples of, for the stock pipeline, and see `latent_multiple`."""
        latents = self.latent_multiple(denoiser_config, exported=exported)
        return math.lcm(self.pixels_per_latent(vae_config) * latents, PIXEL_MULTIPLE)

    def check_size(
        self,
        size: Sequence[int],
        denoiser_config: dict[str, Any],
        vae_config: dict[str, Any],
        *,
        options: str,
        exported: bool = False,
    ) -> None:
        """Refuse a height and width in pixels, asked for by these options, that the model can't draw.

        Raises:
            InputError: one is no multiple of `pixel_multiple`, or longer than `largest_side`.
        """
        multiple = self.pixel_multiple(denoiser_config, vae_config, exported=exported)
        rule = f"must be multiples of {multiple}" if any(side % multiple for side in size) else None
        latents = self.largest_side(denoiser_config)
        if latents and max(size) > (most := latents * self.pixels_per_latent(vae_config)):
            rule = f"must be at most {most}"
        if rule:
            raise InputError(f"can't draw {size[0]}x{size[1]} pixels: {options} {rule}")

    video_vae: ClassVar[bool] = False
    """Whether the VAE is one of videos, `(B, C, frames, H, W)`: images are of one frame."""
    normalizes_latents: ClassVar[bool] = False
    """Whether stock diffusers honours the VAE's `latents_mean` and `latents_std`."""
    upcast_vae: ClassVar[bool] = False
    """Whether stock diffusers runs the VAE in FP32 where its configuration says `force_upcast`."""

    def upcasts(self, vae_config: Any) -> bool:
        """Whether a VAE overflows in FP16 and is run in FP32."""
        return self.upcast_vae and vae_config.force_upcast

    def _statistics(self, vae: Any, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Mean and standard deviation of a VAE's latents, `(1, C, 1, 1)`; 0 and 1 where it doesn't say both."""
        # A VAE of another class has no such entries.
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is None or std is None:
            return 0.0, 1.0
        of_channels = torch.tensor([mean, std], device=like.device, dtype=like.dtype)[:, None, :, None, None]
        return of_channels[0], of_channels[1]

    def denormalized(self, latents: torch.Tensor, vae: Any) -> torch.Tensor:
        """The denoiser's latents `(B, C, H, W)` as the VAE decodes them."""
        mean, std = self._statistics(vae, latents)
        return latents * std / vae.config.get("scaling_factor", 1) + (vae.config.get("shift_factor") or 0) + mean

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, …)` in [-1, 1], of what `denormalized` gave."""
        if self.video_vae:
            return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
        return vae.decode(latents, return_dict=False)[0]

    def encode_latents(self, vae: Any, images: torch.Tensor) -> torch.Tensor:
        """The latents `(B, C, H, W)`, float32, of images `(B, 3, …)` in [-1, 1]; of a distribution its mode."""
        images = images.to(vae.device, vae.dtype)
        if self.video_vae:
            images = images[:, :, None]
        encoded = retrieve_latents(vae.encode(images), sample_mode="argmax").float()
        if self.video_vae:
            encoded = encoded[:, :, 0]
        mean, std = self._statistics(vae, encoded)
        shift = vae.config.get("shift_factor") or 0
        return (encoded - mean - shift) * vae.config.get("scaling_factor", 1) / std
