"""Guidance in students: how well they follow it, which part of it they explain, and what each part is worth.

*Effective guidance* is the scale of the teacher whose images are nearest to the student's of the same seeds, by the
mean cosine distance of features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer

from ...engine.adapters import ADAPTER_NAME, LORA_METHODS
from ...engine.errors import InputError
from ...engine.families import TextEmbeddings
from ...engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ...engine.model import Model
from ...engine.runners import TorchRunner
from ...engine.student import apply_student, read_student
from ..quality.distances import Distance, frechet_distance, same_seed_distance
from ..quality.features import DISTANCE_NAME
from ..quality.predictions import error_and_share, trajectory
from ..quality.samples import SamplingVariant
from ..report.plots import COLORS, rendered
from ..report.tables import within
from ..session import Session
from .held_out import (
    HeldOut,
    held_out_text,
    merged_student,
    refuse_training_options,
    teacher_model,
    trained,
)
from .study_options import Sampler, Samples, Steps, Work, numbers

NONE, ALL, LEARNT = "nothing: the teacher, w = 1", "g: the teacher", "s: the student"


def prediction_error(
    students: Annotated[list[Path], typer.Argument(help="Students of the embedded model.")],
    scales: Annotated[str, typer.Option(help="Guidance scales above 1, comma-separated.")] = "1.5,3,5,7.5",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 24,
    by_timestep: Annotated[bool, typer.Option("--by-timestep", help="A row for each timestep.")] = False,
) -> None:
    """How near students' single predictions come to the guided teacher's: quick, before any image is judged.

    On `emoji64`, at every fourth of 16 DDIM steps of the teacher's own trajectories for held-out prompts. Prints a
    Markdown table of squared errors as shares of the unguided network's: 0 is the teacher, 1 no better than not
    distilling. "Added" is the part of what a student adds that lies along the teacher's guidance, in units of one step
    of w: w − 1 is the teacher's.
    """
    model = teacher_model()
    text = held_out_text(model, prompts)
    # By scale; a trajectory visits the same timesteps at each.
    states = {scale: trajectory(model, text, scale) for scale in numbers(scales)}
    rows: dict[str, slice] = {"": slice(None)}
    if by_timestep:
        rows = {f", t = {int(state.t)}": slice(i, i + 1) for i, state in enumerate(next(iter(states.values())))}
    print("| student | " + " | ".join(f"w={scale:g} | added" for scale in states) + " |")
    print("|---" * (1 + 2 * len(states)) + "|")
    for folder in students:
        student = merged_student(model, folder)
        opened = student.info.choose_guidance if student.info.guidance_range else lambda scale: None
        for told, part in rows.items():
            cells = []
            for scale, visited in states.items():
                denoiser = SinglePassDenoiser(TorchRunner(student.unet), opened(scale))
                error, along = error_and_share(denoiser, visited[part], text)
                cells.append(f"{error:.2f} | {along * (scale - 1):.2f}")
            print(f"| {folder.name}{told} | " + " | ".join(cells) + " |", flush=True)


Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def shortened(g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Guidance g `(B, C, H, W)`, each sample at the length of what the student adds to it, s."""
    lengths = [torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) for x in (s, g)]
    return g / lengths[1].clamp(min=torch.finfo(g.dtype).tiny) * lengths[0]


PARTS: dict[str, Part] = {"g − s": lambda g, s: g - s, "g, as long as s": shortened}
"""What can be added to the unguided prediction, as functions of guidance g and the student's s, `(B, C, H, W)`."""


@dataclass(frozen=True)
class PartOfGuidance:
    """A denoiser that adds a part of guidance to the unguided prediction, in three passes.

    Attributes:
        runner: of the base model.
        student: predicts ε̂_1 + s.
        guidance_scale: w.
        part: one of `PARTS`.
    """

    runner: Callable[..., Any]
    student: Denoiser
    guidance_scale: float
    part: Part

    def __call__(self, z_t: torch.Tensor, t: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """See `Denoiser`."""
        unconditional, conditional = GuidedDenoiser(self.runner, self.guidance_scale).passes(z_t, t, text)
        g = (self.guidance_scale - 1) * (conditional - unconditional)
        return conditional + self.part(g, self.student(z_t, t, text) - conditional)


def rows_of(held_out: HeldOut, folder: Path, samples: int) -> dict[str, torch.Tensor]:
    """By what is added at each step, the features `(samples, D)` of its images.

    Raises:
        InputError: the student is one of a range.
    """
    student = merged_student(held_out.model, folder)
    scale = student.info.guidance
    if student.info.guidance_range is not None:
        raise InputError(f"{folder} holds a guidance-conditioned student: distill one of one scale")
    with held_out.sampling(samples) as sampling:
        session = sampling.session

        def opened(part: Part) -> Denoiser:
            alone = SinglePassDenoiser(session.runner(student.unet))
            return PartOfGuidance(session.runner(held_out.model.unet), alone, scale, part)

        rows = {NONE: session.teacher(1.0), ALL: session.teacher(scale), LEARNT: session.student(student, scale)}
        about = {"adapter": student.info.adapter_sha256, "guidance": scale}
        rows |= {name: session.custom(name, partial(opened, part), passes=3, **about) for name, part in PARTS.items()}
        return {name: sampling.features(variant) for name, variant in rows.items()}


def explained_shares(model: Model, folder: Path, prompts: int) -> tuple[float, float]:
    """⟨s, g⟩ / ‖g‖² and ‖s‖² / ‖g‖² over the teacher's trajectories for the first held-out prompts."""
    text, student = held_out_text(model, prompts), merged_student(model, folder)
    states = trajectory(model, text, student.info.guidance)
    error, along = error_and_share(SinglePassDenoiser(TorchRunner(student.unet)), states, text)
    # ‖s − g‖² = ‖s‖² − 2 ⟨s, g⟩ + ‖g‖², and the error is ‖s − g‖² / ‖g‖².
    return along, error - 1 + 2 * along


def guidance_parts(
    context: typer.Context,
    work: Work,
    student: Annotated[Path | None, typer.Option(help="A student of one scale.  [default: trained]")] = None,
    samples: Samples = 1000,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose states give the shares.")] = 96,
    sampler: Sampler = "ddim",
    steps: Steps = 20,
) -> None:
    """Which part of guidance a student explains, and what each part is worth in images.

    On `emoji64` and its held-out prompts. At each state guidance adds g = ε̂_w − ε̂_1 to the unguided prediction, and a
    student of the same scale adds s. Images are drawn with ε̂_1 plus one part of g at each step: none (the teacher
    without guidance), all (the teacher), the explained part (s: the student), the rest (g − s), and g shortened to the
    length of s.

    Two shares are printed, over the teacher's own states: ⟨s, g⟩ / ‖g‖² and ‖s‖² / ‖g‖². What a least-squares estimate
    misses is orthogonal to it, ⟨s, g − s⟩ = 0; the nearer the two are to each other, the more s is such an estimate,
    and the share is what it explains of g.

    A student that is not given is trained in the folder, and options after `--` then go to `boostdiff distill`.
    """
    if student is not None:
        refuse_training_options(context.args)
    work.mkdir(parents=True, exist_ok=True)
    student = student or trained(work / "student", ["--guidance", "3", *context.args])
    held_out = HeldOut(work=work, sampler=sampler, steps=steps)
    along, length = explained_shares(held_out.model, student, prompts)
    print(f"⟨s, g⟩ / ‖g‖² = {along:.3f}, ‖s‖² / ‖g‖² = {length:.3f}, over {prompts} prompts\n", flush=True)
    rows = rows_of(held_out, student, samples)
    distances = {name: Distance.of(held_out.reference, features) for name, features in rows.items()}
    print(f"N = {samples}, {sampler}, {steps} steps; a difference's interval is paired, of 95%\n")
    print(f"| added at each step | {DISTANCE_NAME} | less than with nothing | paired distance to the teacher |")
    print("|---|---|---|---|")
    for name, features in rows.items():
        gain, paired = within(distances[NONE].delta_to(distances[name])), same_seed_distance(features, to=rows[ALL])
        print(f"| {name} | {distances[name].value:.1f} | {gain} | {paired:.3f} |")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A student at one setting.

    Attributes:
        setting: w of a guidance-conditioned student, a LoRA scale.
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

    Between scales it is the lowest point of the parabola through the nearest one and its neighbors; beyond the grid it
    is the grid's end.

    Args:
        features: `(N, D)`.
        teachers: by scale, three or more, features `(M, D)` of the same seeds; the first min(N, M) images are compared.
    """
    scales = sorted(teachers)
    distances = []
    for scale in scales:
        count = min(len(features), len(teachers[scale]))
        distances.append(same_seed_distance(features[:count], to=teachers[scale][:count]))
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
    def of(cls, held_out: HeldOut, scales: Sequence[float], samples: int, grid: Sequence[float], paired: int) -> Self:
        """Draw them: `samples` images at each of `scales`, `paired` at each of `grid`."""
        with held_out.sampling(samples) as sampling:
            full = {scale: sampling.features(sampling.session.teacher(scale)) for scale in scales}
        with held_out.sampling(paired) as sampling:
            near = {w: sampling.features(sampling.session.teacher(w)) for w in grid if w not in full}
        return cls(
            distances={scale: frechet_distance(held_out.reference, features) for scale, features in full.items()},
            features={scale: features[:paired] for scale, features in (full | near).items()},
        )


def points(
    held_out: HeldOut, rows: Callable[[Session], Mapping[float, SamplingVariant]], samples: int, teachers: Teachers
) -> list[Point]:
    """Draw a student's rows, made by setting, and compare them with the teacher."""
    found = []
    with held_out.sampling(samples) as sampling:
        for setting, variant in rows(sampling.session).items():
            features = sampling.features(variant)
            effective, paired = nearest_scale(features, teachers.features)
            distance = frechet_distance(held_out.reference, features)
            found.append(Point(setting=setting, distance=distance, effective=effective, paired=paired))
    return found


def range_rows(session: Session, folder: Path, scales: Sequence[float]) -> dict[float, SamplingVariant]:
    """A guidance-conditioned student at each scale.

    Raises:
        InputError: it is no guidance-conditioned student, or a scale lies outside its range.
    """
    student = merged_student(session.model, folder)
    if student.info.guidance_range is None:
        raise InputError(f"{folder} holds no guidance-conditioned student: distill one with --guidance LOW:HIGH")
    for scale in scales:
        student.info.choose_guidance(scale)
    return {scale: session.student(student, scale) for scale in scales}


def lora_scale_variants(session: Session, folder: Path, weights: Sequence[float]) -> dict[float, SamplingVariant]:
    """A LoRA student of one scale with its adapter at each weight.

    Raises:
        InputError: it is no LoRA, or a guidance-conditioned student.
    """
    info = read_student(folder)
    if info.method not in LORA_METHODS or info.guidance_range is not None:
        raise InputError(f"{folder} holds no LoRA student of one scale: the LoRA scale is the weight of one")
    adapted = teacher_model()
    apply_student(adapted, folder, info)

    def opened(weight: float) -> Denoiser:
        adapted.unet.set_adapters(ADAPTER_NAME, weight)
        return SinglePassDenoiser(TorchRunner(adapted.unet))

    return {
        weight: session.custom(
            f"LoRA scale {weight:g}", partial(opened, weight), passes=1, weight=weight, adapter=info.adapter_sha256
        )
        for weight in weights
    }


def tables(ranged: Sequence[Point], scaled: Sequence[Point], teachers: Teachers, distilled_at: float) -> str:
    """Two Markdown tables.

    Args:
        ranged: of the guidance-conditioned student.
        scaled: of the LoRA scales.
        teachers: at the guidance-conditioned student's scales and at `distilled_at`.
        distilled_at: the scale that the LoRA student was distilled at.
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
    lines += ["", f"| LoRA scale | {DISTANCE_NAME} | effective guidance | paired distance |", "|---|---|---|---|"]
    for point in scaled:
        lines.append(f"| {point.setting:g} | {point.distance:.1f} | {point.effective:.2f} | {point.paired:.3f} |")
    unguided, guided = teachers.distances[1.0], teachers.distances[distilled_at]
    lines += ["", f"Teacher: {unguided:.1f} at w = 1, {guided:.1f} at w = {distilled_at:g}."]
    return "\n".join(lines) + "\n"


def plot(ranged: Sequence[Point], scaled: Sequence[Point], teachers: Teachers, distilled_at: float) -> plt.Figure:
    """Distances over w beside effective guidance over the LoRA scale, each with what a perfect student would give."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    scales = [point.setting for point in ranged]
    left.plot(scales, [teachers.distances[w] for w in scales], "o-", color=COLORS["teacher"], label="teacher")
    left.plot(scales, [point.distance for point in ranged], "o-", color=COLORS["student"], label="student")
    left.set(title="guidance-conditioned student", xlabel="guidance w", ylabel=f"{DISTANCE_NAME} (lower is better)")
    settings = [point.setting for point in scaled]
    right.plot([0, 1], [1, distilled_at], ":", color=COLORS["teacher"], label="proportional")
    right.plot(settings, [point.effective for point in scaled], "o-", color=COLORS["student"], label="student")
    right.set(
        title=f"LoRA scale of a student of w = {distilled_at:g}", xlabel="LoRA scale", ylabel="effective guidance"
    )
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def guidance_curve(
    context: typer.Context,
    work: Work,
    student: Annotated[
        Path | None, typer.Option(help="A guidance-conditioned student.  [default: trained in the folder]")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA student of one scale.  [default: trained]")] = None,
    scales: Annotated[str, typer.Option(help="Guidance scales of the guidance-conditioned student.")] = "1.5,3,5,7.5",
    weights: Annotated[str, typer.Option(help="Weights of the LoRA scales.")] = "0,0.25,0.5,0.75,1",
    samples: Samples = 1000,
    grid: Annotated[str, typer.Option(help="The teacher's scales that effective guidance is sought on.")] = (
        "1,1.5,2,2.5,3,4,5,6,7.5,9"
    ),
    paired: Annotated[int, typer.Option(min=1, help="Images compared at each scale of the grid.")] = 200,
    sampler: Sampler = "ddim",
    steps: Steps = 20,
) -> None:
    """How well guidance is followed: a guidance-conditioned student over w, and the LoRA scale of a student of one w.

    On `emoji64` and its held-out prompts. Students that are not given are trained in the folder; options after `--` go
    to `boostdiff distill`. Writes `guidance_curve.md` and `.png` there.
    """
    if student is not None and lora is not None:
        refuse_training_options(context.args)
    wanted, teacher_scales = numbers(scales), numbers(grid)
    if len(teacher_scales) < 3:
        raise InputError(f"--grid {grid}: at least three scales are needed to tell what lies between them")
    work.mkdir(parents=True, exist_ok=True)
    student = student or trained(work / "range", ["--guidance", f"{min(wanted):g}:{max(wanted):g}", *context.args])
    lora = lora or trained(work / "one-scale", ["--guidance", "3", *context.args])
    distilled_at = read_student(lora).guidance
    held_out = HeldOut(work=work, sampler=sampler, steps=steps)
    teachers = Teachers.of(
        held_out, sorted({1.0, distilled_at, *wanted}), samples, teacher_scales, min(paired, samples)
    )
    ranged = points(held_out, partial(range_rows, folder=student, scales=wanted), samples, teachers)
    scaled = points(held_out, partial(lora_scale_variants, folder=lora, weights=numbers(weights)), samples, teachers)
    table = tables(ranged, scaled, teachers, distilled_at)
    print(f"N = {samples}, {sampler} {steps} steps\n\n{table}")
    (work / "guidance_curve.md").write_text(table, encoding="utf-8")
    (work / "guidance_curve.png").write_bytes(rendered(plot(ranged, scaled, teachers, distilled_at), "png"))
