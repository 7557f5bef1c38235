"""Train students from several seeds and evaluate each against the teacher: mean and standard error."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated

import typer

from ...engine.errors import InputError
from ..config import SAMPLER_NAMES, BenchConfig, comma_separated
from ..quality.quality import Quality, QualityRow, evaluate
from ..report.tables import NOTHING, Table, formatted
from ..stats import Estimate
from .held_out import Samples, Steps, Work, check_plan, check_training, held_out, trained

methods_of = comma_separated("--methods", str, "lora,bitfit")
samplers_of = comma_separated("--samplers", str, "ddim,dpm++")


def over_seeds(values: Sequence[float | Estimate | None], pattern: str) -> str:
    """The mean, with its standard error where there are several; a dash where one is missing."""
    known = [value.value if isinstance(value, Estimate) else value for value in values if value is not None]
    if len(known) < len(values):
        return NOTHING
    mean = pattern.format(statistics.mean(known))
    if len(known) < 2:
        return mean
    return f"{mean} ± {pattern.replace('+', '').format(statistics.stdev(known) * len(known) ** -0.5)}"


def rows_of(quality: Quality, students: dict[str, list[QualityRow]]) -> list[list[str]]:
    """The teacher's two rows with intervals over prompts, and a row per method, its students' rows over seeds."""
    guided, unguided, *_ = quality.rows
    lines = [
        [
            row.name,
            formatted(row.distance_interval),
            formatted(row.delta_to_guided, "+.1f"),
            NOTHING,
            formatted(row.caption_score),
            formatted(row.distance_to_teacher_image, ".3f"),
        ]
        for row in (guided, unguided)
    ]
    for method, rows in students.items():
        cells = [
            over_seeds([row.distance for row in rows], "{:.1f}"),
            over_seeds([row.delta_to_guided for row in rows], "{:+.1f}"),
            over_seeds([row.gain_recovered for row in rows], "{:.0%}"),
            over_seeds([row.caption_score for row in rows], "{:.1f}"),
            over_seeds([row.distance_to_teacher_image for row in rows], "{:.3f}"),
        ]
        lines.append([f"{method}, {len(rows)} seeds", *cells])
    return lines


def seeds(
    context: typer.Context,
    work: Work,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs per method.")] = 5,
    samples: Samples = 1000,
    steps: Steps = 20,
    methods: Annotated[
        str, typer.Option(help="Methods of `boostdiff distill`, comma-separated: lora, dora, bitfit, soft-prompt.")
    ] = "lora,bitfit",
    samplers: Annotated[
        str, typer.Option(help=f"Samplers, comma-separated: {', '.join(SAMPLER_NAMES)}.")
    ] = "ddim,dpm++",
    guidance: Annotated[float, typer.Option(help="Guidance scale w.")] = 3.0,
) -> None:
    """Students of several training seeds against the teacher, on `emoji64` and its held-out prompts.

    Prints Markdown tables. ± is the standard error of the mean over training seeds alone: prompts, noise and the
    teacher's images are the same for all; brackets are intervals over prompts. Students and features that are in the
    folder are kept, so an interrupted run goes on. Options after `--` go to `boostdiff distill`.
    """
    # What can't be used is refused before training, which takes hours.
    configs = [BenchConfig(samples=samples, sampler=name, steps=steps) for name in samplers_of(samplers)]
    options = ["--guidance", f"{guidance:g}", *context.args]
    planned = {
        (method, seed): ["--method", method, "--seed", str(seed), *options]
        for method in methods_of(methods)
        for seed in range(seeds)
    }
    there = [folder for method, seed in planned if (folder := work / f"{method}-{seed}").exists()]
    for config in configs:
        check_plan(config, there)
    for (method, seed), words in planned.items():
        few = check_training(work / f"{method}-{seed}", words).get("few_steps") if seed == 0 else None
        last = few and int(few.rpartition(":")[2])
        if few and any((config.sampler, config.steps) != ("ddim", last) for config in configs):
            settings = f"--samplers ddim --steps {last}"
            raise InputError(f"--few-steps {few} makes students of {last} steps of ddim alone: pass {settings}, too")
    folders = {trained(work / f"{method}-{seed}", words): method for (method, seed), words in planned.items()}
    for config in configs:
        with held_out(list(folders), config, work=work) as (session, cache):
            variants = [session.teacher(session.guidance), session.teacher(1.0)]
            variants += [session.student(student, session.guidance) for student in session.students]
            quality = evaluate(cache, variants)
        students: dict[str, list[QualityRow]] = {}
        for method, row in zip(folders.values(), quality.rows[2:], strict=True):
            students.setdefault(method, []).append(row)
        headings = [f"{config.sampler}, {steps} steps, N = {samples}", quality.features, "ΔFD to the guided teacher"]
        headings += ["guidance gain recovered", str(quality.caption_label), "distance to the teacher's image"]
        print(Table(headings=headings, cells=rows_of(quality, students)).markdown(), end="\n\n", flush=True)
