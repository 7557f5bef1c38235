"""A VAE's latents as the UNet takes them: scaled, and normalized where the VAE's configuration says so."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and standard deviation of a VAE's latents, `(1, C, 1, 1)`; 0 and 1 where it doesn't say both."""
    # A VAE of another class has no such entries.
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return 0.0, 1.0
    of_channels = torch.tensor([mean, std], device=like.device, dtype=like.dtype)[:, None, :, None, None]
    return of_channels[0], of_channels[1]


def denormalized(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """The UNet's latents `(B, C, H, W)` as the VAE decodes them."""
    mean, std = _statistics(vae, latents)
    return latents * std / vae.config.scaling_factor + mean


def encode(images: torch.Tensor, vae: Any) -> torch.Tensor:
    """The latents `(B, C, H, W)`, float32, of images `(B, 3, H, W)` in [-1, 1]; of a distribution its mode."""
    encoded = retrieve_latents(vae.encode(images.to(vae.device, vae.dtype)), sample_mode="argmax").float()
    mean, std = _statistics(vae, encoded)
    return (encoded - mean) * vae.config.scaling_factor / std
