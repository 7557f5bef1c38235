"""How close single predictions come to the guided teacher's, on its trajectories: no image is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...engine.families import TextEmbeddings
from ...engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ...engine.model import Model
from ...engine.runners import TorchRunner
from ...engine.sampling import initial_noise
from ...engine.schedulers import make_scheduler

TRAJECTORY_STEPS, EVERY = 16, 4
"""DDIM steps of the trajectories whose predictions are compared, at every fourth."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A point of the teacher's trajectories.

    Attributes:
        t: the timestep, a scalar.
        z_t: latents `(B, C, H, W)`.
        guided: guided prediction.
        unguided: conditional prediction without guidance.
    """

    t: torch.Tensor
    z_t: torch.Tensor
    guided: torch.Tensor
    unguided: torch.Tensor


@torch.inference_mode()
def trajectory(model: Model, text: TextEmbeddings, scale: float) -> list[State]:
    """The teacher's states at one guidance scale above 1, image i from the noise of seed i."""
    runner = TorchRunner(model.unet)
    guided, unguided = GuidedDenoiser(runner, scale), SinglePassDenoiser(runner)
    scheduler = make_scheduler("ddim", model.pipeline.scheduler.config)
    scheduler.set_timesteps(TRAJECTORY_STEPS, device=model.device)
    z_t = initial_noise(model.latent_shape, count=len(text), seed=0).to(model.device, model.unet.dtype)
    states = []
    for step, t in enumerate(scheduler.timesteps):
        prediction = guided(z_t, t, text)
        if step % EVERY == 1:
            states.append(State(t=t, z_t=z_t, guided=prediction, unguided=unguided(z_t, t, text)))
        z_t = scheduler.step(prediction, t, z_t, return_dict=False)[0]
    return states


@torch.inference_mode()
def error_and_share(denoiser: Denoiser, states: Sequence[State], text: TextEmbeddings) -> tuple[float, float]:
    """‖ε̂ − ε̂_w‖² / ‖ε̂_1 − ε̂_w‖² over all states, and ⟨ε̂ − ε̂_1, ε̂_w − ε̂_1⟩ over the same: (1, 0) without a student."""
    error = along = whole = 0.0
    for state in states:
        got = denoiser(state.z_t, state.t, text).double()
        guided, unguided = state.guided.double(), state.unguided.double()
        error += (got - guided).square().sum().item()
        along += ((got - unguided) * (guided - unguided)).sum().item()
        whole += (guided - unguided).square().sum().item()
    return error / whole, along / whole
