"""What one pass, fewer steps, 8 bits and a runner gain together over stock diffusers with guidance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engine import embedded
from ...engine.compiled import CompiledRunner, missing_compiler, with_bfloat16_vae
from ...engine.errors import BoostDiffError, InputError
from ...engine.exported import Engine
from ...engine.manifest import read_manifest
from ...engine.merge import merge
from ...engine.model import Model, load, locate, resolve_device
from ...engine.options import SamplerOption
from ...engine.prompts import read_prompts
from ...engine.runners import TorchRunner
from ...engine.schedulers import check_steps
from ...engine.student import Distilled, read_student
from ..config import parse_batch_sizes
from ..report.tables import Table, formatted
from ..speed.stock import StockVariant, stock_pipeline
from ..speed.throughput import TimedVariant, Workload, interleaved
from ..stats import median_of
from .held_out import Device, Runs, Steps

Engines = Annotated[
    list[Path] | None, typer.Option("--engine", show_default="none", help="Engine folder; repeat it for more.")
]
Students = Annotated[
    list[Path] | None,
    typer.Option("--student", show_default="none", help="Student folder, for the compiled runner; repeat it for more."),
]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What is timed, on a workload of its own.

    Attributes:
        name: of the engine's or student's folder and the precision, or "stock diffusers with guidance".
        passes: UNet passes per image.
    """

    name: str
    variant: TimedVariant
    work: Workload
    passes: int


def sampling_of(student: Distilled, sampler: str, steps: int) -> tuple[str, int]:
    """Sampler and steps: a few-step student's own, else these."""
    return student.choose_sampling(*(None, None) if student.steps else (sampler, steps))


def timed_engines(
    folders: Sequence[Path], opened: ExitStack, base: dict[str, Any], device: str, *, sampler: str, steps: int
) -> Iterator[Timed]:
    """Each engine in each precision of its graphs, see `sampling_of`."""
    for folder in folders:
        manifest = read_manifest(folder)
        its_sampler, its_steps = sampling_of(manifest.distilled, sampler, steps)
        made = {each["precision"] for path, each in manifest.artefacts.items() if path.startswith(manifest.denoiser)}
        for precision in sorted(made & {"fp32", "fp16", "int8"}):
            loaded = opened.enter_context(Engine.load(folder, runner="onnx", device=device, precision=precision))
            scheduler = partial(loaded.model.make_scheduler, its_sampler, spacing=manifest.distilled.timestep_spacing)
            work = Workload(**base, model=loaded.model, make_scheduler=scheduler, steps=its_steps)
            variant = TimedVariant(mode="student", runner=loaded.model.denoiser, parts=loaded.model)
            yield Timed(name=f"{folder.name}, {precision}", variant=variant, work=work, passes=its_steps)


def timed_students(
    folders: Sequence[Path], model: Model, base: dict[str, Any], *, sampler: str, steps: int
) -> Iterator[Timed]:
    """Each student, merged and compiled, with the VAE in bfloat16 where the CPU has it; see `sampling_of`."""
    parts = with_bfloat16_vae(model)
    for folder in folders:
        info = read_student(folder)
        its_sampler, its_steps = sampling_of(info, sampler, steps)
        runner = CompiledRunner(merge(model, folder, info))
        scheduler = partial(model.make_scheduler, its_sampler, spacing=info.timestep_spacing)
        work = Workload(**base, model=model, make_scheduler=scheduler, steps=its_steps)
        precision = str(runner.precision).removeprefix("torch.")
        variant = TimedVariant(mode="student", runner=runner, parts=parts)
        yield Timed(name=f"{folder.name}, compiled, {precision}", variant=variant, work=work, passes=its_steps)


def combined(
    engines: Engines = None,
    students: Students = None,
    sampler: SamplerOption = "ddim",
    steps: Steps = 20,
    batch_sizes: Annotated[str, typer.Option(help="Images per batch.")] = "8",
    runs: Runs = 7,
    device: Device = "auto",
) -> None:
    """Whole images of `emoji64` by engines on ONNX Runtime and students compiled, over stock diffusers with guidance.

    They make one pass a step, in `--steps` steps of `--sampler`, few-step students in their own; stock diffusers,
    eager, makes two in `--steps` steps. All rows take turns in one run. Prints a Markdown table: medians of
    the ratios within a round, with their intervals, 95% from six runs on. FP8 has no speed on a CPU, and is left out.
    """
    target, sizes, files = resolve_device(device), parse_batch_sizes(batch_sizes), locate(embedded.MODEL_NAME)
    check_steps(files.scheduler_config, [sampler], [steps])
    engines, students = engines or [], students or []
    if not engines and not students:
        raise InputError("pass --engine or --student")
    for folder in engines:
        read_manifest(folder)
    for folder in students:
        read_student(folder, files)
    if students and (reason := missing_compiler(target)):
        raise BoostDiffError(reason)
    stock_model = load(files, device=target)
    prompts = read_prompts(embedded.HELD_OUT_PROMPTS)
    rows = []
    for size in sizes:
        with ExitStack() as opened:
            base: dict[str, Any] = {"prompts": [prompts[i % len(prompts)] for i in range(size)], "guidance": 3.0}
            scheduler = partial(stock_model.make_scheduler, sampler)
            stock = Timed(
                name="stock diffusers with guidance",
                variant=StockVariant(
                    mode="teacher", runner=TorchRunner(stock_model.denoiser), pipeline=stock_pipeline(stock_model)
                ),
                work=Workload(**base, model=stock_model, make_scheduler=scheduler, steps=steps),
                passes=2 * steps,
            )
            entries = [
                stock,
                *timed_engines(engines, opened, base, str(target), sampler=sampler, steps=steps),
                *timed_students(students, stock_model, base, sampler=sampler, steps=steps),
            ]
            for entry in entries:
                entry.variant.time(entry.work)
            times: list[list[float]] = [[] for _ in entries]
            for _, index in interleaved(len(entries), runs):
                times[index].append(entries[index].variant.time(entries[index].work)["total"])
            for entry, seconds in zip(entries, times, strict=True):
                ratio = median_of([one / other for one, other in zip(times[0], seconds, strict=True)])
                shown = [entry.name, f"{size}", f"{entry.work.steps}", f"{entry.passes}"]
                rows.append([*shown, f"{1e3 * median_of(seconds).value / size:.1f}", formatted(ratio, ".2fx")])
    headings = ["whole images", "batch", "steps", "passes", "ms per image", "times as fast as stock diffusers"]
    print(Table(headings=headings, cells=rows).markdown())
