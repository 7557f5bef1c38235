"""Train students from several seeds and evaluate each against the teacher: mean and standard error."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..quality.distances import Distance, same_seed_distance
from ..quality.features import DISTANCE_NAME
from ..report.tables import NOTHING, within
from .held_out import HeldOut, merged_student, trained
from .study_options import Samples, Steps, Work

GUIDANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One way of drawing.

    Attributes:
        distance: Fréchet distance to real images.
        paired: mean cosine distance of features to the guided teacher's images of the same seeds.
    """

    distance: Distance
    paired: float


def evaluate_students(held_out: HeldOut, students: Sequence[Path], samples: int) -> dict[str, Judged]:
    """The teacher, as "guided" and "unguided", and each student by its folder's name."""
    with held_out.sampling(samples) as sampling:
        session = sampling.session
        rows = {"guided": session.teacher(GUIDANCE), "unguided": session.teacher(1.0)}
        rows |= {folder.name: session.student(merged_student(held_out.model, folder), GUIDANCE) for folder in students}
        features = {name: sampling.features(variant) for name, variant in rows.items()}
    return {
        name: Judged(distance=Distance.of(held_out.reference, x), paired=same_seed_distance(x, to=features["guided"]))
        for name, x in features.items()
    }


def over_seeds(values: Sequence[float], style: str) -> str:
    """The mean, with its standard error where there are several."""
    mean = format(statistics.mean(values), style)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(values) * len(values) ** -0.5, style)}"


def recovered(students: Sequence[Distance], *, guided: Distance, unguided: Distance) -> str:
    """The share of guidance's gain that students reach, one a seed; a dash where the gain is within noise."""
    shares = [student.gain_recovered(guided=guided, unguided=unguided) for student in students]
    known = [share.value for share in shares if share is not None]
    return over_seeds(known, ".0%") if len(known) == len(shares) else NOTHING


def seeds(
    context: typer.Context,
    work: Work,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each method.")] = 5,
    samples: Samples = 1000,
    steps: Steps = 20,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "lora,bitfit",
    samplers: Annotated[str, typer.Option(help="Comma-separated.")] = "ddim,dpm++",
) -> None:
    """Students of several training seeds against the teacher, on `emoji64` and its held-out prompts.

    Prints a Markdown table. ± is the standard error of the mean over training seeds alone: prompts, noise and the
    teacher's images are the same for all, and their chance is not in it. "Guidance gains" is the teacher's distance at
    w = 1 less that at its guidance, with a paired jackknife interval over groups of prompts; where it is within noise,
    no share of it is "recovered". "Paired" is the mean cosine distance of features to the guided teacher's images of
    the same seeds.

    Students that are in the folder already are kept, and so are images' features: a run that was interrupted goes on.
    Options after `--` go to `boostdiff distill`.
    """
    work.mkdir(parents=True, exist_ok=True)
    students = {
        method: [
            trained(
                work / f"{method}-{seed}",
                ["--method", method, "--seed", str(seed), "--guidance", str(GUIDANCE), *context.args],
            )
            for seed in range(seeds)
        ]
        for method in methods.split(",")
    }
    print(
        f"| sampler, {steps} steps | student | {DISTANCE_NAME} | teacher w={GUIDANCE:g} | teacher w=1 "
        "| guidance gains [95%] | recovered | paired | teacher w=1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for sampler in samplers.split(","):
        held_out = HeldOut(work=work, sampler=sampler, steps=steps)
        found = evaluate_students(held_out, [folder for folders in students.values() for folder in folders], samples)
        guided, unguided = found["guided"].distance, found["unguided"].distance
        for method, folders in students.items():
            distances = [found[folder.name].distance for folder in folders]
            paired = [found[folder.name].paired for folder in folders]
            print(
                f"| {sampler} | {method} | {over_seeds([one.value for one in distances], '.1f')} "
                f"| {guided.value:.1f} | {unguided.value:.1f} | {within(unguided.delta_to(guided))} "
                f"| {recovered(distances, guided=guided, unguided=unguided)} | {over_seeds(paired, '.3f')} "
                f"| {found['unguided'].paired:.3f} |",
                flush=True,
            )
