"""Samplers: diffusers' schedulers under the command line's names, and the noise schedules that they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from .errors import InputError, one_line
from .predictions import noise_from_prediction, x_from_prediction

NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""What the network was trained with: taken from the model's folder, the defaults of its scheduler's class included."""

TIMESTEP_SETTINGS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")
"""Where sampling starts and ends: taken from the model's folder where it says so, else the sampler's default."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")

REFUSED = {
    "use_flow_sigmas": (None, False),
    "use_dynamic_shifting": (None, False),
    "timestep_type": (None, "discrete"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""Settings of schedulers that change what the network's numbers mean, with the values that don't."""

FLOW_SCHEDULE = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
    "use_beta_sigmas",
)
"""What makes a flow-matching model's timesteps: taken from the model's folder."""

FLOW_REFUSED = {
    "prediction_type": (None, "flow_prediction"),
    "invert_sigmas": (None, False),
    "stochastic_sampling": (None, False),
    "use_karras_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
}

FLOW_NUMBERS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift_terminal")
"""Numbers in `FLOW_SCHEDULE` that no scheduler looks at as it is made; null counts as absent."""

FEWEST_STEPS = 20
"""What a noise schedule must have timesteps for: previews take as many."""


class DDIM(DDIMScheduler):
    """DDIM (η = 0) whose steps end at the next timestep: diffusers' are T // steps long, whatever the spacing."""

    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As `DDIMScheduler.set_timesteps`."""
        super().set_timesteps(num_inference_steps)
        order = self.timesteps.tolist()
        # Numbers: a stock pipeline's timesteps lie on a GPU, and reading one there is waited for.
        self._next = dict(zip(order, [*order[1:], -1], strict=True))
        self.timesteps = self.timesteps.to(device)

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, *, return_dict: bool = True) -> Any:
        """As `DDIMScheduler.step`, without its further options: stock pipelines pass those that a step names."""
        t = int(timestep)
        following = self._next[t]
        alpha_squared = self.alphas_cumprod[t]
        next_squared = self.alphas_cumprod[following] if following >= 0 else self.final_alpha_cumprod
        alpha, sigma = alpha_squared**0.5, (1 - alpha_squared) ** 0.5
        known = model_output, sample, alpha, sigma, self.config.prediction_type
        x, noise = x_from_prediction(*known), noise_from_prediction(*known)
        after = next_squared**0.5 * x + (1 - next_squared) ** 0.5 * noise
        return DDIMSchedulerOutput(after, x) if return_dict else (after, x)


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """Flow matching's Euler step, which is its DDIM step, with what stock pipelines of UNets ask of a scheduler."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is."""
        return sample


# A sampler fixes order, solver, spread of the sigmas and the last sigma, whatever a folder's scheduler has.
# Clipping and thresholding are for pixels: latents lie beyond [-1, 1], and DDIM clips if its configuration is silent.
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (DDIM, {"clip_sample": False, "thresholding": False}),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "thresholding": False,
        },
    ),
    "unipc": (
        UniPCMultistepScheduler,
        {
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "thresholding": False,
        },
    ),
    "euler": (EulerDiscreteScheduler, {"interpolation_type": "linear", "final_sigmas_type": "zero"}),
}
"""Class and settings; the class's defaults stand for all that is neither here nor in the two lists above."""


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is a flow-matching model's: it asks for flow sigmas, or has no betas."""
    return ("shift" in config and "beta_start" not in config) or bool(config.get("use_flow_sigmas"))


def _flow_scheduler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """The sampler of this name for flow matching."""
    taken = {key: config[key] for key in FLOW_SCHEDULE if config.get(key) is not None}
    # Another class of the folder's, such as Sana's, has the shift by another name, and files keep what classes before
    # them had.
    class_name = config.get("_class_name")
    known = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    names = inspect.signature(known).parameters if inspect.isclass(known) else config
    shift = "flow_shift" if "flow_shift" in names and "shift" not in names else "shift"
    taken["shift"] = config.get(shift, config.get("flow_shift", 1.0))
    if name in ("ddim", "euler"):
        return FlowEuler(**taken)
    scheduler_class, settings = SAMPLERS[name]
    parameters = inspect.signature(scheduler_class).parameters
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": taken.pop("shift")}
    return scheduler_class(**{key: value for key, value in taken.items() if key in parameters}, **flow, **settings)


def shift_of_size(config: Mapping[str, Any], tokens: int, *, max_shift: float = 1.15) -> dict[str, float]:
    """Argument `mu` of `make_scheduler` for images of so many tokens, where the timesteps are shifted by the size.

    As `calculate_shift` of diffusers' pipelines (Esser et al. 2024, "Scaling Rectified Flow Transformers"); `max_shift`
    is what a pipeline takes where the folder says nothing.
    """
    if not config.get("use_dynamic_shifting"):
        return {}
    config = {key: value for key, value in config.items() if value is not None}
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (most - base) / (high - low)
    return {"mu": tokens * slope + base - slope * low}


def make_scheduler(
    name: str,
    config: Mapping[str, Any],
    *,
    mu: float | None = None,
    sigmas: Callable[[int], Sequence[float]] | None = None,
    spacing: str | None = None,
) -> SchedulerMixin:
    """A scheduler of `SAMPLERS` with the noise schedule and timesteps of the model's scheduler configuration.

    Args:
        name: a key of `SAMPLERS`.
        config: configuration of the model's scheduler.
        mu: dynamic shift of a flow-matching model, which depends on the image size; see `Family.timesteps`.
        sigmas: gives the noise levels that a stock pipeline passes for a number of steps, if it passes any.
        spacing: timestep spacing, whatever the configuration says.

    Raises:
        InputError: the name is unknown.
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    if is_flow(config):
        return _with_timesteps(_flow_scheduler(name, config), mu=mu, sigmas=sigmas)
    scheduler_class, settings = SAMPLERS[name]
    # What the folder did not say, diffusers filled in with the defaults of another class.
    silent = {*config.get("_use_default_values", ())}
    # Null is no value, but of `set_alpha_to_one`, where diffusers takes it for false.
    silent |= {key for key in ("timestep_spacing", "steps_offset") if config.get(key) is None}
    taken = {key: config[key] for key in NOISE_SCHEDULE if key in config}
    taken |= {key: config[key] for key in TIMESTEP_SETTINGS if key in config and key not in silent}
    if name == "ddim" and taken.get("timestep_spacing") == "linspace":
        # Its last timestep is 0, from where DDIM has nowhere to go.
        del taken["timestep_spacing"]
    if spacing is not None:
        taken["timestep_spacing"] = spacing
    parameters = inspect.signature(scheduler_class).parameters
    return scheduler_class(**{key: value for key, value in taken.items() if key in parameters}, **settings)


def _with_timesteps(
    scheduler: SchedulerMixin, *, mu: float | None, sigmas: Callable[[int], Sequence[float]] | None
) -> SchedulerMixin:
    """Let a scheduler's `set_timesteps` do by itself what a stock pipeline passes to it."""
    original = scheduler.set_timesteps

    @wraps(original)
    def set_timesteps(num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
        if mu is not None:
            options.setdefault("mu", mu)
        if (
            sigmas is not None
            and num_inference_steps is not None
            and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        ):
            options.setdefault("sigmas", sigmas(num_inference_steps))
        original(num_inference_steps, device=device, **options)

    scheduler.set_timesteps = set_timesteps
    return scheduler


def completed(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of its class, if diffusers has it."""
    known = getattr(diffusers, class_name, None)
    parameters = inspect.signature(known.__init__).parameters.values() if inspect.isclass(known) else ()
    return {one.name: one.default for one in parameters if one.default is not one.empty} | config


def check_schedule(class_name: str, config: Mapping[str, Any], *, flow: bool = False) -> None:
    """Refuse a model's scheduler whose noise schedule or prediction type the samplers don't share, by an InputError.

    The configuration includes the defaults of its class, see `completed`; `flow` says whether the family is one of flow
    matching, see `Family.flow`.
    """
    if flow:
        _check_flow_schedule(class_name, config)
        return
    if class_name == "FlowMatchEulerDiscreteScheduler":
        raise InputError(
            "stock pipelines of UNets can't draw with a FlowMatchEulerDiscreteScheduler: give a model of flow matching "
            "a DPMSolverMultistepScheduler with use_flow_sigmas, prediction_type flow_prediction and flow_shift"
        )
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        known = getattr(diffusers, class_name, None)
        if not inspect.isclass(known) or "use_flow_sigmas" not in inspect.signature(known).parameters:
            raise InputError(f"{class_name} has no use_flow_sigmas")
        if config.get("use_dynamic_shifting"):
            raise InputError(
                "use_dynamic_shifting True is not supported: pipelines of UNets give no shift by image size"
            )
        _check_flow_schedule(class_name, config)
        return
    # What an EDM scheduler's file has of betas is another's.
    known_betas = "beta_start" in config and not class_name.startswith("EDM")
    if class_name not in KarrasDiffusionSchedulers.__members__ or not known_betas:
        raise InputError(f"{class_name} has another noise schedule than {', '.join(SAMPLERS)}: it is not supported")
    for key, values in {
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": (None, *SPACINGS),
        **REFUSED,
        **({} if config.get("trained_betas") else {"beta_schedule": BETA_SCHEDULES}),
    }.items():
        if (value := config.get(key)) not in values:
            names = ", ".join(str(one).lower() for one in values if one is not None)
            raise InputError(f"{key} {value!r} is not supported, only {names}")
    count, offset = config["num_train_timesteps"], config.get("steps_offset")
    offset = 0 if offset is None else offset
    if not isinstance(count, int) or count < FEWEST_STEPS:
        raise InputError(f"num_train_timesteps {count!r} can't be used: it must be at least {FEWEST_STEPS}")
    if not isinstance(offset, int) or not 0 <= offset < count:
        raise InputError(f"steps_offset {offset!r} can't be used: it must lie between 0 and {count - 1}")
    try:
        scheduler = make_scheduler("ddim", config)
    except (TypeError, ValueError, RuntimeError, OverflowError, IndexError) as error:
        raise InputError(f"its betas can't be used: {one_line(error)}") from None
    if not _fits(scheduler, FEWEST_STEPS):
        raise InputError(
            f"steps_offset {offset} can't be used: with it {FEWEST_STEPS} steps leave the {count} timesteps"
        )
    betas = scheduler.betas
    if betas.shape != (count,) or not ((betas > 0) & (betas <= 1)).all():
        raise InputError(f"its betas can't be used: they must be {count} numbers above 0 and up to 1")
    if scheduler.alphas_cumprod.min() <= 0 and config["prediction_type"] == "epsilon":
        raise InputError(
            "its betas leave no signal at the last timestep (rescale_betas_zero_snr), where a prediction of the noise "
            "(prediction_type epsilon) tells nothing of the image: they need v_prediction"
        )


def _check_flow_schedule(class_name: str, config: Mapping[str, Any]) -> None:
    if not is_flow(config):
        raise InputError(f"{class_name} is no scheduler of flow matching, which this model needs")
    for key, values in FLOW_REFUSED.items():
        if config.get(key) not in values:
            raise InputError(f"{key} {config[key]!r} is not supported")
    for key in FLOW_NUMBERS:
        if not isinstance(config.get(key, 0), int | float | None):
            raise InputError(f"{key} {config[key]!r} can't be used: it must be a number")
    count = config.get("num_train_timesteps")
    if not isinstance(count, int) or count < FEWEST_STEPS:
        raise InputError(f"num_train_timesteps {count!r} can't be used: it must be at least {FEWEST_STEPS}")
    try:
        scheduler = _flow_scheduler("euler", config)
        shift_of_size(config, FEWEST_STEPS)
    except (TypeError, ValueError, ImportError, ZeroDivisionError) as error:
        raise InputError(f"it can't be used: {one_line(error)}") from None
    if not ((scheduler.sigmas > 0) & (scheduler.sigmas <= 1)).all():
        raise InputError(f"shift {config.get('shift', config.get('flow_shift'))!r} can't be used: it must be above 0")


def check_spacing(config: Mapping[str, Any], spacing: str | None) -> None:
    """Refuse, by an InputError, a timestep spacing that is none, or that a model's schedule has no use for."""
    if spacing not in (None, "leading", "trailing"):
        raise InputError(f"unknown timestep spacing {spacing!r}: choose leading or trailing")
    if spacing is not None and is_flow(config):
        raise InputError("--timestep-spacing is not for flow matching, whose noise levels have a shift in its place")


def check_steps(
    config: Mapping[str, Any], samplers: Iterable[str], steps: Iterable[int], *, spacing: str | None = None
) -> None:
    """Refuse, by an InputError, numbers of steps for which one of the samplers has no timesteps in a model's schedule.

    `config` is the configuration of the model's scheduler, `spacing` as in `make_scheduler`.
    """
    for name in samplers:
        # diffusers would take the sigmas of another noise schedule, or stop at an assertion.
        if is_flow(config) and name in ("dpm++", "unipc") and config.get("use_beta_sigmas"):
            raise InputError(f"--sampler {name} can't draw with this model's use_beta_sigmas: pass euler")
        linear = config.get("use_dynamic_shifting") and config.get("time_shift_type") == "linear"
        if is_flow(config) and name == "dpm++" and linear:
            raise InputError("--sampler dpm++ can't draw with this model's time_shift_type linear: pass euler")
        mu = 1.0 if config.get("use_dynamic_shifting") else None
        scheduler = make_scheduler(name, config, mu=mu, spacing=spacing)
        for number in steps:
            if not _fits(scheduler, number):
                count = scheduler.config.num_train_timesteps
                candidates = [*range(min(number - 1, count), 0, -1), *range(number + 1, count + 1)]
                other = next((n for n in candidates if _fits(scheduler, n)), 1)
                raise InputError(
                    f"--steps {number} can't be used with {name} on this model's schedule of {count} timesteps: "
                    f"pass {other}"
                )


def _fits(scheduler: SchedulerMixin, steps: int) -> bool:
    """Whether each step has another timestep within the schedule."""
    count = scheduler.config.num_train_timesteps
    if not 1 <= steps <= count:
        return False
    with np.errstate(all="ignore"):
        scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if is_flow(scheduler.config):
        # A single step can't be stretched to the last sigma that a folder may ask for (Qwen-Image's `shift_terminal`).
        return bool(timesteps.isfinite().all())
    return len(timesteps.unique()) == len(timesteps) == steps and 0 <= timesteps.min() <= timesteps.max() < count
