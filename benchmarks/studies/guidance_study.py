"""How much of guidance students have learned: R² of single predictions, and the effective guidance of their images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from ...engine.errors import InputError
from ...engine.guidance_term import r2_of, trajectory
from ...engine.options import SpacingOption, StudentsSamplerOption, StudentsStepsOption
from ...engine.runners import TorchRunner
from ...engine.student import read_student
from ..config import BenchConfig
from ..quality.distances import paired_feature_distance
from ..report.tables import NOTHING, Table
from ..session import scales_for, with_sampling
from .held_out import Samples, Scales, Work, check_plan, check_prompts, held_out, scales_of

Students = Annotated[list[Path], typer.Argument(help="Students of the embedded model.")]


def guidance_r2(
    students: Students,
    scales: Scales = "1.5,3,5,7.5",
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts.")] = 24,
    model: Annotated[str, typer.Option(help="emoji64, or a folder of a model of the same captions.")] = "emoji64",
) -> None:
    """R² of the guidance term, over all timesteps and at each: quick, as no image is sampled.

    At every fourth of 16 DDIM steps of the teacher's own trajectories for held-out prompts. Prints a
    Markdown table: 1 is the guided teacher, 0 the unguided one, a dash where guidance changes nothing.
    """
    rows, headings, asked, config = [], ["student"], scales_of(scales), BenchConfig(samples=prompts)
    check_prompts(prompts, "--prompts")
    for folder in students:
        check_plan(config, [folder], model=model)
    for folder in students:
        with held_out([folder], config, model=model) as (session, _):
            (student,), loaded = session.students, session.model
            if student.info.steps is not None:
                raise InputError(f"{folder} is a few-step student, which takes other steps than this compares")
            negative = student.info.negative_prompt
            text = loaded.family.encode(loaded.pipeline, session.prompts[:prompts], negative_prompt=negative)
            for scale in scales_for(student.info, asked):
                states = trajectory(loaded, text, scale, session.guider)
                denoiser = student.info.denoiser(TorchRunner(student.denoiser), scale)
                r2 = [r2_of(denoiser, part, text) for part in (states, *([state] for state in states))]
                rows.append(
                    [f"{folder.name}, w = {scale:g}", *(NOTHING if math.isnan(each) else f"{each:.3f}" for each in r2)]
                )
                headings = ["student", "all", *(f"t = {int(state.t)}" for state in states)]
    print(Table(headings=headings, cells=rows).markdown())


def nearest_scale(features: torch.Tensor, teachers: Mapping[float, torch.Tensor]) -> tuple[float, float]:
    """Effective guidance, and the feature distance to the teacher's images at the nearest scale of the grid.

    Between scales it is the lowest point of the parabola through the nearest one and its neighbors; beyond the grid it
    is the grid's end. The teacher's features `(N, D)`, by three scales or more, are of the same seeds.
    """
    scales = sorted(teachers)
    distances = [paired_feature_distance(features, to=teachers[scale]) for scale in scales]
    best = int(np.argmin(distances))
    middle = min(max(best, 1), len(scales) - 2)
    around = slice(middle - 1, middle + 2)
    square, linear, _ = np.polyfit(scales[around], distances[around], 2)
    lowest = -linear / (2 * square) if square > 0 else scales[best]
    return float(np.clip(lowest, scales[0], scales[-1])), distances[best]


GRID = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7.5, 9)
"""The teacher's scales that effective guidance is sought between."""


def effective_guidance(
    students: Students,
    work: Work,
    scales: Scales = "1.5,3,5,7.5",
    samples: Samples = 200,
    sampler: StudentsSamplerOption = None,
    steps: StudentsStepsOption = None,
    timestep_spacing: SpacingOption = None,
) -> None:
    """The guidance that students give for each w they are asked for.

    Effective guidance is the scale of the teacher whose images of the same seeds are nearest to the student's, by the
    mean cosine distance of features. On `emoji64` and its held-out prompts; prints a Markdown table.
    """
    rows, asked = [], scales_of(scales)
    config = BenchConfig(samples=samples, sampler=sampler, steps=steps, timestep_spacing=timestep_spacing)
    for folder in students:
        check_plan(config, [folder])
    # One setting for all rows: few-step students have their own, timesteps included.
    own: list[Any] = [each for folder in students if (each := read_student(folder).timestep_spacing)]
    config = replace(with_sampling(config, students), timestep_spacing=own[0] if own else timestep_spacing)
    for folder in students:
        with held_out([folder], config, work=work) as (session, cache):
            teachers = {scale: cache.sampled(session.teacher(scale)).features for scale in GRID}
            (student,) = session.students
            for scale in scales_for(student.info, asked):
                features = cache.sampled(session.student(student, scale)).features
                effective, distance = nearest_scale(features, teachers)
                rows.append([folder.name, f"{scale:g}", f"{effective:.2f}", f"{distance:.3f}"])
    print(f"N = {samples}, {config.sampler}, {config.steps} steps\n")
    headings = ["student", "w", "effective guidance", "distance to the nearest teacher's image"]
    print(Table(headings=headings, cells=rows).markdown())
