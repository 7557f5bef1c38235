"""A benchmark session: a model, its merged students, the sampling variants of both, and what all rows share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from diffusers import SchedulerMixin

from ..engine.errors import InputError
from ..engine.files import hash_of
from ..engine.generate import device_for
from ..engine.guidance import teacher_denoiser
from ..engine.guiders import Guider
from ..engine.merge import merged_copy
from ..engine.model import Model, ModelFiles, load, resolve_device
from ..engine.options import SAMPLER, STEPS
from ..engine.prompts import truncation_note
from ..engine.runners import Runner, TorchRunner
from ..engine.sampling import default_batch_size
from ..engine.schedulers import check_spacing, is_flow
from ..engine.student import Distilled, StudentInfo, read_student
from ..engine.versions import source_commit, versions
from .config import BenchConfig, ComposeConfig, Metrics, SamplingConfig, SweepConfig, Table1Config
from .quality.baselines import SPACINGS, Baseline, candidates
from .quality.clip_score import ClipScorer
from .quality.features import EfficientNetLite0Features, InceptionFeatures
from .quality.reference import reference_of
from .quality.samples import SampleCache, SamplingVariant, bounded_memory, launched_processes
from .speed.device import hardware
from .speed.fastest import DRAWN_BY, MANY_PASSES, FastestRunners

RESEED = 1_000_003
"""Added to the seed for the reseeded teacher: the distance that chance alone makes."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student: row name, folder, description and merged denoiser."""

    name: str
    folder: Path
    info: StudentInfo
    denoiser: Any


def read_students(
    folders: Sequence[Path], files: ModelFiles, guidance: float | None, *, one_scale: bool = True
) -> tuple[list[StudentInfo], float]:
    """Descriptions of the students, and the guidance scale of all of them, or the first one's; see `Session.open`."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a --student is given twice")
    infos = [read_student(folder, files) for folder in folders]
    scales = list(dict.fromkeys(info.choose_guidance(guidance) or info.guidance for info in infos))
    if len({info.negative_prompt for info in infos}) > 1:
        raise InputError("the students were distilled with different negative prompts: compare them one at a time")
    if any(info.teacher_guider != infos[0].teacher_guider for info in infos):
        raise InputError("the students were distilled with different guiders: compare them one at a time")
    if one_scale and len(scales) > 1:
        # One student's scale may lie in the ranges of the others.
        shared = next((each for each in scales if all(scales_for(info, [each]) == [each] for info in infos)), None)
        advice = "compare them one at a time" if shared is None else f"all can give --guidance {shared:g}, pass it"
        raise InputError(f"the students were distilled at different guidance: {advice}")
    return infos, scales[0]


def scales_for(info: Distilled, asked: Sequence[float]) -> list[float]:
    """The scales asked for that a student was distilled for; its own where it was distilled for none of them."""
    low, high = info.guidance_range or (info.guidance, info.guidance)
    return [scale for scale in asked if low <= scale <= high] or [info.guidance]


Settings = TypeVar("Settings", bound=SamplingConfig)


def with_sampling(config: Settings, students: Sequence[Path]) -> Settings:
    """The configuration with sampler and steps filled in: the few-step students' own, or the defaults.

    A sweep also gets a student's own guidance scale, where it was distilled for none of the scales.

    Raises:
        InputError: a few-step student can't take them; of a table of several settings, none of them.
    """
    infos = [read_student(folder) for folder in students]
    few_step = [info for info in infos if info.steps is not None]
    for info in few_step:
        info.choose_spacing(config.timestep_spacing)
    if isinstance(config, Table1Config):
        columns = {(sampler, steps) for sampler in config.samplers for steps in config.steps}
        for info in few_step:
            if (info.sampler, info.steps) not in columns:
                raise InputError(
                    f"a few-step student was distilled for {info.steps} steps of {info.sampler}, which no column has: "
                    f"pass --samplers {info.sampler} and --steps with {info.steps}"
                )
        return config
    if isinstance(config, ComposeConfig):
        if other := next((info for info in few_step if info.sampler != config.sampler), None):
            raise InputError(f"a few-step student was distilled for {other.sampler}: pass --sampler {other.sampler}")
        return config
    assert isinstance(config, BenchConfig | SweepConfig)
    chosen: tuple[Any, Any] = (config.sampler, config.steps)
    # A few-step student first: what the others would take by default is not its own.
    for info in (*few_step, *infos):
        chosen = info.choose_sampling(*chosen)
    values: dict[str, Any] = {"sampler": chosen[0] or SAMPLER, "steps": chosen[1] or STEPS}
    if isinstance(config, SweepConfig):
        added = (scale for info in infos for scale in scales_for(info, config.guidance))
        values["guidance"] = tuple(sorted({*config.guidance, *added}))
    return replace(config, **values)


def identity_of(model: Model) -> dict[str, Any]:
    """Plain JSON values that determine a model's images on this machine."""
    files, device = model.files, model.device
    return files.other_sha256() | {
        "denoiser": files.denoiser_sha256(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(model.denoiser.dtype),
        "versions": versions(),
    }


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model, its students and a setting of the sampler; makes sampling variants of them.

    Attributes:
        model: the teacher.
        sampler: a name in `engine.schedulers.SAMPLERS`.
        runner: gives a denoiser's runner.
        students: one merged denoiser each.
        guidance: scale of the guided teacher and of all students.
        prompts: the first N are sampled for quality.
        processes: the launched processes, where there are several.
        batch_size: images denoised together for quality.
    """

    model: Model
    sampler: str = "ddim"
    steps: int = 20
    runner: Callable[[Any], Runner] = TorchRunner
    students: Sequence[Student] = ()
    guidance: float = 3.0
    config: SamplingConfig = field(default_factory=BenchConfig)
    prompts: Sequence[str] = ()
    processes: PartialState | None = None
    batch_size: int = 8

    @classmethod
    @contextmanager
    def open(
        cls,
        files: ModelFiles,
        config: SamplingConfig,
        *,
        students: Sequence[Path],
        guidance: float | None,
        prompts: Sequence[str],
        device: str,
        guided: bool = False,
    ) -> Iterator[Session]:
        """Load the model, merge the students, and close all runners at the end; cheap checks come first.

        `guidance` is the scale for guidance-conditioned students, None for their default; `guided` says that rows with
        and without guidance are compared, so that it must be above 1. An InputError where a student, the scale, the
        prompts (at least `config.samples`) or the device can't be used.
        """
        config = with_sampling(config, students)
        check_spacing(files.scheduler_config, config.timestep_spacing)
        infos, scale = read_students(students, files, guidance, one_scale=not isinstance(config, SweepConfig))
        if guided and not scale > 1:
            raise InputError(f"--guidance {scale:g} is no guidance, there is nothing to compare: it must be above 1")
        if getattr(config, "alternatives", False) and infos and infos[0].guider != "cfg":
            raise InputError(
                f"--alternatives is for teachers with plain guidance, not with the guider {infos[0].guider}"
            )
        if len(prompts) < config.samples:
            raise InputError(f"--samples {config.samples} needs as many prompts: there are {len(prompts)}")
        target = resolve_device(device)
        if isinstance(config, ComposeConfig) and config.runner:
            device_for(config.runner, files.family, device)
        processes = launched_processes(target)
        # Under a launcher each process has its own accelerator.
        model = load(files, device=processes.device if processes else target)
        batch_size = config.sampling_batch_size or default_batch_size(model)
        names = [
            f"student {info.method}{', live' * info.live_negative_prompt}"
            + (f", {info.steps} steps" if info.steps else "")
            for info in infos
        ]
        passes, compiles = config.image_steps(len(students)), getattr(config, "compile", None) is not False
        # Where runners are timed, too, it is not the number of images that chooses them.
        composed = isinstance(config, ComposeConfig)
        max_autotune = isinstance(config, ComposeConfig) and config.max_autotune
        opened = FastestRunners(
            model,
            passes=MANY_PASSES if composed else passes,
            name=config.runner if isinstance(config, ComposeConfig) else None,
            compiles=compiles,
            freezing=composed,
            max_autotune=max_autotune,
            batch_size=batch_size,
        )
        if max_autotune and opened.name != "compiled":
            raise InputError(f"--max-autotune is for rows by torch.compile: here they are by {opened.name}")
        with opened as runners:
            yield cls(
                model=model,
                runner=runners,
                students=[
                    Student(
                        # With the folder where a name comes twice.
                        name=f"{name} ({folder})" if names.count(name) > 1 else name,
                        folder=folder,
                        info=info,
                        denoiser=merged_copy(model, folder, info),
                    )
                    for name, folder, info in zip(names, students, infos, strict=True)
                ],
                guidance=scale,
                config=config,
                prompts=prompts,
                processes=processes,
                batch_size=batch_size,
            )

    def at(self, sampler: str, steps: int) -> Session:
        """The same at another setting of the sampler, without the few-step students of others."""
        able = [s for s in self.students if s.info.steps is None or (s.info.sampler, s.info.steps) == (sampler, steps)]
        return replace(self, sampler=sampler, steps=steps, students=able)

    @property
    def spacing(self) -> str | None:
        """Timestep spacing of few-step students, and so of all rows beside them; None is the model's own."""
        own = next((each.info.timestep_spacing for each in self.students if each.info.steps is not None), None)
        return own or self.config.timestep_spacing

    @property
    def runner_name(self) -> str:
        """Of the runner that draws the images whose quality is measured."""
        return getattr(self.runner, "name", "torch")

    @property
    def guider(self) -> Guider:
        """The guider of the students, and so of the teacher."""
        guider = self.students[0].info.teacher_guider if self.students else Guider()
        return guider.for_schedule(self.model.pipeline.scheduler.config)

    @property
    def make_scheduler(self) -> Callable[[], SchedulerMixin]:
        """Gives a fresh scheduler."""
        return partial(self.model.make_scheduler, self.sampler, spacing=self.spacing)

    def _variant(self, **values: Any) -> SamplingVariant:
        shared: dict[str, Any] = {"sampler": self.sampler, "steps": self.steps, "make_scheduler": self.make_scheduler}
        return SamplingVariant(**shared | values)

    def teacher(self, guidance: float, *, reseeded: bool = False) -> SamplingVariant:
        """The teacher at a guidance scale; reseeded for the distance that chance makes."""
        guided, guider, scheduler = guidance > 1, self.guider, self.make_scheduler()
        plain = not guided or guider == Guider()
        scheduler.set_timesteps(self.steps)
        return self._variant(
            name=f"teacher w={guidance:g}{'' if plain else f' {guider.name}'}{' reseeded' if reseeded else ''}",
            role="reseeded" if reseeded else "teacher" if guided else "unguided",
            guidance=guidance,
            cost=guider.passes(scheduler.timesteps.tolist()) if guided else self.steps,
            open=lambda: teacher_denoiser(self.runner(self.model.denoiser), guidance, guider),
            identity={"mode": "teacher", "guidance": guidance} | ({} if plain else {"guider": str(guider)}),
            seed_offset=RESEED if reseeded else 0,
        )

    def student(self, student: Student, guidance: float) -> SamplingVariant:
        """A student; a guidance-conditioned one takes the scale as an input."""
        denoiser = student.denoiser
        scale = guidance if denoiser.config.get("time_cond_proj_dim") is not None else None
        return self._variant(
            name=student.name,
            role="student",
            guidance=guidance,
            cost=self.steps,
            open=lambda: student.info.denoiser(self.runner(denoiser), scale),
            identity={"mode": "student", "adapter": student.info.adapter_sha256, "guidance": scale},
        )

    def baselines(self) -> list[SamplingVariant]:
        """The training-free baselines, over timestep spacings too, unless one is asked for or the schedule has none."""
        own = self.make_scheduler().config.get("timestep_spacing")
        one = self.spacing or own == "trailing" or is_flow(self.model.pipeline.scheduler.config)
        spacings = (None,) if one else SPACINGS
        return [*map(self._baseline, candidates(steps=self.steps, guidance=self.guidance, spacings=spacings))]

    def _baseline(self, setting: Baseline) -> SamplingVariant:
        make_scheduler = partial(self.model.make_scheduler, self.sampler, spacing=setting.spacing or self.spacing)
        return self._variant(
            name=setting.name,
            role="alternative",
            method=setting.method,
            guidance=setting.guidance,
            steps=setting.steps,
            cost=setting.cost,
            open=lambda: setting.denoiser(self.runner(self.model.denoiser), make_scheduler),
            make_scheduler=make_scheduler,
            identity={"mode": "interval", **asdict(setting)},
        )

    def sample_cache(
        self,
        metrics: Metrics,
        *,
        folder: Path | None,
        on_images: Callable[[str, int], None] = lambda name, count: None,
    ) -> SampleCache:
        """Where all rows of quality come from."""
        device, path, weights = self.model.device, metrics.reference, metrics.inception_weights
        _, height, width = self.model.latent_shape
        if metrics.reference_size is not None and height != width:
            # Feature networks squeeze images into squares, which squares alone come through unharmed.
            raise InputError(
                "--reference-size cuts squares, and this model's images are none: cut the real ones before"
            )
        network = (EfficientNetLite0Features() if weights is None else InceptionFeatures(weights)).to(device)
        return SampleCache(
            model=self.model,
            network=network,
            reference=None if path is None else reference_of(path, network, size=metrics.reference_size),
            clip=None if metrics.clip is None else ClipScorer(metrics.clip, device=device),
            prompts=list(self.prompts[: self.config.samples]),
            seed=self.config.seed,
            batch_size=self.batch_size,
            negative_prompt=self.students[0].info.negative_prompt if self.students else "",
            folder=folder,
            # Images of two runners differ in the last bits.
            identity=identity_of(self.model) | {"runner": self.runner_name} if folder else {},
            on_images=on_images,
        )

    def shared_out(self, cache: SampleCache, variants: Sequence[SamplingVariant]) -> SampleCache | None:
        """The cache, filled by all processes where several were launched; None in all but the first of them."""
        if self.processes is None:
            return cache
        with bounded_memory(self.batch_size):
            cache = cache.fill(variants, self.processes)
        return cache if self.processes.is_main_process else None

    def provenance(self, cache: SampleCache | None, **hashes: str) -> dict[str, Any]:
        """Model, settings, hardware, versions, commit, and notes on what was not used, for a report."""
        device, settings, notes = self.model.device, asdict(self.config), list[str]()
        if isinstance(self.config, BenchConfig):
            settings["batch_sizes"] = list(self.config.batch_sizes_on(device))
        if cache:
            hashes |= {"features": cache.network.sha256, "prompts": hash_of(cache.prompts)}
            if cache.reference:
                hashes["reference"] = cache.reference.sha256
            if cache.clip:
                hashes["clip"] = cache.clip.sha256
            texts = {"prompts": cache.prompts, "negative prompts": [cache.negative_prompt]}
            notes += [note for what, cut in texts.items() if (note := truncation_note(self.model.pipeline, cut, what))]
            notes += cache.reference.notes if cache.reference else ()
            if self.runner_name in DRAWN_BY and not isinstance(self.config, ComposeConfig):
                notes.append(f"images of quality are drawn by {DRAWN_BY[self.runner_name]}")
        own = self.model.pipeline.scheduler.config.get("timestep_spacing")
        # Columns beside few-step students have these students' own, as their headings say.
        spacing = self.config.timestep_spacing if isinstance(self.config, Table1Config) else self.spacing
        if spacing not in (None, own) and not isinstance(self.config, ComposeConfig):
            notes.append(f"timesteps of all rows are {spacing}, the model's own {own}")
        return {
            "model": self.model.files.name,
            "guidance": self.guidance,
            "guider": str(self.guider),
            "config": settings,
            "hardware": hardware(device),
            "commit": source_commit(),
            "versions": versions("torchmetrics", "torch_fidelity", "tensorrt", "tensorrt_rtx"),
            "students": {
                str(each.folder): {
                    "method": each.info.method,
                    "adapter_sha256": each.info.adapter_sha256,
                    "settings": each.info.settings,
                }
                for each in self.students
            },
            "sampling_batch_size": self.batch_size,
            "sampling_runner": self.runner_name,
            "hashes": hashes,
            "notes": notes,
            "weights": "trained",
        }
