"""Training states from prompts alone: online trajectories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..engine.model import Model
from .objective import NoiseSchedule, ddim_step, dpm_solver_2m
from .order import epoch_order, noise_of
from .source import Batch, Source, draw_guidance


class Trajectories(Source):
    """Online trajectories: the teacher's own sampling runs, trained on as they happen.

    A pool of B trajectories, each with its own prompt, guidance, sampler, step count, phase and position. One teacher
    evaluation per update is both the target for every member and what moves it on by a step; a finished member is
    replaced by a new one. Samplers (DDIM and DPM-Solver++ 2M), step counts and phases are random, so the student is
    tied to no single setting.

    Every process keeps the whole pool's book (it follows from seeds) and the latents of its own members.
    """

    STEPS = (4, 16)
    """Fewest and most steps of a trajectory: short ones bring more prompts and noise into a run."""

    def __init__(self, model: Model, prompts: list[str], schedule: NoiseSchedule, **common: Any) -> None:
        """For what is `common` to all sources see `Source`."""
        super().__init__(model, schedule, **common)
        self.prompts = prompts
        size = self.share.batch_size
        self.number = torch.zeros(size, dtype=torch.int64)
        self.stride, self.position, self.first_stride = (torch.zeros(size) for _ in range(3))
        self.t, self.t_previous = torch.full((size,), -1), torch.full((size,), -1)
        self.multistep = torch.zeros(size, dtype=torch.bool)
        self.guidance = torch.zeros(size)
        self.texts, self.negative_texts = [""] * size, [""] * size
        self.z_t = torch.zeros(len(self.share.members), *model.latent_shape, device=model.device)
        self.x_previous = torch.zeros_like(self.z_t)
        self.started = 0
        self._refill(range(size))

    def _refill(self, members: Sequence[int]) -> None:
        own = self.share.members
        for member in members:
            self._begin(member, self.started)
            if member in own:
                self.z_t[member - own.start] = noise_of(self.model.latent_shape, self.seed, self.started)
            self.started += 1

    def _begin(self, member: int, number: int) -> None:
        random = np.random.default_rng([self.seed, number])
        stride = len(self.schedule) / random.integers(*self.STEPS, endpoint=True)
        self.number[member] = number
        self.stride[member] = stride
        # Phases between "trailing" spacing (from the last timestep) and "leading" (one stride below it). Where noise
        # alone is a state of the last timestep alone, the first step is shorter instead.
        phase = random.random() * stride
        flow = self.schedule.prediction_type == "flow_prediction"
        self.position[member] = len(self.schedule) - 1 - (0 if flow else phase)
        self.first_stride[member] = max(1.0, phase) if flow else stride
        self.multistep[member] = bool(random.random() < 0.5)
        self.guidance[member] = draw_guidance(random, self.guidance_bounds)
        self.t_previous[member] = -1
        epoch, index = divmod(number, len(self.prompts))
        self.texts[member] = self.prompts[epoch_order(len(self.prompts), self.seed, epoch)[index]]
        self.negative_texts[member] = self.negatives.draw(random, self.prompts)

    def batch(self, update: int) -> Batch:
        """See `Source.batch`: this process's part of the pool."""
        own, where = self.share.members, self.z_t.device
        rows = slice(own.start, own.stop)
        self.t = self._timesteps(self.position)
        return Batch(
            z_t=self.z_t,
            t=self.t[rows].to(where),
            prompts=self.texts[rows],
            negative_prompts=self.negative_texts[rows],
            text=self.text(self.texts[rows], self.negative_texts[rows]),
            guidance=self.guidance[rows].to(where),
        )

    def _timesteps(self, position: torch.Tensor) -> torch.Tensor:
        """The pool's timesteps at positions; −1 at the end."""
        return position.round().long().clamp(min=-1)

    @torch.no_grad()
    def advance(self, teacher_x: torch.Tensor) -> None:
        """Step every member with the teacher; replace those that have arrived."""
        own = self.share.members
        rows = slice(own.start, own.stop)
        self.position = self.position - torch.where(self.t_previous < 0, self.first_stride, self.stride)
        t_next = self._timesteps(self.position)
        t, before, after, multistep = (
            x[rows].to(self.z_t.device) for x in (self.t, self.t_previous, t_next, self.multistep)
        )
        x = teacher_x
        second_order = multistep & (before >= 0) & (after >= 0)
        if second_order.any():
            x = torch.where(
                second_order[:, None, None, None],
                dpm_solver_2m(teacher_x, self.x_previous, *self.schedule.half_log_snr(before, t, after)),
                teacher_x,
            )
        self.z_t = ddim_step(self.z_t, x, *self.schedule.at(t), *self.schedule.at(after))
        self.x_previous, self.t_previous = teacher_x, self.t.clone()
        self._refill(torch.nonzero(t_next < 0).flatten().tolist())

    def state(self) -> dict[str, torch.Tensor]:
        """See `Source.state`; what follows from a trajectory's number is left out."""
        return {
            "z_t": self.share.gather(self.z_t),
            "x_previous": self.share.gather(self.x_previous),
            "number": self.number,
            "position": self.position,
            "t_previous": self.t_previous,
            "started": torch.tensor(self.started),
        }

    def restore(self, state: dict[str, torch.Tensor], notes: Counter[str]) -> None:
        """See `Source.restore`."""
        for member, number in enumerate(state["number"].tolist()):
            self._begin(member, number)
        own, where = self.share.members, self.z_t.device
        rows = slice(own.start, own.stop)
        self.z_t, self.x_previous = state["z_t"][rows].to(where), state["x_previous"][rows].to(where)
        self.position, self.t_previous = state["position"], state["t_previous"]
        self.started = int(state["started"])


class GridTrajectories(Trajectories):
    """Trajectories by DDIM on one grid of timesteps: what a few-step student is trained on.

    Positions are indices of the grid. The pool's first trajectories are given up after 1, 2, … steps, so that from then
    on a batch has all timesteps of the grid.
    """

    def __init__(self, *args: Any, timesteps: Sequence[int], **options: Any) -> None:
        self.grid = torch.tensor([*timesteps, -1])
        super().__init__(*args, **options)

    def _begin(self, member: int, number: int) -> None:
        super()._begin(member, number)
        self.position[member], self.multistep[member] = 0, False
        self.stride[member] = self.first_stride[member] = -1

    def _timesteps(self, position: torch.Tensor) -> torch.Tensor:
        steps = len(self.grid) - 1
        first = self.number < self.share.batch_size
        given_up = first & (position > self.number % steps)
        return torch.where(given_up, -1, self.grid[position.long().clamp(max=steps)])
