"""Few-step students: progressive distillation (Salimans & Ho 2022) of the student of guidance, with one adapter.

Each stage halves the number of DDIM steps: where noise prevails, one step of the adapter that is trained equals two of
the stage before, whose weights are frozen. The adapter is trained on from stage to stage, so one file holds guidance
and few steps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..engine.adapters import Adapter
from ..engine.errors import InputError
from ..engine.files import publish, read_json, write_json
from ..engine.guiders import GUIDERS
from ..engine.model import Model, ModelFiles
from ..engine.options import UNRESOLVED
from ..engine.schedulers import check_steps, make_scheduler
from ..engine.student import INFO_FILE, StudentInfo, load_adapter_for_training, read_student
from .config import STAGE_LOSS_WEIGHT, STAGE_RATE, DistillConfig
from .objective import NoiseSchedule, ddim_step, x_from_ddim_step

STAGE_SAMPLER, STAGE_SPACING = "ddim", "trailing"
"""Trailing timesteps begin at the last one, where there is most noise: with few steps another start is far from it."""

MAX_SNR = 1.0
"""Steps from less noise than signal stay as they are. Two of them sharpen what one does; one pass learned half of that,
which cost more FD than nothing of it (docs/experiments.md, "Few steps")."""

STUDENTS_OWN = (
    "method",
    "rank",
    "alpha",
    "targets",
    "tokens",
    "norms",
    "guidance",
    "guidance_max",
    "negative_prompt",
    "guider",
)
"""What a run with `--start-from` takes from its student, beside the guider's settings."""

STAGES = "stages"
"""Folder of the students before the last, in the student's."""

BUDGET = ("updates", "seconds", "teacher_evaluations", "forward_passes", "backward_passes")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage begins with.

    Attributes:
        steps: number of steps of its student.
        folder: folder of the student before, which takes twice as many.
        before: description of that student.
    """

    steps: int
    folder: Path
    before: StudentInfo

    def config(self, config: DistillConfig) -> DistillConfig:
        """The settings of this stage, from those of the whole run."""
        return replace(
            config,
            updates=config.stage_updates,
            learning_rate=config.learning_rate * STAGE_RATE,
            loss_weight=STAGE_LOSS_WEIGHT,
            **dict.fromkeys(("few_steps", "stage_updates", "start_from", "preset", "adapter_scale"), UNRESOLVED),
        )

    def identity(self, whole: dict[str, Any]) -> dict[str, Any]:
        """What a resumed stage must share with its beginning, beside what the whole run must."""
        return whole | {"stage": self.steps, "stage_before_sha256": self.before.adapter_sha256}

    def with_budgets(self, result: dict[str, Any]) -> dict[str, Any]:
        """A stage's result, with the budgets of all stages up to it."""
        earlier = self.before.result.get(STAGES) or [_budget(self.before.steps, self.before.result)]
        return result | {STAGES: [*earlier, _budget(self.steps, result)]}


def _budget(steps: int | None, result: dict[str, Any]) -> dict[str, Any]:
    return {"steps": steps, **{name: result.get(name) for name in BUDGET}}


class FrozenStudent:
    """The student of the stage before on the same denoiser: its weights are swapped in for as long as it predicts."""

    def __init__(self, model: Model, adapter: Adapter, stage: Stage, device: torch.device) -> None:
        """Read its weights into the adapter, which is trained on from there.

        Raises:
            InputError: they don't fit.
        """
        load_adapter_for_training(adapter, stage.folder)
        self.adapter, self.stage = adapter, stage
        self.weights = {name: parameter.detach().clone() for name, parameter in adapter.parameters().items()}
        config = model.pipeline.scheduler.config
        finer, scheduler = (make_scheduler(STAGE_SAMPLER, config, spacing=STAGE_SPACING) for _ in range(2))
        finer.set_timesteps(2 * stage.steps)
        scheduler.set_timesteps(stage.steps)
        self.schedule = NoiseSchedule.of(scheduler, device)
        self.timesteps: list[int] = scheduler.timesteps.tolist()
        middle = finer.timesteps[1::2].tolist()
        # By timestep: where the two steps meet, and where they end.
        self._middle, self._end = torch.full((2, len(self.schedule)), -1, device=device)
        self._middle[self.timesteps] = torch.tensor(middle, device=device)
        self._end[self.timesteps] = torch.tensor([*self.timesteps[1:], -1], device=device)
        self._halved = (self.schedule.alphas / self.schedule.sigmas).square() <= MAX_SNR

    @torch.no_grad()
    def targets(
        self, z_t: torch.Tensor, t: torch.Tensor, x_at: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The x̃ with which one step ends where two of the frozen student's end, and the x̂ of its first: `(B, C, H, W)`.

        Above `MAX_SNR` both are x̂.

        Args:
            z_t: `(B, C, H, W)`.
            t: `(B,)`, on the stage's grid.
            x_at: the denoiser's x̂, with the weights that it has, at latents and timesteps.
        """
        at, middle, end = (self.schedule.at(each) for each in (t, self._middle[t], self._end[t]))
        with self.adapter.swapped(self.weights):
            x = x_at(z_t, t)
            halfway = ddim_step(z_t, x, *at, *middle)
            arrived = ddim_step(halfway, x_at(halfway, self._middle[t]), *middle, *end)
        halved = self._halved[t][:, None, None, None]
        return torch.where(halved, x_from_ddim_step(z_t, arrived, *at, *end), x), x


def adopted(config: DistillConfig) -> DistillConfig:
    """The configuration with the settings of the student that it starts from.

    Raises:
        InputError: there is no such student, it takes other steps, or other settings than its own were asked for.
    """
    if config.start_from is None:
        return config
    info = read_student(config.start_from, instead="--start-from DIR")
    if info.steps not in (None, 2 * config.stages[0]):
        fewer = f": pass --few-steps {info.steps}:END" if info.steps % 2 == 0 else ", which can't be halved"
        raise InputError(f"the student in {config.start_from} takes {info.steps} steps{fewer}")
    known, plain = {"norms": False} | info.settings | {"guider": info.guider}, DistillConfig()
    names = (*STUDENTS_OWN, *(name for settings in GUIDERS.values() for name in settings))
    settings: dict[str, Any] = {name: known.get(name) for name in names}
    for name, own in settings.items():
        asked = getattr(config, name)
        if asked not in (own, getattr(plain, name)):
            option = name.replace("_", "-")
            raise InputError(
                f"--{option} {asked}: the student in {config.start_from} was trained with {own}, leave it out"
            )
    return replace(config, **settings)


def adopted_in_words(config: DistillConfig) -> str:
    """What of a configuration is the student's that it starts from, in place of defaults; "" where nothing is."""
    if config.start_from is None:
        return ""
    plain = DistillConfig(guider="cfg")
    values = {name: getattr(config, name) for name in STUDENTS_OWN}
    taken = [f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value != getattr(plain, name)]
    return f"trained on with the student's {', '.join(taken)}" if taken else ""


def check_stages(config: DistillConfig, files: ModelFiles, *, reads_weights: bool) -> None:
    """Refuse, of a run with stages, what can't be trained.

    Raises:
        InputError: the model is one of flow matching, its schedule has too few timesteps, the student to start from is
            another model's, or there are several processes.
    """
    if files.flow:
        raise InputError("--few-steps is for noise schedules of betas, not for models of flow matching")
    start = 2 * config.stages[0]
    try:
        check_steps(files.scheduler_config, [STAGE_SAMPLER], [start], spacing=STAGE_SPACING)
    except InputError:
        raise InputError(
            f"--few-steps {config.few_steps} can't be used: {start} steps do not go with this model's schedule"
        ) from None
    if config.start_from and reads_weights:
        read_student(config.start_from, files)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--few-steps runs in one process: start it without a launcher")


def train_in_stages(
    config: DistillConfig,
    train: Callable[[Path, Stage | None], StudentInfo],
    *,
    folder: Path,
    output: Path,
    finished: Callable[[int], None],
    before_publishing: Callable[[], None],
) -> StudentInfo:
    """Train stage after stage, those left out that are there, and make the last one's student that of the run.

    Args:
        config: resolved.
        train: trains the student of a stage into a folder; without a stage that of guidance.
        folder: the run's work folder; students of stages are in it, each whole or not there.
        output: the name that it takes at the end.
        finished: callback for the updates of a stage that is there.
        before_publishing: refuses to give the name, by an InputError.
    """
    before = config.start_from or folder / STAGES / "guidance"
    last = folder / STAGES / str(config.stages[-1])
    # Where the last student's copy is whole, only the name is left to be given.
    if not (folder / INFO_FILE).is_file():
        if config.start_from is None:
            if (before / INFO_FILE).is_file():
                finished(config.updates)
            else:
                train(before, None)
        for steps in config.stages:
            after = folder / STAGES / str(steps)
            if (after / INFO_FILE).is_file():
                finished(config.stage_updates)
            else:
                train(after, Stage(steps=steps, folder=before, before=read_student(before)))
            before = after
        shutil.copytree(last, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(INFO_FILE, "config.json"))
        write_json(folder / INFO_FILE, read_json(last / INFO_FILE))
    info = read_student(folder)
    shutil.rmtree(last, ignore_errors=True)
    before_publishing()
    publish(folder, output)
    return info
