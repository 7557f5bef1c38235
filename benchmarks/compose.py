"""`bench compose`: what one pass, fewer steps and 8 bits give together, quality beside time per image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..engine.compiled import CompiledRunner, with_bfloat16_vae
from ..engine.errors import InputError, one_line
from ..engine.files import hash_of
from ..engine.guidance import SinglePassDenoiser
from ..engine.manifest import Manifest, read_manifest
from ..engine.model import Model, ModelFiles
from ..engine.runners import Runner, TorchRunner, unavailable
from ..engine.sampling import decode, initial_noise, sample
from ..engine.schedulers import check_steps
from .config import ComposeConfig, Metrics
from .quality.composition import Composition, Row, loss_of, with_front
from .quality.quality import compared
from .quality.samples import SamplingVariant, bounded_memory
from .session import Session, Student
from .speed.device import in_turns, synchronize
from .speed.engines import opened_engine
from .speed.stock import StockVariant, stock_pipeline
from .speed.throughput import Workload
from .stats import median_of


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A combination: what draws, and on what.

    Attributes:
        variant: denoiser, sampler and steps; its name is that of the row.
        model: text encoder and VAE that it runs with.
        runner: name of the UNet's runner.
        precision: of the UNet: "bfloat16", "int8", …
        identity: what of the runner determines images, as plain JSON values.
    """

    variant: SamplingVariant
    model: Model
    runner: str
    precision: str
    identity: dict[str, Any]

    def seconds(self, prompts: Sequence[str], noise: torch.Tensor) -> float:
        """One batch of images, from prompts to pixels on the host.

        Args:
            prompts: B of them.
            noise: `(B, C, H, W)` on the CPU.
        """
        model, device = self.model, self.model.device
        synchronize(device)
        began = time.perf_counter()
        denoiser = self.variant.open()
        one_text = isinstance(denoiser, SinglePassDenoiser) and not denoiser.live_negative_prompt
        text = model.family.encode(model.pipeline, prompts, negative_prompt=None if one_text else "")
        text = text.to(device, model.denoiser.dtype)
        latents = sample(
            denoiser,
            text=text,
            noise=noise.to(device, model.family.latents_dtype(text.conditional.dtype)),
            scheduler=self.variant.make_scheduler(),
            steps=self.variant.steps,
        )
        decode(model, latents.to(device))
        synchronize(device)
        return time.perf_counter() - began


def torch_configurations(session: Session, config: ComposeConfig) -> Iterator[Configuration]:
    """In torch: the teacher and students in each number of steps, and what needs no training in the most.

    A few-step student is there in its own steps alone, which need not be among those of the others; rows of as many
    steps take its timesteps.
    """
    runner: Runner = session.runner(session.model.denoiser)
    model = with_bfloat16_vae(session.model) if isinstance(runner, CompiledRunner) else session.model
    precision = str(runner.precision).removeprefix("torch.")
    name = runner.name + " max-autotune" * config.max_autotune
    make = partial(
        _configuration,
        model=model,
        runner=name,
        precision=precision,
        identity={"runner": name, "vae": str(model.pipeline.vae.dtype)},
        own_spacing=model.pipeline.scheduler.config.get("timestep_spacing"),
    )
    few = {student.info.steps for student in session.students if student.info.steps} - set(config.steps)
    for steps in (*sorted(config.steps, reverse=True), *sorted(few, reverse=True)):
        at = session.at(session.sampler, steps)
        variants = [at.teacher(at.guidance)] if steps in config.steps else []
        if steps == max(config.steps):
            variants.append(at.teacher(1.0))
            variants += at.baselines() if config.alternatives else []
        yield from map(make, variants)
        for student in (each for each in at.students if each.info.steps or steps in config.steps):
            yield make(_student(at, student), few_steps=student.info.steps is not None)


def _student(session: Session, student: Student) -> SamplingVariant:
    variant = session.student(student, session.guidance)
    # Another student of as many steps may stand beside it.
    return replace(variant, name=f"few-step {variant.name}") if student.info.steps else variant


def _configuration(
    variant: SamplingVariant,
    *,
    model: Model,
    runner: str,
    precision: str,
    identity: dict[str, Any],
    own_spacing: str | None,
    few_steps: bool = False,
) -> Configuration:
    spacing = variant.make_scheduler().config.get("timestep_spacing")
    # Names of training-free baselines and of few-step students have their steps, and of some baselines the spacing.
    steps = [] if variant.role == "alternative" or few_steps else [f"{variant.steps} steps"]
    spaced = [] if spacing == own_spacing or variant.name.endswith(f", {spacing}") else [spacing]
    parts = [variant.name, *steps, *spaced, f"{runner} {precision}"]
    named = replace(variant, name=", ".join(parts))
    return Configuration(variant=named, model=model, runner=runner, precision=precision, identity=identity)


def exported_configurations(
    session: Session,
    config: ComposeConfig,
    manifests: dict[Path, Manifest],
    *,
    opened: ExitStack,
    left_out: dict[str, str],
) -> Iterator[Configuration]:
    """Each engine on each runner that this machine has, in each precision that is of use on it.

    `left_out` takes the reason by engine and runner that it has not.
    """
    device, shape = session.model.device, session.model.latent_shape
    for folder, manifest in manifests.items():
        student = student_of(folder, manifest, session.students)
        names = [path.resolve().name for path in manifests]
        called = str(folder) if names.count(folder.resolve().name) > 1 else folder.resolve().name
        made = {entry["precision"] for path, entry in manifest.artefacts.items() if path.startswith(manifest.denoiser)}
        runners: list[tuple[str, str | None]] = [("onnx", None), ("tensorrt", None)]
        if "int8" in made and device.type == "cpu":
            runners.append(("onnx", "int8"))
        for name, precision in runners:
            if reason := unavailable(name, manifest, device):
                if name != "tensorrt" or manifest.plan in manifest.files:
                    left_out[f"{called}, {name}"] = reason
                continue
            label = f"{called}, {name}{f' {precision}' if precision else ''}"
            engine = opened_engine(
                folder,
                runner=name,
                device=device,
                precision=precision,
                label=label,
                opened=opened,
                left_out=left_out,
            )
            if engine is None:
                continue
            if engine.model.latent_shape != shape:
                raise InputError(f"the engine in {folder} draws images of another size than the model: leave it out")
            runner = engine.model.denoiser
            computes_in = precision or str(runner.precision).removeprefix("torch.")
            for steps in [student.info.steps] if student.info.steps else sorted(config.steps, reverse=True):
                at = session.at(session.sampler, steps)
                scale = at.guidance if student.info.guidance_range else None
                variant = replace(_student(at, student), open=partial(engine.denoiser, scale))
                yield _configuration(
                    variant,
                    model=engine.model,
                    runner=f"{called}: {name}",
                    precision=computes_in,
                    identity={"engine": hash_of([name, computes_in, manifest.files])},
                    own_spacing=session.model.pipeline.scheduler.config.get("timestep_spacing"),
                    few_steps=student.info.steps is not None,
                )


def _batch(session: Session) -> tuple[list[str], torch.Tensor]:
    """Prompts and noise of the batch that is timed."""
    prompts = [session.prompts[i % len(session.prompts)] for i in range(session.batch_size)]
    return prompts, initial_noise(session.model.latent_shape, count=len(prompts), seed=0)


def usable(
    session: Session, configurations: Iterable[Configuration], left_out: dict[str, str]
) -> Iterator[Configuration]:
    """Those that draw a batch; the reasons of the others are put into `left_out`, by name."""
    prompts, noise = _batch(session)
    for each in configurations:
        try:
            each.seconds(prompts, noise)
        except Exception as error:
            # Out of memory, or a batch beyond an engine's profile: each library raises a type of its own.
            left_out[each.variant.name] = one_line(error)
        else:
            yield each


def student_of(folder: Path, manifest: Manifest, students: Sequence[Student]) -> Student:
    """The student that an engine was exported from.

    Raises:
        InputError: it is none of these.
    """
    for student in students:
        try:
            manifest.check_student(student.info, engine=folder)
        except InputError as error:
            refused = error
        else:
            return student
    raise refused


def timed(
    session: Session,
    configurations: Sequence[Configuration],
    *,
    runs: int,
    report: Callable[[str], None],
    left_out: dict[str, str],
) -> list[list[float]]:
    """Seconds per batch of stock diffusers with guidance and of each configuration, round by round; see `in_turns`.

    Raises:
        BoostDiffError: stock diffusers or the first configuration failed, what all is compared with.
    """
    model, (prompts, noise) = session.model, _batch(session)
    work = Workload(
        model=model,
        prompts=prompts,
        guidance=session.guidance,
        make_scheduler=session.make_scheduler,
        steps=session.steps,
        guider=session.guider,
    )
    stock = StockVariant(mode="teacher", runner=TorchRunner(model.denoiser), pipeline=stock_pipeline(model))
    calls: list[tuple[str, Callable[[], float]]] = [("stock diffusers", lambda: stock.time(work)["total"])]
    calls += [(each.variant.name, partial(each.seconds, prompts, noise)) for each in configurations]
    found = in_turns(calls, runs, device=model.device, left_out=left_out, report=report, needed=2)
    return [seconds for seconds, _ in found]


def compose(
    files: ModelFiles,
    config: ComposeConfig,
    *,
    students: list[Path],
    engines: Sequence[Path] = (),
    prompts: list[str],
    metrics: Metrics,
    cache: Path | None = None,
    device: str = "auto",
    report: Callable[[str], None] = lambda message: None,
    on_images: Callable[[str, int], None] = lambda name, count: None,
) -> Composition:
    """Measure quality and time of all combinations, with arguments as `bench.bench` has them.

    Every row is sampled with the runner that it is timed on. Times are from prompts to pixels, all rows and stock
    diffusers interleaved.

    Raises:
        InputError: there is no reference; or a student, an engine or the prompts can't be used.
        BoostDiffError: what all is compared with can't be timed.
    """
    if metrics.reference is None:
        raise InputError("quality is a distance to real images here: pass --reference DIR")
    manifests = {folder: read_manifest(folder) for folder in engines}
    check_steps(files.scheduler_config, [config.sampler], config.steps, spacing=config.timestep_spacing)
    opened = Session.open(
        files, config, students=students, guidance=config.guidance, prompts=prompts, device=device, guided=True
    )
    with opened as session, ExitStack() as exported:
        if session.processes:
            raise InputError("bench compose times every row: run it in one process")
        session, left_out = replace(session, sampler=config.sampler), dict[str, str]()
        samples = session.sample_cache(metrics, folder=cache, on_images=on_images)
        of_engines = exported_configurations(session, config, manifests, opened=exported, left_out=left_out)
        configurations = [*torch_configurations(session, config), *usable(session, of_engines, left_out)]
        report(f"sampling {config.samples} images per row")
        with bounded_memory(session.batch_size):
            sampled = (
                (replace(samples, model=each.model, identity=samples.identity | each.identity), each.variant)
                for each in configurations
            )
            measured = [row for row, _ in compared(sampled)]
        at = session.at(config.sampler, max(config.steps))
        stock, *others = timed(at, configurations, runs=config.runs, report=report, left_out=left_out)
        teacher, rows = measured[0], []
        for each, quality, seconds in zip(configurations, measured, others, strict=True):
            if seconds:
                ratios = [one / other for one, other in zip(stock, seconds, strict=True)]
                rows.append(
                    Row(
                        runner=each.runner,
                        precision=each.precision,
                        seconds_per_image=median_of([total / session.batch_size for total in seconds]),
                        speedup=median_of(ratios),
                        quality=quality,
                        loss=loss_of(quality, teacher),
                    )
                )
        return Composition(
            rows=with_front(rows),
            steps=max(config.steps),
            stock_seconds=median_of([total / session.batch_size for total in stock]),
            images=config.samples,
            batch_size=session.batch_size,
            runs=config.runs,
            features=samples.network.distance_name,
            caption_label=samples.clip.label if samples.clip else None,
            left_out=left_out,
            provenance=session.provenance(samples),
        )
