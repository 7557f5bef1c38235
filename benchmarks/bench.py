"""`boostdiff bench`: one function from a student and its engine to figures."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..engine.errors import BoostDiffError, InputError
from ..engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ..engine.manifest import Manifest, read_manifest
from ..engine.model import Model, ModelFiles, load, resolve_device
from ..engine.runners import Runner, TorchRunner, available_runners, open_exported
from ..engine.samplers import make_scheduler
from ..engine.student import StudentInfo, read_student
from ..engine.versions import versions
from ..export.merge import merge
from .features import EfficientNetLite0Features, Reference, reference_from_folder
from .quality import RESEED, Contestant, Quality, judge
from .throughput import Throughput, measure

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        steps: sampling steps.
        sampler: a name in `engine.samplers.SAMPLERS`.
        batch_size: images made together when speed is measured.
        runs: whole-image timings of each.
        samples: N, images per row when quality is measured; 0 measures speed alone.
        seed: of the initial noise.
    """

    steps: int = 20
    sampler: str = "ddim"
    batch_size: int = 8
    runs: int = 9
    samples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        for name, least in (("steps", 1), ("batch_size", 1), ("runs", 3), ("samples", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.samples == 1:
            raise InputError("--samples 1 has no distribution: pass at least 2, or --speed-only")
        make_scheduler(self.sampler, {})


@dataclass(frozen=True, kw_only=True)
class Student:
    """A student that takes part, its description and its merged UNet."""

    folder: Path
    info: StudentInfo
    unet: UNet2DConditionModel

    @property
    def name(self) -> str:
        """Of its row."""
        return f"student {self.info.method}"


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Everything that a report shows.

    Attributes:
        throughputs: one per runner that ran.
        skipped: the reason against each runner that did not.
        quality: None with `samples` 0.
        prompts: of the quality's kept samples.
        provenance: hardware, versions, configuration, hashes.
    """

    throughputs: list[Throughput]
    skipped: dict[str, str]
    quality: Quality | None
    prompts: list[str]
    provenance: dict[str, Any]

    @property
    def best(self) -> Throughput:
        """The fastest runner by the student's whole-image time."""
        return min(self.throughputs, key=lambda row: row.image_student.median)

    def verdict(self) -> str:
        """One sentence: how much faster, how close in quality."""
        best = self.best
        words = (
            f"The student makes images {best.image_ratio.median:.2f}x as fast as the two-pass teacher "
            f"({best.runner}, batch {best.batch_size}, {best.steps} steps)"
        )
        if self.quality is None:
            return f"{words}; quality was not measured."
        student = self.quality.rows[2]
        if student.distance is None:
            return f"{words}; there was no reference to measure quality against."
        if student.recovered is None:
            return f"{words}; guidance gains nothing at N = {self.quality.images}: judge quality with more --samples."
        recovered = student.recovered
        return f"{words} and recovers {recovered:.0%} of the quality that guidance adds (N = {self.quality.images})."

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return {
            "report_version": REPORT_VERSION,
            "verdict": self.verdict(),
            "speed": [row.as_json() for row in self.throughputs],
            "skipped_runners": self.skipped,
            "quality": self.quality.as_json() if self.quality else None,
            "provenance": self.provenance,
        }


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    described: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _check_engine(manifest: Manifest, info: StudentInfo, engine: Path, student: Path) -> None:
    if manifest.inputs.get("adapter") != info.adapter_sha256 or manifest.inputs.get("unet") != info.unet_sha256:
        raise InputError(
            f"the engine in {engine} was exported from another student than {student}: run `boostdiff export` again"
        )


def bench(
    files: ModelFiles,
    config: BenchConfig,
    *,
    students: list[Path],
    engine: Path,
    prompts: list[str],
    reference: Path | None,
    device: str = "auto",
    report: Callable[[str], None] = lambda message: None,
    on_images: Callable[[str, int], None] = lambda name, count: None,
) -> BenchResult:
    """Measure speed on every runner of this machine, then quality.

    Args:
        files: the model.
        config: what to measure.
        students: folders; the first is the engine's, the others join the quality rows.
        engine: what `export` wrote.
        prompts: at least `config.samples`; speed uses the first ones, repeated if needed.
        reference: a features file or a folder of real images; None leaves the distances out.
        device: "auto", "cpu", "cuda", …
        report: told of each stage in words.
        on_images: told of quality's progress: the row's name and how many images took a step.

    Raises:
        InputError: a student, the engine, the prompts or the reference can't be used.
    """
    manifest = read_manifest(engine)
    infos = [read_student(folder, files) for folder in students]
    _check_engine(manifest, infos[0], engine, students[0])
    if len({info.guidance for info in infos}) > 1:
        raise InputError("the students were distilled at different guidance: compare them one at a time")
    if len(prompts) < config.samples:
        raise InputError(f"--samples {config.samples} needs as many prompts: there are {len(prompts)}")
    guidance = infos[0].guidance
    target = resolve_device(device)
    model = load(files, device=target)
    taking_part = [
        Student(folder=folder, info=info, unet=merge(model, folder, info))
        for folder, info in zip(students, infos, strict=True)
    ]
    scheduler = partial(make_scheduler, config.sampler, model.pipeline.scheduler.config)

    throughputs: list[Throughput] = []
    reasons = available_runners(manifest, target)
    for name, reason in reasons.items():
        if reason is not None:
            report(f"{name}: left out, {reason}")
            continue
        runner: Runner
        if name == "torch":
            runner = TorchRunner(taking_part[0].unet)
        else:
            runner = open_exported(name, folder=engine, manifest=manifest, device=target)
        with runner:
            row = measure(
                runner,
                model,
                prompts=[prompts[i % len(prompts)] for i in range(config.batch_size)],
                guidance=guidance,
                make_scheduler=scheduler,
                steps=config.steps,
                runs=config.runs,
                on_progress=partial(_report_timing, report, name),
            )
        throughputs.append(row)
    quality = None
    if config.samples:
        quality = _quality(model, taking_part, config, guidance, prompts, reference, scheduler, report, on_images)
    return BenchResult(
        throughputs=throughputs,
        skipped={name: reason for name, reason in reasons.items() if reason},
        quality=quality,
        prompts=prompts[: config.samples],
        provenance={
            "model": files.name,
            "guidance": guidance,
            "sampler": config.sampler,
            "steps": config.steps,
            "seed": config.seed,
            "students": {str(s.folder): {"method": s.info.method, "settings": s.info.settings} for s in taking_part},
            "hashes": manifest.inputs,
            "hardware": hardware(target),
            "versions": versions("torchmetrics", "tensorrt", "tensorrt_rtx"),
        },
    )


def _report_timing(report: Callable[[str], None], runner: str, stage: str) -> None:
    report(f"{runner}: timing {stage}")


def _quality(
    model: Model,
    students: list[Student],
    config: BenchConfig,
    guidance: float,
    prompts: list[str],
    reference: Path | None,
    scheduler: Callable[[], Any],
    report: Callable[[str], None],
    on_images: Callable[[str, int], None],
) -> Quality:
    network = EfficientNetLite0Features().to(model.device)
    statistics = None
    if reference is not None:
        from_folder = reference.is_dir() or not reference.exists()
        statistics = reference_from_folder(reference, network) if from_folder else Reference.load(reference)
    else:
        report("quality: no --reference, so distances to real images are left out")

    def guided() -> Denoiser:
        return GuidedDenoiser(TorchRunner(model.unet), guidance)

    def single(unet: UNet2DConditionModel) -> Denoiser:
        return SinglePassDenoiser(TorchRunner(unet))

    contestants = [
        Contestant(name=f"teacher w={guidance:g}", passes=2, open=guided),
        Contestant(name="teacher w=1", passes=1, open=partial(single, model.unet)),
        *(Contestant(name=s.name, passes=1, open=partial(single, s.unet)) for s in students),
        Contestant(name=f"teacher w={guidance:g} reseeded", passes=2, open=guided, seed_offset=RESEED),
    ]
    small = model.latent_shape[-1] <= 16
    try:
        return judge(
            model,
            contestants,
            network=network,
            reference=statistics,
            prompts=prompts[: config.samples],
            make_scheduler=scheduler,
            steps=config.steps,
            seed=config.seed,
            batch_size=50 if small else 8,
            on_images=on_images,
        )
    except torch.OutOfMemoryError:
        raise BoostDiffError("out of memory while sampling: pass a smaller --samples or use another device") from None
