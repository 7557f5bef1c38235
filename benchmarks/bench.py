"""`boostdiff bench`: one function from a student and its engine to figures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..engine.errors import BoostDiffError, InputError
from ..engine.exported import Engine
from ..engine.generate import IN_TORCH, LACKING
from ..engine.manifest import Manifest, read_manifest
from ..engine.memory import give_back_memory
from ..engine.model import Model, ModelFiles, resolve_device
from ..engine.runners import EXPORTED, Runner, TorchRunner, available_runners
from ..engine.schedulers import check_steps, make_scheduler
from .config import BenchConfig, Metrics
from .quality.alternatives import candidates
from .quality.quality import Quality, evaluate
from .quality.samples import SamplingVariant, bounded_memory
from .session import Session, provenance_of, read_students
from .speed.random_weights import random_model
from .speed.stock import StockVariant, stock_pipeline
from .speed.throughput import MODES, Speed, SpeedRatio, TimedVariant, measure
from .stats import Estimate

SCHEMA_VERSION = 5
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
        return " ".join([self._verdict_on_speed(), *self._verdict_on_quality()])

    def _verdict_on_speed(self) -> str:
        head = self.headline
        if head is None:
            return "Student and teacher could not be timed on one runner: there is no speed-up to report."
        estimate, steps = head.estimate, self.provenance["config"]["steps"]
        words = (
            f"The student makes images {estimate.value:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}] as fast as the "
            f"two-pass teacher ({head.faster.runner}, batch {head.batch_size}, {steps} steps; counted operations allow "
            f"{head.ceiling:.2f}x)"
        )
        if stock := self.speed.ratio("images", self.speed.students[0], baseline="stock diffusers"):
            words += f", and {stock.estimate.value:.2f}x as fast as stock diffusers with guidance"
        return f"{words}."

    def _verdict_on_quality(self) -> list[str]:
        quality = self.quality
        if quality is None:
            return ["Quality was not measured."]
        student, sentences = quality.student, []
        if student.distance is None:
            sentences.append("There was no reference of real images to measure the distance to.")
        elif delta := student.delta_to_guided:
            sentence = f"Its {quality.features} is {_compared(delta)}"
            if share := student.gain_recovered:
                sentence += (
                    f": it recovers {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of what guidance gains"
                )
            sentences.append(f"{sentence} (N = {quality.images}).")
            if not share:
                sentences.append(f"What guidance itself gains is within noise at N = {quality.images}.")
        score, of_teacher, delta = student.caption_score, quality.guided.caption_score, student.caption_delta_to_guided
        if score and of_teacher and delta:
            sentences.append(
                f"Its {quality.caption_label} is {score.value:.1f} against the teacher's {of_teacher.value:.1f} "
                f"({delta.value:+.1f} [{delta.low:+.1f}, {delta.high:+.1f}])."
            )
        return sentences

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict(),
            "speed": self.speed.as_json(),
            "skipped": self.skipped,
            "quality": self.quality.as_json() if self.quality else None,
            "provenance": self.provenance,
        }


def _compared(delta: Estimate) -> str:
    """A student's distance compared with the guided teacher's."""
    if delta.low <= 0 <= delta.high:
        return f"level with the teacher's ({delta.value:+.1f} [{delta.low:+.1f}, {delta.high:+.1f}])"
    low, high = sorted((abs(delta.low), abs(delta.high)))
    side = "worse" if delta.value > 0 else "better"
    return f"{side} than the teacher's by {abs(delta.value):.1f} [{low:.1f}, {high:.1f}]"


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
        files: the model.
        config: what to measure.
        students: student folders; the first is the engine's, the others join the quality rows.
        engine: engine folder.
        prompts: at least `config.samples`; speed uses the first ones, repeated if needed.
        metrics: what images are compared by.
        cache: folder where a killed run finds what it had sampled; None keeps nothing.
        device: "auto", "cpu", "cuda", …
        report: progress callback, with a message.
        on_images: progress callback of quality: row name, and number of images that took a step.

    Raises:
        InputError: a student, the engine, the prompts or the reference can't be used.
    """
    check_steps(files.scheduler_config, [config.sampler], [config.steps])
    manifest = read_manifest(engine)
    infos, guidance = read_students(students, files, config.guidance)
    manifest.check_student(infos[0], engine=engine)
    opened = Session.open(
        files,
        config,
        sampler=config.sampler,
        steps=config.steps,
        students=students,
        infos=infos,
        guidance=guidance,
        prompts=prompts,
        device=device,
    )
    with opened as session:
        guided, unguided, others = _quality_variants(session, config)
        samples = reference = None
        if config.samples:
            # Before speed: a network or reference that can't be used must not cost a measurement.
            samples = session.sample_cache(metrics, folder=cache, on_images=on_images)
            reference = metrics.reference_for(samples.network)
            if reference is None:
                report("quality: no --reference, so distances to real images are left out")
            samples = session.shared_out(samples, [guided, unguided, *others])
        if session.processes and not session.processes.is_main_process:
            return None
        speed, skipped = _measure_speed(session, config, manifest, engine, report)
        # Captured graphs are in reference cycles, and quality needs their memory.
        give_back_memory()
        quality = None
        if samples:
            with bounded_memory(session.batch_size):
                quality = evaluate(samples, guided=guided, unguided=unguided, others=others, reference=reference)
        return BenchResult(
            speed=speed,
            skipped=skipped | speed.left_out,
            quality=quality,
            prompts=prompts[: config.samples],
            provenance=session.provenance(samples, **manifest.inputs),
        )


def _quality_variants(
    session: Session, config: BenchConfig
) -> tuple[SamplingVariant, SamplingVariant, list[SamplingVariant]]:
    """Guided teacher, unguided teacher, and what is compared with them."""
    guidance = session.guidance
    settings = candidates(steps=config.steps, guidance=guidance) if config.alternatives else []
    others = [session.student(student, guidance) for student in session.students]
    others += [session.alternative(setting) for setting in settings]
    return session.teacher(guidance), session.teacher(1.0), [*others, session.teacher(guidance, reseeded=True)]


def _measure_speed(
    session: Session, config: BenchConfig, manifest: Manifest, engine: Path, report: Callable[[str], None]
) -> tuple[Speed, dict[str, str]]:
    """Speed on every runner, and the reason for each that can't run; all that is opened is closed again.

    Raises:
        InputError: the engine's files are incomplete or were changed.
    """
    # Torch times the teacher with the base's weights; an exported graph times all modes with the student's.
    model, device = session.model, session.model.device
    with ExitStack() as opened:
        variants, unavailable = _in_torch(model, session.students[0].unet, compiles=config.compiles(model.unet))
        reasons = available_runners(manifest, device) | unavailable
        for name, reason in reasons.items():
            if name in EXPORTED and reason is None:
                try:
                    loaded = Engine.load(engine, runner=name, device=str(device))
                except InputError:
                    raise
                except BoostDiffError as error:
                    # It is listed, but a library that it needs is missing.
                    reasons[name] = str(error)
                else:
                    exported = opened.enter_context(loaded).model
                    variants += [TimedVariant(mode=mode, runner=exported.unet, parts=exported) for mode in MODES]
        skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        for name, reason in skipped.items():
            report(f"{name}: left out, {reason}")
        speed = _speed(model, config, variants, session.guidance, list(session.prompts), report)
    return speed, skipped


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
        config: what to measure; images are not compared.
        guidance: guidance scale of the teacher; it changes no time.
        device: "auto", "cpu", "cuda", …
        report: progress callback, with a message.

    Raises:
        InputError: the model can't be built.
    """
    target = resolve_device(device)
    check_steps(files.scheduler_config, [config.sampler], [config.steps])
    report("initializing random weights")
    model = random_model(files, device=target, seed=config.seed)
    variants, skipped = _in_torch(model, model.unet, compiles=config.compiles(model.unet))
    speed = _speed(model, config, variants, guidance, ["a photograph of an astronaut"], report)
    return BenchResult(
        speed=speed,
        skipped=skipped | speed.left_out,
        quality=None,
        prompts=[],
        provenance=provenance_of(files, config, guidance, target) | {"students": {}, "hashes": {}, "weights": "random"},
    )


def _stock(model: Model) -> list[TimedVariant]:
    """Stock diffusers with guidance; nothing where its pipeline makes one pass at any guidance."""
    if model.unet.config.time_cond_proj_dim is not None:
        return []
    return [StockVariant(mode="teacher", runner=TorchRunner(model.unet), pipeline=stock_pipeline(model))]


def _in_torch(
    model: Model, student: UNet2DConditionModel, *, compiles: bool
) -> tuple[list[TimedVariant], dict[str, str]]:
    """All variants in torch, stock diffusers' too, and the reason for each runner that is unavailable."""
    variants = [*_modes(TorchRunner, model.unet, student), *_stock(model)]
    on_cuda = model.device.type == "cuda"
    unavailable: dict[str, str] = {}
    for name in [*(["captured"] if on_cuda else []), *(["compiled"] if compiles else [])]:
        if reason := LACKING[name](model.device):
            unavailable[name] = reason
            continue
        try:
            variants += _modes(partial(_on_copy, IN_TORCH[name]), model.unet, student)
        except torch.OutOfMemoryError:
            unavailable[name] = "out of memory"
    return variants, unavailable


def _on_copy(runner: Callable[[UNet2DConditionModel], Runner], unet: UNet2DConditionModel) -> Runner:
    # On CUDA all but eager torch change the memory order of the weights, and with it the speed of other rows.
    return runner(copy.deepcopy(unet) if unet.device.type == "cuda" else unet)


def _modes(
    runner: Callable[[UNet2DConditionModel], Runner], teacher: UNet2DConditionModel, student: UNet2DConditionModel
) -> list[TimedVariant]:
    """All modes of a torch runner."""
    of_teacher = runner(teacher)
    of_student = of_teacher if student is teacher else runner(student)
    return [TimedVariant(mode=mode, runner=of_student if mode == "student" else of_teacher) for mode in MODES]


def _speed(
    model: Model,
    config: BenchConfig,
    variants: list[TimedVariant],
    guidance: float,
    prompts: list[str],
    report: Callable[[str], None],
) -> Speed:
    return measure(
        variants,
        model,
        prompts=prompts,
        guidance=guidance,
        make_scheduler=partial(make_scheduler, config.sampler, model.pipeline.scheduler.config),
        steps=config.steps,
        batch_sizes=config.batch_sizes_on(model.device),
        runs=config.runs,
        on_progress=report,
    )
