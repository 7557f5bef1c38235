"""Which part of guidance a student learnt, and what each part is worth in images.

    python -m boostdiff.benchmarks.studies.guidance_parts --work DIR [--student DIR] [--samples 1000]

On `emoji64` and its held-out prompts. At each state guidance adds g = ε̂_w − ε̂_1 to the unguided prediction, and a
student of the same scale adds s. Images are drawn with ε̂_1 plus one part of g at each step: none (the teacher without
guidance), all (the teacher), what is learnt (s: the student), what is left (g − s), and g shortened to the length of s.

Two shares are printed, over the teacher's own states: ⟨s, g⟩ / ‖g‖² and ‖s‖² / ‖g‖². What a least-squares estimate
misses is orthogonal to it, ⟨s, g − s⟩ = 0; the nearer the two are to each other, the more s is such an estimate, and
the share is what it explains of g.

A student that is not given is trained in DIR, and options after `--` then go to `boostdiff distill`. What is drawn is
kept: a run that was interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...engine import embedded
from ...engine.errors import InputError
from ...engine.families import TextEmbeddings
from ...engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ...engine.model import Model
from ...engine.prompts import read_prompts
from ...engine.runners import Runner, TorchRunner
from ...engine.student import read_student
from ..fastest import FastestRunners
from ..quality.distances import left_out_distances
from ..quality.features import DISTANCE_NAME, paired_distance
from ..report.tables import within
from ..stats import jackknifed
from .held_out import HeldOut, refuse_training_options, student_model, teacher_model, trained
from .prediction_error import prediction_error, trajectory

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

NONE, ALL = "nothing: the teacher, w = 1", "g: the teacher"

Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def shortened(g: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Guidance g `(B, C, H, W)`, each sample at the length of what the student adds to it, s."""
    lengths = [torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) for x in (s, g)]
    return g / lengths[1].clamp(min=torch.finfo(g.dtype).tiny) * lengths[0]


PARTS: dict[str, tuple[str, Part]] = {
    "g − s": ("left out", lambda g, s: g - s),
    "g, as long as s": ("shortened", shortened),
}
"""What can be added to the unguided prediction: a name for files, which hold letters and digits alone, and the part as
a function of guidance g and the student's s, both `(B, C, H, W)`."""


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


def rows_of(held_out: HeldOut, folder: Path, samples: int) -> dict[str, tuple[str, torch.Tensor]]:
    """By what is added at each step, the row's name and the features `(samples, D)` of its images.

    Raises:
        InputError: the student is one of a range.
    """
    info = read_student(folder)
    if info.guidance_range is not None:
        raise InputError(f"{folder} holds a range student: distil one of one scale")
    teachers = held_out.teachers([1.0, info.guidance], samples)
    merged = student_model(folder)
    name = f"{folder.name} {info.adapter_sha256[:12]}"
    alone = held_out.features({name: SinglePassDenoiser}, samples, open_model=lambda: merged)
    names = {part: f"{slug} {info.adapter_sha256[:12]}" for part, (slug, _) in PARTS.items()}
    with FastestRunners(merged, passes=samples * held_out.steps) as runners:

        def opened(runner: Runner, part: Part) -> Denoiser:
            return PartOfGuidance(runner, SinglePassDenoiser(runners(merged.unet)), info.guidance, part)

        rows = {names[key]: partial(opened, part=part) for key, (_, part) in PARTS.items()}
        parts = held_out.features(rows, samples, open_model=teacher_model)
    return {
        NONE: teachers[1.0],
        ALL: teachers[info.guidance],
        "s: the student": (name, alone[name]),
        **{part: (named, parts[named]) for part, named in names.items()},
    }


def learnt_shares(model: Model, folder: Path, prompts: int) -> tuple[float, float]:
    """⟨s, g⟩ / ‖g‖² and ‖s‖² / ‖g‖² over the teacher's trajectories for the first held-out prompts."""
    text = model.family.encode(model.pipeline, read_prompts(embedded.HELD_OUT_PROMPTS)[:prompts])
    states = trajectory(model, text, read_student(folder).guidance)
    error, along = prediction_error(SinglePassDenoiser(TorchRunner(student_model(folder).unet)), states, text)
    # ‖s − g‖² = ‖s‖² − 2 ⟨s, g⟩ + ‖g‖², and the error is ‖s − g‖² / ‖g‖².
    return along, error - 1 + 2 * along


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    work: Annotated[Path, typer.Option(help="Folder for the student, features and results.")],
    student: Annotated[Path | None, typer.Option(help="A student of one scale.  [default: trained]")] = None,
    samples: Annotated[int, typer.Option(min=4, help="Images of each row (N).")] = 1000,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose states give the shares.")] = 96,
    sampler: Annotated[str, typer.Option(help="Sampler.")] = "ddim",
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
) -> None:
    """Measure."""
    if student is not None:
        refuse_training_options(context.args)
    work.mkdir(parents=True, exist_ok=True)
    student = student or trained(work / "student", ["--guidance", "3", *context.args])
    held_out = HeldOut(work=work, sampler=sampler, steps=steps)
    along, length = learnt_shares(teacher_model(), student, prompts)
    print(f"⟨s, g⟩ / ‖g‖² = {along:.3f}, ‖s‖² / ‖g‖² = {length:.3f}, over {prompts} prompts\n", flush=True)
    drawn = rows_of(held_out, student, samples)
    left_out = {row: left_out_distances(held_out.reference, features) for row, (_, features) in drawn.items()}
    distances = {row: held_out.distance(name, features) for row, (name, features) in drawn.items()}
    print(f"N = {samples}, {sampler}, {steps} steps; a difference's interval is paired, of 95%\n")
    print(f"| added at each step | {DISTANCE_NAME} | less than with nothing | paired distance to the teacher |")
    print("|---|---|---|---|")
    for row, (_, features) in drawn.items():
        gains = [n - x for n, x in zip(left_out[NONE], left_out[row], strict=True)]
        gain = within(jackknifed(distances[NONE] - distances[row], gains))
        print(f"| {row} | {distances[row]:.1f} | {gain} | {paired_distance(features, to=drawn[ALL][1]):.3f} |")


if __name__ == "__main__":
    app()
