"""Classifier-free guidance and the two ways to spend passes on it.

A *denoiser* is a runner plus guidance: called as `denoiser(z_t, t, text)`, it gives the prediction that the
scheduler steps on. Teacher and student differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from .families import TextEmbeddings


class Denoiser(Protocol):
    """Anything that predicts for a batch of latents."""

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """Predict.

        Args:
            z_t: `(B, C, H, W)` latents, scaled for the model.
            t: the timestep, a scalar or `(B,)`.
            text: embeddings for B prompts.

        Returns:
            `(B, C, H, W)`, in the model's own prediction type.
        """


def combine(unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Equation (3) of the BoostDiff paper, x̂_w = x̂(∅) + w (x̂(c) − x̂(∅)) (Ho & Salimans 2022, eq. 6).

    It is affine in the predictions, so it is the same equation for x̂, ε̂ and v̂ at one z_t.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


class GuidedDenoiser:
    """The teacher: one pass over a batch of 2B, unconditional half first, as stock pipelines order it."""

    def __init__(self, runner: Callable[..., Any], guidance_scale: float) -> None:
        self.runner = runner
        self.guidance_scale = guidance_scale

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """See `Denoiser`."""
        t_both = torch.cat([t, t]) if t.ndim else t
        (prediction,) = self.runner(torch.cat([z_t, z_t]), t_both, encoder_hidden_states=text.both(), return_dict=False)
        unconditional, conditional = prediction.chunk(2)
        return combine(unconditional, conditional, self.guidance_scale)


class SinglePassDenoiser:
    """The student (and the teacher without guidance): one pass over a batch of B."""

    def __init__(self, runner: Callable[..., Any]) -> None:
        self.runner = runner

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """See `Denoiser`."""
        (prediction,) = self.runner(z_t, t, encoder_hidden_states=text.conditional, return_dict=False)
        return prediction
