"""How well guidance is followed: a range student over w, and the dial of a student of one scale.

    python -m boostdiff.benchmarks.studies.guidance_curve --work DIR [--student DIR] [--scales 1.5,3] [--samples 1000]

On `emoji64` and its held-out prompts. Students that are not given are trained in DIR; options after `--` go to
`boostdiff distill`. Images' features and results are kept in DIR: a run that was interrupted goes on. Writes
`DIR/guidance_curve.json`, `.md` and `.png`.

*Effective guidance* is the scale of the teacher whose images are nearest to the student's of the same seeds, by the
mean cosine distance of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer

from ...engine.errors import InputError
from ...engine.files import write_json
from ...engine.guidance import Denoiser, SinglePassDenoiser
from ...engine.model import Model
from ...engine.runners import Runner, TorchRunner
from ...engine.student import ADAPTER_NAME, LORA_METHODS, apply_student, read_student
from ..quality.features import DISTANCE_NAME, paired_distance
from ..report.plots import COLOURS, rendered
from .held_out import HeldOut, refuse_training_options, student_model, teacher_model, trained

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A student at one setting.

    Attributes:
        setting: w of a range student, the weight of a dial.
        distance: Fréchet distance to real images.
        effective: effective guidance.
        paired: mean cosine distance to the teacher's images at the nearest scale of the grid.
    """

    setting: float
    distance: float
    effective: float
    paired: float


def nearest_scale(features: torch.Tensor, teachers: Mapping[float, torch.Tensor]) -> tuple[float, float]:
    """Effective guidance, and the paired distance at the nearest scale of the grid.

    Between scales it is the lowest point of the parabola through the nearest one and its neighbours; beyond the grid it
    is the grid's end.

    Args:
        features: `(N, D)`.
        teachers: by scale, three or more, features `(M, D)` of the same seeds; the first min(N, M) images are compared.
    """
    scales = sorted(teachers)
    distances = []
    for scale in scales:
        count = min(len(features), len(teachers[scale]))
        distances.append(paired_distance(features[:count], to=teachers[scale][:count]))
    best = int(np.argmin(distances))
    middle = min(max(best, 1), len(scales) - 2)
    around = slice(middle - 1, middle + 2)
    square, linear, _ = np.polyfit(scales[around], distances[around], 2)
    lowest = -linear / (2 * square) if square > 0 else scales[best]
    return float(np.clip(lowest, scales[0], scales[-1])), distances[best]


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """The teacher over guidance: what students are compared with.

    Attributes:
        distances: Fréchet distance to real images, by scale.
        features: by scale, `(M, D)` of the first images, for effective guidance.
    """

    distances: dict[float, float]
    features: dict[float, torch.Tensor]

    @classmethod
    def of(
        cls, held_out: HeldOut, *, scales: Sequence[float], samples: int, grid: Sequence[float], paired: int
    ) -> Teachers:
        """Draw them: `samples` images at each of `scales`, `paired` at each of `grid`."""
        full = held_out.teachers(scales, samples)
        near = held_out.teachers([scale for scale in grid if scale not in full], paired)
        return cls(
            distances={scale: held_out.distance(name, features) for scale, (name, features) in full.items()},
            features={scale: features[:paired] for scale, (_, features) in (full | near).items()},
        )


def _points(
    held_out: HeldOut, names: Mapping[float, str], drawn: Mapping[str, torch.Tensor], teachers: Teachers
) -> list[Point]:
    points = []
    for setting, name in names.items():
        effective, paired = nearest_scale(drawn[name], teachers.features)
        points.append(
            Point(
                setting=setting,
                distance=held_out.distance(name, drawn[name]),
                effective=effective,
                paired=paired,
            )
        )
    return points


def range_points(
    held_out: HeldOut, folder: Path, *, scales: Sequence[float], samples: int, teachers: Teachers
) -> list[Point]:
    """A range student at each scale.

    Raises:
        InputError: it is no range student, or a scale lies outside its range.
    """
    info = read_student(folder)
    if info.guidance_range is None:
        raise InputError(f"{folder} holds no range student: distil one with --guidance LOW:HIGH")
    names = {scale: f"student w={scale:g} {info.adapter_sha256[:12]}" for scale in scales}
    rows = {name: partial(SinglePassDenoiser, guidance_scale=info.choose_guidance(w)) for w, name in names.items()}
    drawn = held_out.features(rows, samples, open_model=partial(student_model, folder))
    return _points(held_out, names, drawn, teachers)


def dial_points(
    held_out: HeldOut, folder: Path, *, weights: Sequence[float], samples: int, teachers: Teachers
) -> list[Point]:
    """A LoRA student of one scale with its adapter at each weight.

    Raises:
        InputError: it is no LoRA, or a range student.
    """
    info = read_student(folder)
    if info.method not in LORA_METHODS or info.guidance_range is not None:
        raise InputError(f"{folder} holds no LoRA student of one scale: the dial is the weight of one")

    def turned(runner: Runner, weight: float) -> Denoiser:
        assert isinstance(runner, TorchRunner)
        runner.unet.set_adapters(ADAPTER_NAME, weight)
        return SinglePassDenoiser(runner)

    def open_model() -> Model:
        model = teacher_model()
        apply_student(model, folder, info)
        return model

    names = {weight: f"dial {weight:g} {info.adapter_sha256[:12]}" for weight in weights}
    rows = {name: partial(turned, weight=weight) for weight, name in names.items()}
    drawn = held_out.features(rows, samples, open_model=open_model, exported=False)
    return _points(held_out, names, drawn, teachers)


def tables(ranged: Sequence[Point], dialled: Sequence[Point], teachers: Teachers, learnt: float) -> str:
    """Two Markdown tables.

    Args:
        ranged: of the range student.
        dialled: of the dial.
        teachers: at the range student's scales and at `learnt`.
        learnt: the scale that the dial's student was distilled at.
    """
    lines = [
        f"| w | {DISTANCE_NAME}, teacher | student | difference | effective guidance | paired distance |",
        "|---|---|---|---|---|---|",
    ]
    for point in ranged:
        known = teachers.distances[point.setting]
        lines.append(
            f"| {point.setting:g} | {known:.1f} | {point.distance:.1f} | {point.distance / known - 1:+.1%} "
            f"| {point.effective:.2f} | {point.paired:.3f} |"
        )
    lines += ["", f"| dial | {DISTANCE_NAME} | effective guidance | paired distance |", "|---|---|---|---|"]
    for point in dialled:
        lines.append(f"| {point.setting:g} | {point.distance:.1f} | {point.effective:.2f} | {point.paired:.3f} |")
    unguided, guided = teachers.distances[1.0], teachers.distances[learnt]
    lines += ["", f"Teacher: {unguided:.1f} at w = 1, {guided:.1f} at w = {learnt:g}."]
    return "\n".join(lines) + "\n"


def plot(ranged: Sequence[Point], dialled: Sequence[Point], teachers: Teachers, learnt: float) -> plt.Figure:
    """Distances over w beside effective guidance over the dial, each with what a perfect student would give."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    scales = [point.setting for point in ranged]
    left.plot(scales, [teachers.distances[w] for w in scales], "o-", color=COLOURS["teacher"], label="teacher")
    left.plot(scales, [point.distance for point in ranged], "o-", color=COLOURS["student"], label="student")
    left.set(title="range student", xlabel="guidance w", ylabel=f"{DISTANCE_NAME} (lower is better)")
    settings = [point.setting for point in dialled]
    right.plot([0, 1], [1, learnt], ":", color=COLOURS["teacher"], label="proportional")
    right.plot(settings, [point.effective for point in dialled], "o-", color=COLOURS["student"], label="student")
    right.set(title=f"the dial of a student of w = {learnt:g}", xlabel="dial", ylabel="effective guidance")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    work: Annotated[Path, typer.Option(help="Folder for students, features and results.")],
    student: Annotated[Path | None, typer.Option(help="A range student.  [default: trained in the folder]")] = None,
    dial: Annotated[Path | None, typer.Option(help="A LoRA student of one scale.  [default: trained]")] = None,
    scales: Annotated[str, typer.Option(help="Guidance scales of the range student.")] = "1.5,3,5,7.5",
    weights: Annotated[str, typer.Option(help="Weights of the dial.")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(min=2, help="Images at each setting (N).")] = 1000,
    grid: Annotated[str, typer.Option(help="The teacher's scales that effective guidance is sought on.")] = (
        "1,1.5,2,2.5,3,4,5,6,7.5,9"
    ),
    paired: Annotated[int, typer.Option(min=1, help="Images compared at each scale of the grid.")] = 200,
    sampler: Annotated[str, typer.Option(help="Sampler.")] = "ddim",
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
) -> None:
    """Measure."""
    if student is not None and dial is not None:
        refuse_training_options(context.args)
    work.mkdir(parents=True, exist_ok=True)
    wanted, teacher_scales = _numbers(scales), _numbers(grid)
    if len(teacher_scales) < 3:
        raise InputError(f"--grid {grid}: at least three scales are needed to tell what lies between them")
    student = student or trained(work / "range", ["--guidance", f"{min(wanted):g}:{max(wanted):g}", *context.args])
    dial = dial or trained(work / "one-scale", ["--guidance", "3", *context.args])
    learnt = read_student(dial).guidance
    held_out = HeldOut(work=work, sampler=sampler, steps=steps)
    teachers = Teachers.of(
        held_out,
        scales=sorted({1.0, learnt, *wanted}),
        samples=samples,
        grid=teacher_scales,
        paired=min(paired, samples),
    )
    ranged = range_points(held_out, student, scales=wanted, samples=samples, teachers=teachers)
    dialled = dial_points(held_out, dial, weights=_numbers(weights), samples=samples, teachers=teachers)
    table = tables(ranged, dialled, teachers, learnt)
    print(f"N = {samples}, {sampler} {steps} steps\n\n{table}")
    (work / "guidance_curve.md").write_text(table, encoding="utf-8")
    (work / "guidance_curve.png").write_bytes(rendered(plot(ranged, dialled, teachers, learnt), "png"))
    write_json(
        work / "guidance_curve.json",
        {
            "images": samples,
            "sampler": sampler,
            "steps": steps,
            "teacher": {f"{scale:g}": distance for scale, distance in teachers.distances.items()},
            "range": [asdict(point) for point in ranged],
            "dial": [asdict(point) for point in dialled],
        },
    )


if __name__ == "__main__":
    app()
