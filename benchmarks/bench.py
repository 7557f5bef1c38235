"""`boostdiff bench`: one function from a student and its engine to figures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..engine.captured import CapturedRunner
from ..engine.compiled import CompiledRunner, missing_compiler, with_bfloat16_vae
from ..engine.config import EXPORTED
from ..engine.manifest import read_manifest
from ..engine.memory import give_back_memory
from ..engine.model import Model, ModelFiles, resolve_device
from ..engine.options import STEPS
from ..engine.runners import Runner, TorchRunner, chosen_graph, unavailable
from ..engine.schedulers import check_spacing, check_steps
from ..engine.student import read_student
from .config import BenchConfig, Metrics
from .quality.quality import Quality, evaluate
from .quality.samples import SamplingVariant, bounded_memory
from .session import Session, with_sampling
from .speed.engines import opened_engine
from .speed.fastest import pays_to_compile
from .speed.random_weights import random_model
from .speed.stock import StockVariant, stock_pipeline
from .speed.throughput import MODES, Speed, SpeedRatio, TimedVariant, measure
from .stats import Estimate

SCHEMA_VERSION = 6
"""Version of `report.json`."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Everything that a report shows.

    Attributes:
        speed: every variant at every batch size.
        skipped: reason by runner, or by variant and batch size, that did not run.
        quality: None with `samples` 0.
        prompts: prompts of the quality's samples.
        provenance: hardware, versions, configuration, hashes.
    """

    speed: Speed
    skipped: dict[str, str]
    quality: Quality | None
    prompts: list[str]
    provenance: dict[str, Any]

    @property
    def headline(self) -> SpeedRatio | None:
        """Teacher over student, whole images, at the student's highest rate; None if they were never timed together."""
        return next((ratio for row in self.speed.students if (ratio := self.speed.ratio("images", row))), None)

    def verdict(self) -> str:
        """How much faster, how close in quality: two or three sentences."""
        return " ".join([self._speed_verdict(), *self._quality_verdict()])

    def _speed_verdict(self) -> str:
        head = self.headline
        if head is None:
            return "Student and teacher could not be timed on one runner: there is no speed-up to report."
        words = (
            f"The student makes images {head.estimate:.2fx} as fast as the two-pass teacher on the same runner "
            f"({head.faster.runner}, batch {head.batch_size}, {self.provenance['config']['steps']} steps; counted "
            f"operations allow {head.ceiling:.2f}x)"
        )
        # Of the same row, which need not be the fastest.
        of_head = next(
            row for row in self.speed.students if (row.runner, row.batch_size) == (head.faster.runner, head.batch_size)
        )
        fastest = self.speed.fastest_teacher(head.batch_size)
        runner = fastest.runner if fastest else head.slower.runner
        if runner not in (head.slower.runner, "stock diffusers") and (
            ratio := self.speed.ratio("images", of_head, baseline=runner)
        ):
            words += f", {ratio.estimate:.2fx} as fast as the fastest two-pass teacher ({runner})"
        if ratio := self.speed.ratio("images", of_head, baseline="stock diffusers"):
            words += f", and {ratio.estimate:.2fx} as fast as stock diffusers with guidance"
            words += ", the fastest two-pass teacher" if runner == "stock diffusers" else ""
        return f"{words}."

    def _quality_verdict(self) -> list[str]:
        quality = self.quality
        if quality is None:
            return ["Quality was not measured."]
        student, sentences = quality.student, []
        if student.distance is None:
            sentences.append("There was no reference of real images to measure the distance to.")
        elif student.distance_interval is None:
            sentences.append(f"N = {quality.images} images are too few to compare quality: --samples 200 is usual.")
        elif delta := student.delta_to_guided:
            sentence = f"Its {quality.features} {_compared(delta)}"
            if share := student.gain_recovered:
                sentence += f": it recovers {share:.0%} of what guidance gains"
            sentences.append(f"{sentence} (N = {quality.images}).")
            if not share:
                sentences.append(f"What guidance itself gains is within noise at N = {quality.images}.")
        score, of_teacher, delta = student.caption_value, quality.guided.caption_value, student.caption_delta_to_guided
        if delta:
            sentences.append(
                f"Its {quality.caption_label} is {score:.1f} against the teacher's {of_teacher:.1f} ({delta:+.1f})."
            )
        return sentences

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict(),
            "speed": asdict(self.speed),
            "skipped": self.skipped,
            "quality": self.quality.as_json() if self.quality else None,
            "provenance": self.provenance,
        }


def _compared(delta: Estimate) -> str:
    """A student's distance compared with the guided teacher's."""
    if delta.low <= 0 <= delta.high:
        return f"is within noise of the teacher's ({delta:+.1f})"
    # A lower distance is a difference from the teacher, too: it is no better copy.
    side = "farther from real images" if delta.value > 0 else "nearer to real images, no closer copy of the teacher"
    return f"differs from the teacher's by {delta:+.1f} ({side})"


def bench(
    files: ModelFiles,
    config: BenchConfig,
    *,
    students: list[Path],
    engine: Path,
    prompts: list[str],
    metrics: Metrics,
    cache: Path | None = None,
    device: str = "auto",
    report: Callable[[str], None] = lambda message: None,
    on_images: Callable[[str, int], None] = lambda name, count: None,
) -> BenchResult | None:
    """Measure speed on every runner of this machine, and quality.

    Where several processes were launched, they share the sampling through `cache`, and only the first has a result.

    Args:
        students: student folders; the first is the engine's, the others join the quality rows.
        prompts: at least `config.samples`; speed uses the first ones, repeated if needed.
        cache: folder where a killed run finds what it had sampled; None keeps nothing.
        device: "auto", "cpu", "cuda", …
        on_images: progress callback of quality: row name, and number of images that took a step.

    An InputError where a student, the engine, the prompts or the reference can't be used.
    """
    config = with_sampling(config, students)
    sampler, steps = str(config.sampler), config.steps or STEPS
    info = read_student(students[0])
    check_steps(files.scheduler_config, [sampler], [steps], spacing=info.choose_spacing(config.timestep_spacing))
    manifest = read_manifest(engine)
    manifest.check_student(info, engine=engine)
    if config.precision:
        chosen_graph(
            manifest.denoiser,
            folder=engine,
            manifest=manifest,
            device=resolve_device(device),
            precision=config.precision,
        )
    opened = Session.open(
        files, config, students=students, guidance=config.guidance, prompts=prompts, device=device, guided=True
    )
    with opened as session:
        session = session.at(sampler, steps)
        variants = _quality_variants(session, config)
        samples = None
        if config.samples:
            # Before speed: a network or reference that can't be used must not cost a measurement.
            samples = session.sample_cache(metrics, folder=cache, on_images=on_images)
            if samples.reference is None:
                report("quality: no --reference, so distances to real images are left out")
            samples = session.shared_out(samples, variants)
        if session.processes and not session.processes.is_main_process:
            return None
        speed, skipped = _measure_speed(session, config, report, engine=engine)
        # Graphs may be in reference cycles, and quality needs their memory.
        give_back_memory()
        quality = None
        if samples:
            with bounded_memory(session.batch_size):
                quality = evaluate(samples, variants)
        return BenchResult(
            speed=speed,
            skipped=skipped,
            quality=quality,
            prompts=prompts[: config.samples],
            provenance=session.provenance(samples, **manifest.inputs),
        )


def _quality_variants(session: Session, config: BenchConfig) -> list[SamplingVariant]:
    """Guided teacher, unguided teacher, and what is compared with them."""
    guidance = session.guidance
    return [
        session.teacher(guidance),
        session.teacher(1.0),
        *(session.student(student, guidance) for student in session.students),
        *(session.baselines() if config.alternatives else ()),
        session.teacher(guidance, reseeded=True),
    ]


def bench_random(
    files: ModelFiles,
    config: BenchConfig,
    *,
    device: str = "auto",
    report: Callable[[str], None] = lambda message: None,
) -> BenchResult:
    """Measure the speed of a model from what `locate_configs` finds, with random weights, in torch."""
    config = with_sampling(config, [])
    sampler, steps = str(config.sampler), config.steps or STEPS
    check_spacing(files.scheduler_config, config.timestep_spacing)
    check_steps(files.scheduler_config, [sampler], [steps], spacing=config.timestep_spacing)
    report("initializing random weights")
    model = random_model(files, device=resolve_device(device), seed=config.seed)
    session = Session(
        model=model, sampler=sampler, steps=steps, config=config, prompts=["a photograph of an astronaut"]
    )
    speed, skipped = _measure_speed(session, config, report)
    return BenchResult(
        speed=speed,
        skipped=skipped,
        quality=None,
        prompts=[],
        provenance=session.provenance(None) | {"weights": "random", "sampling_batch_size": None},
    )


def _measure_speed(
    session: Session, config: BenchConfig, report: Callable[[str], None], *, engine: Path | None = None
) -> tuple[Speed, dict[str, str]]:
    """Speed in torch and on the engine's runners, and the reason for what could not run; all that is opened is closed.

    Torch times the teacher with the base's weights; an exported graph times all modes with the student's.
    """
    model, device = session.model, session.model.device
    with ExitStack() as opened:
        student = session.students[0].denoiser if session.students else model.denoiser
        variants, skipped = _in_torch(model, student, config)
        if engine is not None:
            variants += _exported(engine, config, device, opened=opened, skipped=skipped)
        for name, reason in skipped.items():
            report(f"{name}: left out, {reason}")
        speed = measure(
            variants,
            model,
            prompts=session.prompts,
            guidance=session.guidance,
            guider=session.guider,
            make_scheduler=session.make_scheduler,
            steps=session.steps,
            batch_sizes=config.batch_sizes_on(device),
            runs=config.runs,
            on_progress=report,
        )
    return speed, skipped | speed.left_out


def _in_torch(model: Model, student: Any, config: BenchConfig) -> tuple[list[TimedVariant], dict[str, str]]:
    """All variants in torch, stock diffusers' too, and for each of our runners that is unavailable the reason."""
    denoiser, on_gpu, skipped = model.denoiser, model.device.type == "cuda", {}
    variants = _modes(TorchRunner, denoiser, student)
    if denoiser.config.get("time_cond_proj_dim") is None:
        # Else the stock pipeline makes one pass at any guidance.
        variants.append(StockVariant(mode="teacher", runner=TorchRunner(denoiser), pipeline=stock_pipeline(model)))
    others: list[tuple[str, Any, Sequence[int] | None]] = (
        [("captured", CapturedRunner, None)] if on_gpu and model.family.capturable else []
    )
    compiles = config.compile
    if compiles is None:
        compiles = config.max_autotune or pays_to_compile(denoiser)
    if compiles:
        compiled = partial(CompiledRunner, max_autotune=config.max_autotune)
        others.append(("compiled", compiled, config.compiled_batch_sizes()))
    for name, runner, batch_sizes in others:
        if name == "compiled" and (reason := missing_compiler(model.device)):
            skipped[name] = reason
            continue
        try:
            made = _modes(partial(_copied, runner) if on_gpu else runner, denoiser, student)
        except torch.OutOfMemoryError:
            skipped[name] = "out of memory"
            continue
        own = with_bfloat16_vae(model) if name == "compiled" else None
        variants += [replace(variant, batch_sizes=batch_sizes, model=own) for variant in made]
    return variants, skipped


def _exported(
    engine: Path, config: BenchConfig, device: torch.device, *, opened: ExitStack, skipped: dict[str, str]
) -> list[TimedVariant]:
    """All modes on each of an engine's runners, open until `opened` is closed; `skipped` takes why others are not."""
    manifest, variants = read_manifest(engine), []
    for name in EXPORTED:
        if reason := unavailable(name, manifest, device):
            skipped[name] = reason
            continue
        precision = config.precision if name == "onnx" else None
        loaded = opened_engine(
            engine, runner=name, device=device, precision=precision, label=name, opened=opened, left_out=skipped
        )
        if loaded is not None:
            exported = loaded.model
            variants += [TimedVariant(mode=mode, runner=exported.denoiser, model=exported) for mode in MODES]
    return variants


def _copied(runner: Callable[[Any], Runner], denoiser: Any) -> Runner:
    # It changes the memory order of the weights, and with it the speed of other rows.
    return runner(copy.deepcopy(denoiser))


def _modes(runner: Callable[[Any], Runner], teacher: Any, student: Any) -> list[TimedVariant]:
    """All modes of a torch runner."""
    of_teacher = runner(teacher)
    of_student = of_teacher if student is teacher else runner(student)
    return [TimedVariant(mode=mode, runner=of_student if mode == "student" else of_teacher) for mode in MODES]
