"""Model families: the one place that knows how prompts are encoded and which inputs a denoiser takes.

A new family is a subclass of `Family` and a row in `FAMILIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from .errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings:
    """Embeddings of B prompts and, for guidance, of the empty prompt.

    Attributes:
        conditional: `(B, L, D)` for the prompts (c).
        unconditional: `(1, L, D)` for the empty prompt (∅); None where no guidance will need it.
    """

    conditional: torch.Tensor
    unconditional: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.conditional)

    def __getitem__(self, index: slice | torch.Tensor) -> TextEmbeddings:
        return TextEmbeddings(conditional=self.conditional[index], unconditional=self.unconditional)

    def both(self) -> torch.Tensor:
        """`(2B, L, D)`: the empty prompt B times, then the prompts."""
        assert self.unconditional is not None, "encoded without the empty prompt"
        return torch.cat([self.unconditional.expand_as(self.conditional), self.conditional])

    def to(self, *args: Any, **kwargs: Any) -> TextEmbeddings:
        """As `torch.Tensor.to`, for both."""
        return TextEmbeddings(
            conditional=self.conditional.to(*args, **kwargs),
            unconditional=None if self.unconditional is None else self.unconditional.to(*args, **kwargs),
        )


class Family(ABC):
    """What differs between kinds of models."""

    name: str
    pipeline_class: type[DiffusionPipeline]

    @abstractmethod
    def encode(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], *, unconditional: bool = True
    ) -> TextEmbeddings:
        """Text embeddings of the prompts, on the pipeline's device and in its dtype.

        Args:
            pipeline: its tokenizer and text encoder are used.
            prompts: B of them.
            unconditional: encode the empty prompt too.
        """

    @abstractmethod
    def example_inputs(self, pipeline: DiffusionPipeline, batch: int) -> dict[str, torch.Tensor]:
        """Random denoiser inputs by name, in the order in which the UNet takes them; used to trace and compare."""

    @abstractmethod
    def latent_shape(self, unet_config: dict[str, Any]) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents at the model's own size."""


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, `(sample, timestep, encoder_hidden_states)`."""

    name = "stable-diffusion"
    pipeline_class = StableDiffusionPipeline

    @torch.no_grad()
    def encode(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], *, unconditional: bool = True
    ) -> TextEmbeddings:
        """See `Family.encode`; the encoding is the stock pipeline's own."""

        def embed(texts: list[str]) -> torch.Tensor:
            embeddings, _ = pipeline.encode_prompt(texts, pipeline.device, 1, False)
            return embeddings

        chunks = [embed(list(prompts[i : i + 64])) for i in range(0, len(prompts), 64)]
        return TextEmbeddings(conditional=torch.cat(chunks), unconditional=embed([""]) if unconditional else None)

    def example_inputs(self, pipeline: DiffusionPipeline, batch: int) -> dict[str, torch.Tensor]:
        """See `Family.example_inputs`."""
        unet = pipeline.unet
        generator = torch.Generator().manual_seed(0)
        where = {"device": unet.device, "dtype": unet.dtype}
        tokens = pipeline.tokenizer.model_max_length
        return {
            "sample": torch.randn(batch, *self.latent_shape(unet.config), generator=generator).to(**where),
            "timestep": torch.full((batch,), 501, device=unet.device, dtype=torch.int64),
            "encoder_hidden_states": torch.randn(
                batch, tokens, unet.config.cross_attention_dim, generator=generator
            ).to(**where),
        }

    def latent_shape(self, unet_config: dict[str, Any]) -> tuple[int, int, int]:
        """See `Family.latent_shape`."""
        size = unet_config["sample_size"]
        return unet_config["in_channels"], size, size


FAMILIES: dict[str, Family] = {"StableDiffusionPipeline": StableDiffusion()}
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
