"""`boostdiff bench`: one function from a student and its engine to figures."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..engine.errors import BoostDiffError, InputError
from ..engine.files import sha256_of
from ..engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ..engine.manifest import Manifest, read_manifest
from ..engine.model import Model, ModelFiles, load, resolve_device
from ..engine.runners import TorchRunner, available_runners, open_exported
from ..engine.samplers import make_scheduler
from ..engine.student import StudentInfo, read_student
from ..engine.versions import versions
from ..export.merge import merge
from .baselines import CompiledRunner, StockEntrant, stock_pipeline
from .features import EfficientNetLite0Features, Reference, reference_from_folder
from .quality import RESEED, Contestant, Quality, judge
from .random_weights import random_model
from .throughput import WAYS, Entrant, Speed, SpeedRatio, measure

SCHEMA_VERSION = 3
"""Of `report.json`; the schema lies beside this module in `report.schema.json`."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        steps: sampling steps.
        sampler: a name in `engine.samplers.SAMPLERS`.
        batch_sizes: images made together when speed is measured; None takes 8 on a CPU, else 1, 2, 4, 8, 16.
        runs: timed batches of each.
        samples: N, images per row when quality is measured; 0 measures speed alone.
        seed: of the initial noise.
        guidance: of a student that takes it as an input, and of its teacher; None takes the student's own.
        compile: also time teacher and student through `torch.compile`; None does so on CUDA, as it takes minutes.
    """

    steps: int = 20
    sampler: str = "ddim"
    batch_sizes: tuple[int, ...] | None = None
    runs: int = 9
    samples: int = 200
    seed: int = 0
    guidance: float | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        if self.batch_sizes is not None and min(self.batch_sizes, default=0) < 1:
            raise InputError("--batch-sizes must be at least 1, as in --batch-sizes 1,2,4")
        for name, least in (("steps", 1), ("runs", 3), ("samples", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.samples == 1:
            raise InputError("--samples 1 has no distribution: pass at least 2, or --speed-only")
        make_scheduler(self.sampler, {})

    def compiles_on(self, device: torch.device) -> bool:
        """Whether to time `torch.compile` on a device."""
        return device.type == "cuda" if self.compile is None else self.compile

    def batch_sizes_on(self, device: torch.device) -> tuple[int, ...]:
        """The batch sizes to measure on a device, ascending."""
        default = (8,) if device.type == "cpu" else (1, 2, 4, 8, 16)
        return tuple(sorted(set(self.batch_sizes or default)))


def parse_batch_sizes(text: str | None) -> tuple[int, ...] | None:
    """`1,2,4` to numbers; None stays None.

    Raises:
        InputError: it is no list of whole numbers.
    """
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--batch-sizes {text!r} is no list of whole numbers, such as 1,2,4") from None


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
        speed: of every entrant at every batch size.
        skipped: the reason against each runner, or entrant at a batch size, that did not run.
        quality: None with `samples` 0.
        prompts: of the quality's kept samples.
        provenance: hardware, versions, configuration, hashes.
    """

    speed: Speed
    skipped: dict[str, str]
    quality: Quality | None
    prompts: list[str]
    provenance: dict[str, Any]

    @property
    def headline(self) -> SpeedRatio:
        """Teacher over student, whole images, where the student makes most images per second.

        Raises:
            BoostDiffError: the teacher ran nowhere that the student did.
        """
        students = sorted(
            (row for row in self.speed.rows if row.way == "student"), key=lambda row: -row.images_per_second.value
        )
        for row in students:
            if ratio := self.speed.ratio("images", row):
                return ratio
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
        raise BoostDiffError(f"teacher and student could not be timed on one runner ({reasons})")

    def verdict(self) -> str:
        """One sentence: how much faster, how close in quality."""
        head = self.headline
        estimate, runner = head.estimate, head.faster.removesuffix(" student")
        words = (
            f"The student makes images {estimate.value:.2f}x [{estimate.low:.2f}–{estimate.high:.2f}] as fast as the "
            f"two-pass teacher ({runner}, batch {head.batch_size}, {self.provenance['steps']} steps; counted "
            f"operations allow {head.ceiling:.2f}x)"
        )
        if stock := self.speed.over_baseline("stock diffusers", self.speed.fastest):
            words += f", {stock.estimate.value:.2f}x as fast as stock diffusers with guidance"
        if self.quality is None:
            return f"{words}; quality was not measured."
        student = self.quality.rows[2]
        if student.distance is None:
            return f"{words}; there was no reference to measure quality against."
        recovered, interval = student.recovered, student.recovered_interval
        if recovered is None or interval is None:
            return (
                f"{words}; what guidance gains is within noise at N = {self.quality.images}: "
                "judge quality with more --samples."
            )
        return (
            f"{words} and recovers {recovered:.0%} [{interval.low:.0%}–{interval.high:.0%}] of the quality that "
            f"guidance adds (N = {self.quality.images})."
        )

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`, as `report.schema.json` describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict(),
            "speed": self.speed.as_json(),
            "skipped": self.skipped,
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
    scales = {info.choose_guidance(config.guidance) or info.guidance for info in infos}
    if len({info.negative_prompt for info in infos}) > 1:
        raise InputError("the students were distilled with different negative prompts: compare them one at a time")
    if len(scales) > 1:
        raise InputError("the students were distilled at different guidance: compare them one at a time")
    if len(prompts) < config.samples:
        raise InputError(f"--samples {config.samples} needs as many prompts: there are {len(prompts)}")
    (guidance,) = scales
    target = resolve_device(device)
    model = load(files, device=target)
    taking_part = [
        Student(folder=folder, info=info, unet=merge(model, folder, info))
        for folder, info in zip(students, infos, strict=True)
    ]
    scheduler = partial(make_scheduler, config.sampler, model.pipeline.scheduler.config)

    reasons = available_runners(manifest, target)
    for name, reason in reasons.items():
        if reason is not None:
            report(f"{name}: left out, {reason}")
    with ExitStack() as opened:
        # torch has the base's weights at hand for the teacher; an exported graph serves all with the student's.
        base, merged = (opened.enter_context(TorchRunner(unet)) for unet in (model.unet, taking_part[0].unet))
        entrants = [Entrant(way=way, runner=merged if way == "student" else base) for way in WAYS]
        entrants += _baselines(model, config, opened, student=taking_part[0].unet)
        for name, reason in reasons.items():
            if name != "torch" and reason is None:
                runner = opened.enter_context(open_exported(name, folder=engine, manifest=manifest, device=target))
                entrants += [Entrant(way=way, runner=runner) for way in WAYS]
        speed = _speed(model, config, entrants, guidance, prompts, report)
    quality, hashes = None, dict(manifest.inputs)
    if config.samples:
        network = EfficientNetLite0Features().to(model.device)
        hashes["features"] = sha256_of(network.weights_path)
        quality = _quality(
            model, network, taking_part, config, guidance, prompts, reference, scheduler, report, on_images
        )
    students_used = {str(s.folder): {"method": s.info.method, "settings": s.info.settings} for s in taking_part}
    return BenchResult(
        speed=speed,
        skipped={name: reason for name, reason in reasons.items() if reason} | speed.left_out,
        quality=quality,
        prompts=prompts[: config.samples],
        provenance=_provenance(files, config, guidance, target)
        | {"students": students_used, "hashes": hashes, "weights": "trained"},
    )


def bench_random(
    files: ModelFiles,
    config: BenchConfig,
    *,
    guidance: float = 3.0,
    device: str = "auto",
    report: Callable[[str], None] = lambda message: None,
) -> BenchResult:
    """Measure the speed of a model from its configuration alone, with random weights, in torch.

    Args:
        files: the model's configuration, as `random_weights.locate_configs` finds it.
        config: what to measure; `samples` must be 0.
        guidance: of the teacher; it changes no time.
        device: "auto", "cpu", "cuda", …
        report: told of each stage in words.

    Raises:
        InputError: the model can't be built, or images were asked for.
    """
    if config.samples:
        raise InputError("--random-weights draws noise, not pictures: pass --speed-only with it")
    target = resolve_device(device)
    report("initialising random weights")
    model = random_model(files, device=target, seed=config.seed)
    with ExitStack() as opened:
        runner = opened.enter_context(TorchRunner(model.unet))
        entrants = [Entrant(way=way, runner=runner) for way in WAYS]
        entrants += _baselines(model, config, opened, student=model.unet)
        speed = _speed(model, config, entrants, guidance, ["a photograph of an astronaut"], report)
    return BenchResult(
        speed=speed,
        skipped=speed.left_out,
        quality=None,
        prompts=[],
        provenance=_provenance(files, config, guidance, target) | {"students": {}, "hashes": {}, "weights": "random"},
    )


def _baselines(model: Model, config: BenchConfig, opened: ExitStack, *, student: UNet2DConditionModel) -> list[Entrant]:
    """Stock diffusers with guidance, and `torch.compile` where it is wanted."""
    entrants: list[Entrant] = []
    if model.unet.config.time_cond_proj_dim is None:
        # Otherwise a stock pipeline makes one pass, whatever its guidance.
        entrants.append(StockEntrant(way="teacher", runner=TorchRunner(model.unet), pipeline=stock_pipeline(model)))
    if config.compiles_on(model.device):
        for way, unet in (("teacher", model.unet), ("student", student)):
            entrants.append(Entrant(way=way, runner=opened.enter_context(CompiledRunner(unet))))
    return entrants


def _provenance(files: ModelFiles, config: BenchConfig, guidance: float, device: torch.device) -> dict[str, Any]:
    return {
        "model": files.name,
        "guidance": guidance,
        "sampler": config.sampler,
        "steps": config.steps,
        "seed": config.seed,
        "config": asdict(config) | {"batch_sizes": list(config.batch_sizes_on(device))},
        "hardware": hardware(device),
        "versions": versions("torchmetrics", "tensorrt", "tensorrt_rtx"),
    }


def _speed(
    model: Model,
    config: BenchConfig,
    entrants: list[Entrant],
    guidance: float,
    prompts: list[str],
    report: Callable[[str], None],
) -> Speed:
    return measure(
        entrants,
        model,
        prompts=prompts,
        guidance=guidance,
        make_scheduler=partial(make_scheduler, config.sampler, model.pipeline.scheduler.config),
        steps=config.steps,
        batch_sizes=config.batch_sizes_on(model.device),
        runs=config.runs,
        on_progress=report,
    )


def _quality(
    model: Model,
    network: torch.nn.Module,
    students: list[Student],
    config: BenchConfig,
    guidance: float,
    prompts: list[str],
    reference: Path | None,
    scheduler: Callable[[], Any],
    report: Callable[[str], None],
    on_images: Callable[[str, int], None],
) -> Quality:
    statistics = None
    if reference is not None:
        from_folder = reference.is_dir() or not reference.exists()
        statistics = reference_from_folder(reference, network) if from_folder else Reference.load(reference)
    else:
        report("quality: no --reference, so distances to real images are left out")

    def guided() -> Denoiser:
        return GuidedDenoiser(TorchRunner(model.unet), guidance)

    def single(unet: UNet2DConditionModel) -> Denoiser:
        conditioned = unet.config.time_cond_proj_dim is not None
        return SinglePassDenoiser(TorchRunner(unet), guidance if conditioned else None)

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
            negative_prompt=students[0].info.negative_prompt,
            make_scheduler=scheduler,
            steps=config.steps,
            seed=config.seed,
            batch_size=50 if small else 8,
            on_images=on_images,
        )
    except torch.OutOfMemoryError:
        raise BoostDiffError("out of memory while sampling: pass a smaller --samples or use another device") from None
