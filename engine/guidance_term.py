"""The guidance term, what a student learns: R² of predictions over the teacher's trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .conditions import TextEmbeddings
from .guidance import Denoiser, GuidedDenoiser
from .guiders import Guider
from .model import Model
from .runners import TorchRunner
from .sampling import initial_noise, sample

TRAJECTORY_STEPS, KEPT = 16, slice(1, None, 4)
"""DDIM steps of the trajectories whose predictions are compared, at every fourth."""


class State(NamedTuple):
    """Timestep, latents `(B, C, H, W)`, and the teacher's predictions with guidance and without."""

    t: torch.Tensor
    z_t: torch.Tensor
    guided: torch.Tensor
    unguided: torch.Tensor


def trajectory(
    model: Model,
    text: TextEmbeddings,
    scale: float,
    guider: Guider | None = None,
    *,
    steps: int = TRAJECTORY_STEPS,
    spacing: str | None = None,
    kept: slice = KEPT,
) -> list[State]:
    """The teacher's states at one guidance scale above 1, image i from the noise of seed i.

    Those of DDIM steps, of a spacing as in `make_scheduler`, of which some are kept.
    """
    teacher, states = GuidedDenoiser(TorchRunner(model.denoiser), scale, guider), []

    def recording(z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        unconditional, conditional = teacher.passes(z_t, t, text)
        guided = teacher.combined(unconditional, conditional, t)
        states.append(State(t=t, z_t=z_t, guided=guided, unguided=conditional))
        return guided

    sample(
        recording,
        text=text,
        noise=initial_noise(model.latent_shape, count=len(text), seed=0).to(
            model.device, model.family.latents_dtype(model.denoiser.dtype)
        ),
        scheduler=model.make_scheduler("ddim", spacing=spacing),
        steps=steps,
    )
    return states[kept]


def total_sum_of_squares(states: Sequence[State]) -> float:
    """The guidance term's sum of squares, Σ‖ε̂_1 − ε̂_w‖²."""
    return sum((state.unguided.double() - state.guided.double()).square().sum().item() for state in states)


@torch.inference_mode()
def r2_of(denoiser: Denoiser, states: Sequence[State], text: TextEmbeddings) -> float:
    """R² of the guidance term, 1 − Σ‖ε̂ − ε̂_w‖² / Σ‖ε̂_1 − ε̂_w‖²: 1 is the guided teacher, 0 the unguided one.

    NaN where guidance changes nothing, as beyond a guider's interval.
    """
    residual = 0.0
    for state in states:
        residual += (denoiser(state.z_t, state.t, text).double() - state.guided.double()).square().sum().item()
    total = total_sum_of_squares(states)
    return 1 - residual / total if total else math.nan
