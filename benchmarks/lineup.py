"""Who takes part: the teacher with and without guidance, the students, what needs no training, and the control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from ..engine.errors import InputError
from ..engine.files import sha256_of
from ..engine.guidance import Denoiser, SinglePassDenoiser, teacher_denoiser
from ..engine.merge import merge
from ..engine.model import Model, ModelFiles
from ..engine.runners import Runner, TorchRunner
from ..engine.schedulers import make_scheduler
from ..engine.student import StudentInfo, read_student
from ..engine.versions import versions
from .quality.alternatives import Alternative, candidates
from .quality.samples import Contestant

RESEED = 1_000_003
"""Added to the seed for the teacher-against-teacher row: the distance that chance alone makes."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student that takes part, the name of its row, its description and its merged UNet."""

    name: str
    folder: Path
    info: StudentInfo
    unet: UNet2DConditionModel


def read_students(
    folders: Sequence[Path], files: ModelFiles, guidance: float | None
) -> tuple[list[StudentInfo], float]:
    """Descriptions of the students, and the guidance that all of them stand for.

    Args:
        folders: what `distill` wrote.
        files: the model.
        guidance: asked for, of range students; None takes their own.

    Raises:
        InputError: one can't be used, or they can't be compared.
    """
    infos = [read_student(folder, files) for folder in folders]
    scales = {info.choose_guidance(guidance) or info.guidance for info in infos}
    if len({info.negative_prompt for info in infos}) > 1:
        raise InputError("the students were distilled with different negative prompts: compare them one at a time")
    if len(scales) > 1:
        raise InputError("the students were distilled at different guidance: compare them one at a time")
    (scale,) = scales
    return infos, scale


def merged_students(model: Model, folders: Sequence[Path], infos: Sequence[StudentInfo]) -> list[Student]:
    """The students as plain UNets, named after their methods; those of one method after their folders, too.

    Raises:
        InputError: an adapter does not fit, or a folder is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a --student is given twice")
    methods = [info.method for info in infos]
    return [
        Student(
            name=f"student {info.method}{f' ({folder})' if methods.count(info.method) > 1 else ''}",
            folder=folder,
            info=info,
            unet=merge(model, folder, info),
        )
        for folder, info in zip(folders, infos, strict=True)
    ]


def identity_of(model: Model) -> dict[str, Any]:
    """Plain JSON values that tell a model's images, on this machine, from those of others."""
    files = model.files
    parts = [name for name in files.folder.iterdir() if name.is_dir() and name.name != "unet"]
    weights = [path for part in sorted(parts) for path in sorted(part.rglob("*")) if path.suffix in _DETERMINING]
    # The size of the images is in the one, SDXL's way with empty prompts in the other.
    weights += [files.folder / "unet" / "config.json", files.folder / "model_index.json"]
    device = model.device
    return {
        "unet": files.unet_sha256(),
        "components": {path.relative_to(files.folder).as_posix(): sha256_of(path) for path in weights},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.unet.dtype),
        "versions": versions(),
    }


_DETERMINING = {".safetensors", ".json", ".txt", ".model"}


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """Makes contestants for one model at one setting of the sampler.

    Attributes:
        model: the teacher's.
        sampler: a name in `engine.samplers.SAMPLERS`.
        steps: sampling steps.
        runner: gives a UNet's runner.
    """

    model: Model
    sampler: str
    steps: int
    runner: Callable[[UNet2DConditionModel], Runner] = TorchRunner

    @property
    def make_scheduler(self) -> Callable[[], SchedulerMixin]:
        """Gives a fresh scheduler."""
        return partial(make_scheduler, self.sampler, self.model.pipeline.scheduler.config)

    def teacher(self, guidance: float, *, reseeded: bool = False) -> Contestant:
        """The teacher at a scale; reseeded it is the control."""
        guided = guidance > 1
        return Contestant(
            name=f"teacher w={guidance:g}{' reseeded' if reseeded else ''}",
            kind="control" if reseeded else "teacher" if guided else "unguided",
            steps=self.steps,
            cost=self.steps * (1 + guided),
            open=lambda: teacher_denoiser(self.runner(self.model.unet), guidance),
            make_scheduler=self.make_scheduler,
            identity={"way": "teacher", "guidance": guidance},
            seed_offset=RESEED if reseeded else 0,
        )

    def student(self, student: Student, guidance: float) -> Contestant:
        """A student; the guidance goes to one that takes it as an input."""
        unet = student.unet
        scale = guidance if unet.config.time_cond_proj_dim is not None else None

        def opened() -> Denoiser:
            return SinglePassDenoiser(self.runner(unet), scale)

        return Contestant(
            name=student.name,
            kind="student",
            steps=self.steps,
            cost=self.steps,
            open=opened,
            make_scheduler=self.make_scheduler,
            identity={"way": "student", "adapter": student.info.adapter_sha256, "guidance": scale},
        )

    def alternative(self, setting: Alternative) -> Contestant:
        """What needs no training."""
        return Contestant(
            name=setting.name,
            kind="alternative",
            method=setting.method,
            steps=setting.steps,
            cost=setting.cost,
            open=lambda: setting.denoiser(self.runner(self.model.unet), self.make_scheduler),
            make_scheduler=self.make_scheduler,
            identity={
                "way": "interval",
                "guidance": setting.guidance,
                "first": setting.first,
                "last": setting.last,
            },
        )

    def quality_rows(self, students: Sequence[Student], guidance: float, *, alternatives: bool) -> list[Contestant]:
        """Guided teacher, unguided teacher, students, alternatives, control."""
        swept = candidates(steps=self.steps, guidance=guidance) if alternatives else []
        return [
            self.teacher(guidance),
            self.teacher(1.0),
            *(self.student(student, guidance) for student in students),
            *map(self.alternative, swept),
            self.teacher(guidance, reseeded=True),
        ]
