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
from ..engine.schedulers import make_scheduler
from .config import BenchConfig
from .fastest import FastestRunners
from .quality.metrics import Metrics, bounded_memory
from .quality.quality import Quality, judge
from .session import Contest, Lineup, provenance_of, read_students
from .speed.random_weights import random_model
from .speed.stock import StockEntrant, stock_pipeline
from .speed.throughput import WAYS, Entrant, Speed, SpeedRatio, measure
from .stats import Estimate

SCHEMA_VERSION = 4
"""Of `report.json`."""


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
        student = self.quality.student
        if student.distance is None:
            return f"{words}; there was no reference to measure quality against."
        if behind := student.behind:
            words += f"; {_behind_in_words(behind, self.quality.features)}"
        recovered, interval = student.recovered, student.recovered_interval
        if recovered is None or interval is None:
            return f"{words}; what guidance gains the teacher is within noise at N = {self.quality.images}."
        return (
            f"{words}; it recovers {recovered:.0%} [{interval.low:.0%}–{interval.high:.0%}] of the quality that "
            f"guidance adds (N = {self.quality.images})."
        )

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

    Where several processes were launched, they share the sampling out, through `cache`.

    Args:
        files: the model.
        config: what to measure.
        students: folders; the first is the engine's, the others join the quality rows.
        engine: what `export` wrote.
        prompts: at least `config.samples`; speed uses the first ones, repeated if needed.
        metrics: what images are judged by.
        cache: folder where a killed run finds what it had sampled; None keeps nothing.
        device: "auto", "cpu", "cuda", …
        report: told of each stage in words.
        on_images: told of quality's progress: the row's name and how many images took a step.

    Raises:
        InputError: a student, the engine, the prompts or the reference can't be used.
    """
    manifest = read_manifest(engine)
    infos, guidance = read_students(students, files, config.guidance)
    manifest.check_student(infos[0], engine=engine)
    contest = Contest.open(
        files, config, students=students, infos=infos, guidance=guidance, prompts=prompts, device=device
    )
    model, processes = contest.model, contest.processes
    compiles = config.compiles(model.unet)
    with FastestRunners(model, passes=config.denoised(len(students)), compiles=compiles) as runners:
        lineup = Lineup(model=model, sampler=config.sampler, steps=config.steps, runner=runners)
        rows = lineup.quality_rows(contest.students, guidance, alternatives=config.alternatives)
        hashes, campaign, real = dict(manifest.inputs), None, None
        if config.samples:
            if metrics.reference is None:
                report("quality: no --reference, so distances to real images are left out")
            campaign = contest.campaign(metrics, cache=cache, on_images=on_images, runner=runners.name)
            real = metrics.reference_for(campaign.network)
            hashes["features"] = campaign.network.sha256
            if campaign.clip:
                hashes["clip"] = campaign.clip.sha256
            if processes:
                with bounded_memory():
                    campaign = campaign.fill(rows, processes)
        if processes and not processes.is_main_process:
            return None

        speed, skipped = _timed(contest, manifest, engine, compiles=compiles, report=report)
        # Captured graphs are in cycles, and quality needs their memory.
        give_back_memory()
        quality = None
        if campaign:
            with bounded_memory():
                quality = judge(campaign, rows, reference=real)
    return BenchResult(
        speed=speed,
        skipped=skipped | speed.left_out,
        quality=quality,
        prompts=prompts[: config.samples],
        provenance=contest.provenance() | {"hashes": hashes, "weights": "trained"},
    )


def _timed(
    contest: Contest, manifest: Manifest, engine: Path, *, compiles: bool, report: Callable[[str], None]
) -> tuple[Speed, dict[str, str]]:
    """Speed on every runner, and the reason against each that can't run; all that is opened is closed again.

    Raises:
        InputError: the engine's files are incomplete or were changed.
    """
    # Torch has the base's weights at hand for the teacher; an exported graph serves all with the student's.
    model, merged = contest.model, contest.students[0].unet
    with ExitStack() as opened:
        entrants, lacking = _in_torch(model, merged, compiles=compiles)
        reasons = available_runners(manifest, contest.device) | lacking
        for name, reason in reasons.items():
            if name in EXPORTED and reason is None:
                try:
                    loaded = Engine.load(engine, runner=name, device=str(contest.device))
                except InputError:
                    raise
                except BoostDiffError as error:
                    # It is listed, but a library that it needs is missing.
                    reasons[name] = str(error)
                else:
                    exported = opened.enter_context(loaded).model
                    entrants += [Entrant(way=way, runner=exported.unet, parts=exported) for way in WAYS]
        skipped = {name: reason for name, reason in reasons.items() if reason is not None}
        for name, told in skipped.items():
            report(f"{name}: left out, {told}")
        return _speed(model, contest.config, entrants, contest.guidance, contest.prompts, report), skipped


def _behind_in_words(behind: Estimate, features: str) -> str:
    """How a student's distance compares with the guided teacher's."""
    if behind.low <= 0 <= behind.high:
        return (
            f"its {features} is level with the teacher's ({behind.value:+.1f} [{behind.low:+.1f}, {behind.high:+.1f}])"
        )
    low, high = sorted((abs(behind.low), abs(behind.high)))
    side = "worse" if behind.value > 0 else "better"
    return f"its {features} is {side} than the teacher's by {abs(behind.value):.1f} [{low:.1f}, {high:.1f}]"


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
    entrants, skipped = _in_torch(model, model.unet, compiles=config.compiles(model.unet))
    speed = _speed(model, config, entrants, guidance, ["a photograph of an astronaut"], report)
    return BenchResult(
        speed=speed,
        skipped=skipped | speed.left_out,
        quality=None,
        prompts=[],
        provenance=provenance_of(files, config, guidance, target) | {"students": {}, "hashes": {}, "weights": "random"},
    )


def _stock(model: Model) -> list[Entrant]:
    """Stock diffusers with guidance; nothing where its pipeline makes one pass, whatever its guidance."""
    if model.unet.config.time_cond_proj_dim is not None:
        return []
    return [StockEntrant(way="teacher", runner=TorchRunner(model.unet), pipeline=stock_pipeline(model))]


def _in_torch(model: Model, student: UNet2DConditionModel, *, compiles: bool) -> tuple[list[Entrant], dict[str, str]]:
    """Every row of torch, stock diffusers' too, and what can't take part for a reason worth telling."""
    entrants = [*_ways(TorchRunner, model.unet, student), *_stock(model)]
    on_cuda = model.device.type == "cuda"
    lacking: dict[str, str] = {}
    for name in [*(["captured"] if on_cuda else []), *(["compiled"] if compiles else [])]:
        if reason := LACKING[name](model.device):
            lacking[name] = reason
            continue
        try:
            entrants += _ways(partial(_on_copy, IN_TORCH[name]), model.unet, student)
        except torch.OutOfMemoryError:
            lacking[name] = "out of memory"
    return entrants, lacking


def _on_copy(runner: Callable[[UNet2DConditionModel], Runner], unet: UNet2DConditionModel) -> Runner:
    # On CUDA others than eager torch change the order of the weights, and with it the other rows' speed.
    return runner(copy.deepcopy(unet) if unet.device.type == "cuda" else unet)


def _ways(
    runner: Callable[[UNet2DConditionModel], Runner], teacher: UNet2DConditionModel, student: UNet2DConditionModel
) -> list[Entrant]:
    """Teacher, student and floor, in torch."""
    of_teacher = runner(teacher)
    of_student = of_teacher if student is teacher else runner(student)
    return [Entrant(way=way, runner=of_student if way == "student" else of_teacher) for way in WAYS]


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
