"""Guiders: what the teacher makes of its two passes, computed by diffusers' own (`diffusers.guiders`).

They work on the model's predictions (ε̂, v̂), as in stock pipelines. A student knows prompt, z_t, t and w, so its
teacher must be a function of these. What diffusers counts in steps is made one, or left out:

- The interval: timestep t counts as step T − 1 − t of T. At N steps, spaced `leading` or `trailing`, this is diffusers'
  interval where its ends are multiples of 1/N; with `linspace` an end may lie one step off.
- APG's momentum is left out. It sums over a trajectory's earlier steps: captioned images have none, and a student that
  sees one state could learn its mean at best.
- CFG-Zero*'s zero init is left out. It is for flow matching, where a velocity of zero leaves z_t as it is. ε̂ = 0 gives
  x̂ = z_t / α, about 15 times too large at Stable Diffusion's first step.

Nothing at the top of this module imports torch: the help of a command must not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import InputError
from .options import check_options, refuse_unused

if TYPE_CHECKING:
    import torch

GUIDERS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "rescale": {"guidance_rescale": 0.7},
    "interval": {"guidance_interval": "0.19:0.93"},
    "apg": {"apg_eta": 0.0, "apg_norm_threshold": 15.0},
    "cfg-zero": {},
}
"""Settings of each guider with their defaults.

φ is Lin et al.'s, η the APG paper's, its threshold diffusers' default; the interval is Kynkäänniemi et al.'s for
SDXL, σ from 0.28 to 5.42, in Stable Diffusion's noise schedule.
"""

_option = partial(typer.Option, rich_help_panel="Guider")


@dataclass(frozen=True, kw_only=True)
class Guider:
    """Combines the unconditional and the conditional prediction.

    Attributes:
        name: a key of `GUIDERS`.
        settings: a value for each of its settings.
        timesteps: number T of the model's training timesteps.
    """

    name: str = "cfg"
    settings: dict[str, Any] = field(default_factory=dict)
    timesteps: int = field(default=1000, compare=False)

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.name} ({values})" if values else self.name

    def for_schedule(self, config: Mapping[str, Any]) -> Guider:
        """The same for a model, by its scheduler's configuration."""
        return replace(self, timesteps=config["num_train_timesteps"])

    @cached_property
    def _of_diffusers(self) -> Any:
        from diffusers import guiders

        if self.name == "cfg-zero":
            return guiders.ClassifierFreeZeroStarGuidance(zero_init_steps=0)
        if self.name == "apg":
            return guiders.AdaptiveProjectedGuidance(
                eta=self.settings["apg_eta"],
                adaptive_projected_guidance_rescale=self.settings["apg_norm_threshold"],
                # The paper's equation: the other form does not end in the conditional prediction at w = 1.
                use_original_formulation=True,
            )
        start, stop = parse_interval(self.settings.get("guidance_interval", "0:1"))
        rescale = self.settings.get("guidance_rescale", 0.0)
        return guiders.ClassifierFreeGuidance(guidance_rescale=rescale, start=start, stop=stop)

    def _at(self, t: float) -> Any:
        guider = self._of_diffusers
        # Flow matching begins at t = T, one beyond the last timestep.
        guider.set_state(max(0, self.timesteps - 1 - t), self.timesteps, t)
        return guider

    def guides(self, t: float | torch.Tensor) -> bool:
        """Whether a timestep has guidance, and so two passes; a tensor on a GPU is waited for by `interval` alone."""
        if self.name != "interval":
            return True
        guider = self._at(float(t))
        # At 1, which an image before this may have had, it takes one pass anywhere.
        guider.guidance_scale = 2.0
        conditions: int = guider.num_conditions
        return conditions > 1

    def passes(self, timesteps: Iterable[float]) -> int:
        """Passes of the UNet over a sampler's timesteps."""
        return sum(1 + self.guides(t) for t in timesteps)

    def __call__(
        self,
        unconditional: torch.Tensor,
        conditional: torch.Tensor,
        guidance_scale: float | torch.Tensor,
        t: torch.Tensor,
    ) -> torch.Tensor:
        """The guided prediction `(B, C, H, W)`.

        Args:
            unconditional: `(B, C, H, W)`, in the model's prediction type.
            conditional: likewise.
            guidance_scale: one number, or `(B,)`.
            t: timestep, a scalar or `(B,)`.
        """
        import torch

        by_timestep = self.name == "interval"
        if not isinstance(guidance_scale, torch.Tensor) and (t.ndim == 0 or not by_timestep):
            return self._guided(unconditional, conditional, guidance_scale, float(t) if by_timestep else 0.0)
        # diffusers' guiders take one scale and one step for the whole batch.
        count = len(conditional)
        scales = torch.as_tensor(guidance_scale).expand(count).tolist()
        samples = zip(unconditional.split(1), conditional.split(1), scales, t.expand(count).tolist(), strict=True)
        return torch.cat([self._guided(*sample) for sample in samples])

    def _guided(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float, t: float
    ) -> torch.Tensor:
        guider = self._at(t)
        guider.guidance_scale = guidance_scale - 1 if guider.use_original_formulation else guidance_scale
        guided: torch.Tensor = guider.forward(conditional, unconditional).pred
        return guided


@dataclass(frozen=True, kw_only=True)
class GuiderOptions:
    """The options of a guider; what is None is left to its defaults."""

    guider: Annotated[
        Literal["cfg", "rescale", "interval", "apg", "cfg-zero"] | None,
        _option(
            show_default="cfg",
            help="The teacher's guidance: classifier-free guidance, with guidance rescale, in a limited interval, "
            "adaptive projected guidance, or CFG-Zero*.",
        ),
    ] = None
    guidance_rescale: Annotated[
        float | None, _option(show_default="0.7", help="rescale: factor φ, above 0 and up to 1, which is full.")
    ] = None
    guidance_interval: Annotated[
        str | None,
        _option(
            metavar="START:STOP",
            show_default="0.19:0.93",
            help="interval: fractions of the timesteps, from noise to image, between which there is guidance.",
        ),
    ] = None
    apg_eta: Annotated[
        float | None,
        _option(show_default="0", help="apg: weight η, from 0 to 1, of guidance parallel to the prediction."),
    ] = None
    apg_norm_threshold: Annotated[
        float | None, _option(show_default="15", help="apg: largest norm r of the guidance term; 0 is any.")
    ] = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used, or would not be used.
        """
        check_options(self)
        for name, settings in GUIDERS.items():
            if name != (self.guider or "cfg"):
                refuse_unused(self, f"without --guider {name}", *settings)
        if self.guidance_rescale is not None and not 0 < self.guidance_rescale <= 1:
            raise InputError("--guidance-rescale must lie above 0 and up to 1")
        if self.guidance_interval is not None:
            # The same however it is written, for who compares settings.
            object.__setattr__(self, "guidance_interval", "{:g}:{:g}".format(*parse_interval(self.guidance_interval)))
        if self.apg_eta is not None and not 0 <= self.apg_eta <= 1:
            raise InputError("--apg-eta must lie between 0 and 1")
        if self.apg_norm_threshold is not None and not 0 <= self.apg_norm_threshold < math.inf:
            raise InputError("--apg-norm-threshold must be a number that is at least 0")

    @property
    def guider_settings(self) -> dict[str, Any]:
        """The settings of the chosen guider, those that were left out by default."""
        defaults = GUIDERS[self.guider or "cfg"].items()
        return {name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults}

    @property
    def chosen_guider(self) -> Guider:
        """The guider that was asked for."""
        return Guider(name=self.guider or "cfg", settings=self.guider_settings)


def parse_interval(text: str) -> tuple[float, float]:
    """`0.2:0.8` as (start, stop).

    Raises:
        InputError: it is no interval, or an empty one.
    """
    try:
        start, stop = map(float, text.split(":"))
    except ValueError:
        raise InputError(f"--guidance-interval {text!r} is no interval START:STOP") from None
    if not 0 <= start < stop <= 1 or stop - start < 0.01:
        raise InputError(
            f"--guidance-interval {text}: START and STOP must lie between 0 and 1, STOP 0.01 or more above"
        )
    return start, stop


def check_guider(name: str, settings: dict[str, Any]) -> None:
    """Refuse a guider as a file names it.

    Raises:
        InputError: it is unknown, or its settings are not its own.
    """
    try:
        complete = GuiderOptions(guider=name, **settings).guider_settings == settings  # type: ignore[arg-type]
    except TypeError:
        complete = False
    if not complete:
        raise InputError(f"the guider {name} has other settings")
