"""What takes part in a benchmark: a model, its students merged, every way of sampling them, and what all rows share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import SchedulerMixin, UNet2DConditionModel

from ..engine.errors import InputError
from ..engine.files import sha256_of
from ..engine.guidance import Denoiser, SinglePassDenoiser, teacher_denoiser
from ..engine.merge import merge
from ..engine.model import Model, ModelFiles, load, resolve_device
from ..engine.runners import Runner, TorchRunner
from ..engine.schedulers import make_scheduler
from ..engine.student import StudentInfo, read_student
from ..engine.versions import source_commit, versions
from .config import BenchConfig
from .fastest import SAMPLING_BATCH
from .quality.alternatives import Alternative, candidates
from .quality.metrics import Metrics
from .quality.samples import Campaign, Contestant, launched_processes
from .speed.device import hardware

RESEED = 1_000_003
"""Added to the seed for the teacher-against-teacher row: the distance that chance alone makes."""


_DETERMINING = {".safetensors", ".json", ".txt", ".model"}
"""Suffixes of the files that determine a model's images."""


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

    def own(self, name: str, opened: Callable[[], Denoiser], *, passes: int, **identity: Any) -> Contestant:
        """A denoiser of one's own, of so many passes a step; `name` and `identity` tell its images from all others'."""
        return Contestant(
            name=name,
            kind="own",
            steps=self.steps,
            cost=passes * self.steps,
            open=opened,
            make_scheduler=self.make_scheduler,
            identity={"way": name, **identity},
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


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A model and the students that are compared with it.

    Attributes:
        model: the teacher's.
        students: merged into UNets of their own.
        guidance: the scale that all of them stand for.
        config: what is measured.
        prompts: the first N are drawn for quality.
        device: of this process.
        processes: this one and its fellows, where several were launched.
    """

    model: Model
    students: list[Student]
    guidance: float
    config: BenchConfig
    prompts: list[str]
    device: torch.device
    processes: PartialState | None

    @classmethod
    def open(
        cls,
        files: ModelFiles,
        config: BenchConfig,
        *,
        students: Sequence[Path],
        infos: Sequence[StudentInfo],
        guidance: float,
        prompts: list[str],
        device: str,
    ) -> Contest:
        """Load the model and merge the students; cheap checks come first.

        Args:
            files: the model.
            config: what to measure.
            students: folders that `distill` wrote.
            infos: their descriptions, and
            guidance: the scale that all stand for, as `read_students` gives them.
            prompts: at least `config.samples`.
            device: "auto", "cpu", "cuda", …

        Raises:
            InputError: a student, the prompts or the device can't be used.
        """
        if len(prompts) < config.samples:
            raise InputError(f"--samples {config.samples} needs as many prompts: there are {len(prompts)}")
        target = resolve_device(device)
        processes = launched_processes(target)
        # Under a launcher each process has an accelerator of its own.
        target = processes.device if processes else target
        model = load(files, device=target)
        return cls(
            model=model,
            students=merged_students(model, students, infos),
            guidance=guidance,
            config=config,
            prompts=prompts,
            device=target,
            processes=processes,
        )

    def campaign(
        self, metrics: Metrics, *, cache: Path | None, on_images: Callable[[str, int], None], runner: str
    ) -> Campaign:
        """What all rows of quality share.

        Args:
            metrics: what images are judged by.
            cache: folder of the shards, or None.
            on_images: told of progress.
            runner: what runs the UNets; images of two differ in the last bits.

        Raises:
            InputError: see `Metrics`.
        """
        return Campaign(
            model=self.model,
            network=metrics.network(self.device),
            clip=metrics.scorer(self.device),
            prompts=self.prompts[: self.config.samples],
            seed=self.config.seed,
            batch_size=SAMPLING_BATCH,
            negative_prompt=self.students[0].info.negative_prompt,
            cache=cache,
            identity=identity_of(self.model) | {"runner": runner} if cache else {},
            on_images=on_images,
        )

    def provenance(self) -> dict[str, Any]:
        """Of a report: everything but the hashes."""
        students = {str(s.folder): {"method": s.info.method, "settings": s.info.settings} for s in self.students}
        return provenance_of(self.model.files, self.config, self.guidance, self.device) | {"students": students}


def provenance_of(files: ModelFiles, config: BenchConfig, guidance: float, device: torch.device) -> dict[str, Any]:
    """Model, settings, hardware, versions and commit, for a report."""
    return {
        "model": files.name,
        "guidance": guidance,
        "sampler": config.sampler,
        "steps": config.steps,
        "seed": config.seed,
        "config": asdict(config) | {"batch_sizes": list(config.batch_sizes_on(device))},
        "hardware": hardware(device),
        "commit": source_commit(),
        "versions": versions("torchmetrics", "torch_fidelity", "tensorrt", "tensorrt_rtx"),
    }
