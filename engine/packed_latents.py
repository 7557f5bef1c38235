"""What families have in common whose transformer takes squares of latents as tokens, and has no size of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .family import Family
from .schedulers import shift_of_size

PATCH = 2
"""Side of the squares of latents that make one token."""


class PackedLatents(Family):
    """Latents are packed by the pipeline, as FLUX's: `(B, C, H, W)` to `(B, HW / 4, 4C)`."""

    default_side = 128
    capturable = False

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)

    def unpacked(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        squares = latents.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
        return torch.nn.functional.pixel_shuffle(squares, PATCH)

    def latent_shape(self, denoiser_config: dict[str, Any]) -> tuple[int, int, int]:
        channels, height, width = super().latent_shape(denoiser_config)
        return channels // PATCH**2, height, width

    def latent_multiple(self, denoiser_config: dict[str, Any], *, exported: bool = False) -> int:
        return PATCH

    def timesteps(self, scheduler_config: Any, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        _, height, width = latent_shape
        shift = shift_of_size(scheduler_config, (height // PATCH) * (width // PATCH))
        return {**shift, "sigmas": lambda steps: np.linspace(1.0, 1 / steps, steps)}
