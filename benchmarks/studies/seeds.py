"""Train students from several seeds and judge each against the teacher: mean and standard error.

    python -m boostdiff.benchmarks.studies.seeds --work DIR [--seeds 5] [--samples 1000]

On `emoji64` and its held-out prompts. Students that are in DIR already are kept, and so are their images' features and
distances: a run that was interrupted goes on.

Prints a Markdown table. ± is the standard error of the mean over training seeds alone: prompts, noise and the teacher's
images are the same for all, and their chance is not in it. "Guidance gains" is the teacher's distance at w = 1 less
that at its guidance, with a paired jackknife interval over groups of prompts; where it is within noise, no share of it
is "recovered". "Paired" is the mean cosine distance of features to the guided teacher's images of the same seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...engine.guidance import SinglePassDenoiser
from ...engine.student import read_student
from ..quality.distances import is_resolved, left_out_distances
from ..quality.features import DISTANCE_NAME, paired_distance
from ..report.tables import NOTHING, within
from ..stats import jackknifed
from .held_out import HeldOut, student_model, trained

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

GUIDANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One way of drawing.

    Attributes:
        distance: Fréchet distance to real images.
        paired: mean cosine distance of features to the guided teacher's images of the same seeds.
    """

    distance: float
    paired: float


def judge(held_out: HeldOut, students: Sequence[Path], samples: int) -> dict[str, Judged]:
    """The teacher, as "guided" and "unguided", and each student by its folder."""
    teachers = held_out.teachers([GUIDANCE, 1.0], samples)
    rows = {"guided": teachers[GUIDANCE], "unguided": teachers[1.0]}
    for folder in students:
        name = f"{folder.name} {read_student(folder).adapter_sha256[:12]}"
        drawn = held_out.features({name: SinglePassDenoiser}, samples, open_model=partial(student_model, folder))
        rows[folder.name] = (name, drawn[name])
    guided = teachers[GUIDANCE][1]
    return {
        row: Judged(distance=held_out.distance(name, features), paired=paired_distance(features, to=guided))
        for row, (name, features) in rows.items()
    }


def over_seeds(values: Sequence[float], style: str) -> str:
    """The mean, with its standard error where there are several."""
    mean = format(statistics.mean(values), style)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(values) * len(values) ** -0.5, style)}"


def left_out_gains(held_out: HeldOut, samples: int) -> list[float]:
    """What guidance takes off the teacher's distance, without each group of prompts in turn."""
    guided, unguided = (
        left_out_distances(held_out.reference, features)
        for _, features in held_out.teachers([GUIDANCE, 1.0], samples).values()
    )
    return [u - g for u, g in zip(unguided, guided, strict=True)]


def recovered(students: Sequence[float], *, guided: float, unguided: float, gains: Sequence[float]) -> str:
    """The share of guidance's gain that students reach, by their distances; a dash where the gain is within noise.

    Args:
        students: distances, one a seed.
        guided: the teacher's distance with guidance.
        unguided: without.
        gains: see `left_out_gains`.
    """
    if not is_resolved(gains):
        return NOTHING
    return over_seeds([(unguided - value) / (unguided - guided) for value in students], ".0%")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    work: Annotated[Path, typer.Option(help="Folder for students and results.")],
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each method.")] = 5,
    samples: Annotated[int, typer.Option(min=4, help="Images of each student (N).")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "lora,bitfit",
    samplers: Annotated[str, typer.Option(help="Comma-separated.")] = "ddim,dpm++",
) -> None:
    """Measure; options after `--` go to `boostdiff distill`."""
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
        found = judge(held_out, [folder for folders in students.values() for folder in folders], samples)
        guided, unguided = found["guided"].distance, found["unguided"].distance
        gains = left_out_gains(held_out, samples)
        gain = within(jackknifed(unguided - guided, gains))
        for method, folders in students.items():
            values = [found[folder.name].distance for folder in folders]
            share = recovered(values, guided=guided, unguided=unguided, gains=gains)
            paired = [found[folder.name].paired for folder in folders]
            print(
                f"| {sampler} | {method} | {over_seeds(values, '.1f')} | {guided:.1f} | {unguided:.1f} "
                f"| {gain} | {share} | {over_seeds(paired, '.3f')} | {found['unguided'].paired:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    app()
