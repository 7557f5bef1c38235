"""Classifier-free guidance, in two passes or in one.

A `Denoiser` is a runner plus guidance: called as `denoiser(z_t, t, text)`, it gives the prediction that the scheduler
steps on. Teacher and student differ in nothing else.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .conditions import TextEmbeddings
from .guiders import Guider

if TYPE_CHECKING:
    from .runners import Runner


class Denoiser(Protocol):
    """Anything that predicts for a batch of latents."""

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """Predict.

        Args:
            z_t: `(B, C, H, W)` latents, scaled for the model.
            t: the timestep, a scalar or `(B,)`.
            text: embeddings for B prompts.

        Returns:
            `(B, C, H, W)`, in the model's prediction type.
        """


def combine(
    unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float | torch.Tensor
) -> torch.Tensor:
    """Equation (3) of the BoostDiff paper, x̂_w = x̂(∅) + w (x̂(c) − x̂(∅)) (Ho & Salimans 2022, eq. 6).

    It is affine in the predictions, so it is the same equation for x̂, ε̂ and v̂ at one z_t. A scale for each sample
    is a tensor `(B, 1, 1, 1)`.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def teacher_denoiser(runner: Runner, guidance_scale: float, guider: Guider | None = None) -> Denoiser:
    """The teacher at one scale: two passes, or one where w = 1 makes the other idle."""
    return GuidedDenoiser(runner, guidance_scale, guider) if guidance_scale > 1 else SinglePassDenoiser(runner)


def _embedding_rates(width: int) -> torch.Tensor:
    half = width // 2
    return torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))


def smooth_columns(width: int) -> torch.Tensor:
    """Which of the guidance embedding's columns, `(width,)` bool, turn by at most one radian while w grows by 1.

    Most turn up to 1000 radians: nothing that is learned from few scales carries over to those between.
    """
    slow = 1000.0 * _embedding_rates(width) <= 1
    return torch.nn.functional.pad(torch.cat([slow, slow]), (0, width % 2))


def guidance_embedding(guidance_scale: torch.Tensor, width: int) -> torch.Tensor:
    """The embedding `(B, width)` of guidance scales `(B,)` that a UNet with `time_cond_proj_dim` takes.

    Sines and cosines of w − 1, as stock pipelines feed them
    (`StableDiffusionPipeline.get_guidance_scale_embedding`; Meng et al. 2023, §3). diffusers' `get_timestep_embedding`
    rounds the rates differently, which at angles of thousands of radians is off by 4e-4.
    """
    rates = _embedding_rates(width).to(guidance_scale.device)
    angles = (guidance_scale.float() - 1)[:, None] * 1000.0 * rates
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class GuidedDenoiser:
    """The teacher: one pass over a batch of 2B, unconditional half first, as stock pipelines order it.

    `guidance_scale` is one number, or `(B,)` for a scale a sample; without a `guider` it is the family's guidance, as a
    rule equation (3). Sampling makes one pass at a timestep that the guider gives no guidance.
    """

    def __init__(self, runner: Runner, guidance_scale: float | torch.Tensor, guider: Guider | None = None) -> None:
        self.runner = runner
        self.guidance_scale = guidance_scale
        self.guider = guider or Guider()

    def passes(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """The unconditional and the conditional prediction, each `(B, C, H, W)`."""
        t_both = torch.cat([t, t]) if t.ndim else t
        unconditional, conditional = self.runner.denoise(torch.cat([z_t, z_t]), t_both, text.both()).chunk(2)
        return unconditional, conditional

    def combined(self, unconditional: torch.Tensor, conditional: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What guidance makes of `passes` at the timestep t, a scalar or `(B,)`: `(B, C, H, W)`."""
        scale = self.guidance_scale
        if self.guider.name != "cfg":
            return self.guider(unconditional, conditional, scale, t)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(conditional)[:, None, None, None]
        guided: torch.Tensor = self.runner.family.guide(unconditional, conditional, scale)
        return guided

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        if t.ndim == 0 and not self.guider.guides(t):
            return SinglePassDenoiser(self.runner)(z_t, t, text)
        return self.combined(*self.passes(z_t, t, text), t)


class SinglePassDenoiser:
    """The student (and the teacher without guidance): one pass over a batch of B.

    `guidance_scale`, a number or `(B,)`, is the input of a guidance-conditioned student; others have none. A student
    of live negative prompts reads both texts.
    """

    def __init__(
        self,
        runner: Runner,
        guidance_scale: float | torch.Tensor | None = None,
        *,
        live_negative_prompt: bool = False,
    ) -> None:
        self.runner = runner
        self.guidance_scale = guidance_scale
        self.live_negative_prompt = live_negative_prompt
        self._embeddings: dict[tuple[Any, ...], torch.Tensor] = {}

    def _embedding(self, z_t: torch.Tensor) -> torch.Tensor:
        """The guidance embedding for a batch; of one scale it is made once, as a GPU would wait for it in each step."""
        key = (len(z_t), z_t.device, z_t.dtype, torch.is_inference_mode_enabled())
        if key in self._embeddings:
            return self._embeddings[key]
        scale = torch.as_tensor(self.guidance_scale, device=z_t.device).expand(len(z_t))
        embedding = guidance_embedding(scale, self.runner.config["time_cond_proj_dim"]).to(z_t.dtype)
        if not isinstance(self.guidance_scale, torch.Tensor):
            self._embeddings[key] = embedding
        return embedding

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        embeds = text.joined() if self.live_negative_prompt else text.conditional
        embedding = None if self.guidance_scale is None else self._embedding(z_t)
        return self.runner.denoise(z_t, t, embeds, timestep_cond=embedding)
