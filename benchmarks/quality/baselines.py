"""Training-free baselines, which save UNet passes: guidance at a part of the steps, or fewer steps.

Swept over a few settings at equal cost, so that a student is compared with the best of each: at the student's cost and
at one and a half times as much; with the model's timesteps, and with trailing ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from diffusers import SchedulerMixin

from ...engine.conditions import TextEmbeddings
from ...engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ...engine.runners import Runner

CUT_OFF, INTERVAL, FEWER = "guidance cut off", "guidance in an interval", "fewer steps"
SHARES = (0.25, 0.5)
"""Shares of the steps with guidance."""

SCALES = (1.0, 1.5)
"""Guidance scales relative to the student's: fewer guided steps want a stronger one."""

BUDGETS = (1.0, 1.5)
"""Passes per image, relative to the student's."""

SPACINGS = (None, "trailing")
"""Timestep spacings, where the schedule has them: the model's own, and what suits few steps."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One training-free setting: guidance from the step `first` up to `last`, one pass without guidance at the others.

    From the first step on it is guidance that is switched off after a share of the steps; from a later one, guidance in
    a limited interval (Kynkäänniemi et al. 2024, "Applying guidance in a limited interval improves sample and
    distribution quality in diffusion models"), the interval being counted in steps and not in noise levels.

    Attributes:
        method: `CUT_OFF`, `INTERVAL` or `FEWER`.
        guidance: w at the guided steps.
        steps: sampling steps.
        first: index of the first guided step.
        last: index behind the last guided step.
        spacing: of the timesteps; None is that of the rows beside it.
    """

    method: str
    guidance: float
    steps: int
    first: int
    last: int
    spacing: str | None = None

    @property
    def cost(self) -> int:
        """UNet passes per image."""
        return self.steps + self.last - self.first

    @property
    def name(self) -> str:
        """Row label: "CFG w=3 at steps 1-5 of 15, trailing"."""
        steps = f"steps {self.first + 1}-{self.last} of {self.steps}"
        return f"CFG w={self.guidance:g} at {steps}{f', {self.spacing}' if self.spacing else ''}"

    def denoiser(self, runner: Runner, make_scheduler: Callable[[], SchedulerMixin]) -> Denoiser:
        """The denoiser for the schedulers that `make_scheduler` gives."""
        guided, single = GuidedDenoiser(runner, self.guidance), SinglePassDenoiser(runner)
        scheduler = make_scheduler()
        scheduler.set_timesteps(self.steps)
        guided_at = set(scheduler.timesteps[self.first : self.last].tolist())

        def denoiser(z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
            return (guided if t.item() in guided_at else single)(z_t, t, text)

        return denoiser


def candidates(*, steps: int, guidance: float, spacings: Sequence[str | None] = (None,)) -> list[Baseline]:
    """The settings to sweep: of equal cost within each of `BUDGETS`.

    n steps, k of them guided, cost n + k passes. A share k / n of `SHARES` at each of `SCALES`, from the first step on
    or in the middle; and n = k, that is full guidance at fewer steps. Each with all of `spacings`, which matter in few
    steps. `steps` (at least 2) and `guidance` are the student's.
    """
    settings: dict[tuple[Any, ...], Baseline] = {}

    def add(method: str, scale: float, n: int, first: int, k: int) -> None:
        for spacing in spacings:
            w, last = guidance * scale, first + k
            one = Baseline(method=method, guidance=w, steps=n, first=first, last=last, spacing=spacing)
            settings.setdefault((w, n, first, k, spacing), one)

    for budget, scale in product((int(steps * share) for share in BUDGETS), SCALES):
        add(FEWER, scale, budget // 2, 0, budget // 2)
        for share in SHARES:
            n = round(budget / (1 + share))
            k = budget - n
            if 0 < k < n:
                add(CUT_OFF, scale, n, 0, k)
                if (first := (n - k) // 2) > 0:
                    add(INTERVAL, scale, n, first, k)
    return list(settings.values())
