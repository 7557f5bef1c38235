"""Samplers: diffusers' schedulers under the command line's names."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from .errors import InputError

# Clipping and thresholding are for pixels: latents lie beyond [-1, 1], and DDIM clips if its configuration is silent.
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "thresholding": False}),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False},
    ),
    "unipc": (UniPCMultistepScheduler, {"thresholding": False}),
    "euler": (EulerDiscreteScheduler, {}),
}


def make_scheduler(name: str, config: dict[str, Any]) -> SchedulerMixin:
    """A scheduler with a model's betas and prediction type.

    Args:
        name: a key of `SAMPLERS`.
        config: the configuration of the model's own scheduler.

    Raises:
        InputError: the name is unknown.
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    scheduler_class, settings = SAMPLERS[name]
    return scheduler_class.from_config(config, **settings)
