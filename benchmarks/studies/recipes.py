"""Recipes of students at equal budgets: how much of guidance each explains, and what its images are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...distill.config import BATCH_SIZE, UPDATES
from ...engine.errors import InputError
from ...engine.guidance_term import r2_of, trajectory
from ...engine.options import SamplerOption
from ...engine.runners import TorchRunner
from ..config import BenchConfig, comma_separated
from ..quality.quality import QualityRow, evaluate
from ..report.tables import Table
from ..session import Session
from .held_out import Steps, Work, check_plan, check_prompts, held_out, trained
from .seeds import over_seeds

GUIDANCE = 3.0
STATES = UPDATES * BATCH_SIZE
"""Samples of budget 1, the demo's: each a pass and a backward pass; the teacher evaluates one in `--reuse` of them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of `boostdiff distill`, beside the number of updates, which the budget decides.

    Attributes:
        options: as on the command line.
        batch_size: samples per update.
    """

    options: tuple[str, ...] = ()
    batch_size: int = BATCH_SIZE

    def command(self, budget: float, seed: int) -> list[str]:
        """All options at a multiple of the demo's budget."""
        updates = max(1, round(STATES * budget / self.batch_size))
        size = ("--updates", str(updates), "--batch-size", str(self.batch_size), "--seed", str(seed))
        return ["--guidance", f"{GUIDANCE:g}", *self.options, *size]


RECIPES: dict[str, Recipe] = {
    "default": Recipe(),
    "first": Recipe(options=("--learning-rate", "1e-3", "--reuse", "1"), batch_size=32),
    "reuse-1": Recipe(options=("--reuse", "1")),
    "reuse-4": Recipe(options=("--reuse", "4")),
    "lr-2e-3": Recipe(options=("--learning-rate", "2e-3")),
    "lr-8e-3": Recipe(options=("--learning-rate", "8e-3")),
    "batch-32": Recipe(batch_size=32),
    "batch-8": Recipe(batch_size=8),
    "transformer": Recipe(options=("--targets", "transformer")),
    "every-layer": Recipe(options=("--targets", "all")),
    "every-layer-r64": Recipe(options=("--targets", "all", "--rank", "64")),
    "live": Recipe(options=("--negative-prompt", "live")),
    "dora": Recipe(options=("--method", "dora")),
    "bitfit": Recipe(options=("--method", "bitfit")),
}

budgets_of = comma_separated("--budgets", float, "1,4,16", least=0.001)


def recipes(
    work: Work,
    names: Annotated[
        str, typer.Option("--recipes", help=f"Comma-separated: {', '.join(RECIPES)}.", show_default="all")
    ] = "",
    budgets: Annotated[str, typer.Option(help="Multiples of the demo's budget, comma-separated.")] = "1",
    seeds: Annotated[int, typer.Option(min=1, help="Training runs per recipe and budget.")] = 1,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts for R².")] = 64,
    samples: Annotated[
        int, typer.Option(min=0, help="Images per row (N), 4 or more; 0 leaves the image columns out.")
    ] = 0,
    sampler: SamplerOption = "ddim",
    steps: Steps = 20,
) -> None:
    """Train recipes at equal budgets on `emoji64`, and print what each student explains and what its images are worth.

    A budget of 1 is 8,320 samples, each a pass of the student and a backward pass; the teacher evaluates one in
    `--reuse` of them, in two passes. R² of the guidance term is measured as `guidance-r2` does, over all timesteps and
    at each. ± is the standard error over training seeds. Students and features that are in the folder are kept: an
    interrupted run goes on.
    """
    chosen = names.split(",") if names else list(RECIPES)
    if unknown := [name for name in chosen if name not in RECIPES]:
        raise InputError(f"--recipes {','.join(unknown)} is unknown: choose from {', '.join(RECIPES)}")
    # What can't be used is refused before training, which takes hours.
    multiples = budgets_of(budgets)
    if 0 < samples < 4:
        raise InputError(f"--samples {samples} has no distribution: pass at least 4, or 0")
    check_prompts(prompts, "--prompts")
    config = BenchConfig(samples=samples or prompts, sampler=sampler, steps=steps)
    check_plan(config)
    groups = {
        (name, budget): [
            trained(work / f"{name}-{budget:g}x-{seed}", RECIPES[name].command(budget, seed)) for seed in range(seeds)
        ]
        for name in chosen
        for budget in multiples
    }
    folders = [folder for group in groups.values() for folder in group]
    with held_out(folders, config, work=work) as (session, cache):
        students = {student.folder: student for student in session.students}
        r2, timesteps = explained(session, prompts)
        rows: dict[Path, QualityRow] = {}
        if samples:
            quality = evaluate(
                cache,
                guided=session.teacher(GUIDANCE),
                unguided=session.teacher(1.0),
                others=[session.student(student, GUIDANCE) for student in session.students],
            )
            rows = dict(zip(students, quality.rows[2:], strict=True))
    headings = [
        "recipe",
        "budget",
        "parameters",
        "updates",
        "teacher evaluations",
        "seconds",
        "R²",
        *(f"t = {t}" for t in timesteps),
    ]
    headings += ["ΔFD to the guided teacher", "Δ caption score", "distance to the teacher's image"] if rows else []
    cells = []
    for (name, budget), group in groups.items():
        infos = [students[folder].info for folder in group]
        cells.append(
            [
                name,
                f"{budget:g}",
                f"{infos[0].trainable_parameters:,}",
                f"{infos[0].result['updates']:,}",
                f"{infos[0].result['teacher_evaluations']:,}",
                over_seeds([info.result["seconds"] for info in infos], "{:.0f}"),
                *(over_seeds(each, "{:.3f}") for each in zip(*(r2[folder] for folder in group), strict=True)),
                *(_image_cells([rows[folder] for folder in group]) if rows else ()),
            ]
        )
    print(Table(headings=headings, cells=cells).markdown())


def explained(session: Session, prompts: int) -> tuple[dict[Path, list[float]], list[int]]:
    """By student's folder R² over all states, then at each timestep; and the timesteps."""
    text = session.model.family.encode(session.model.pipeline, session.prompts[:prompts])
    states = trajectory(session.model, text, GUIDANCE)
    r2 = {}
    for student in session.students:
        denoiser = student.info.denoiser(TorchRunner(student.denoiser))
        r2[student.folder] = [r2_of(denoiser, part, text) for part in (states, *([state] for state in states))]
    return r2, [int(state.t) for state in states]


def _image_cells(rows: Sequence[QualityRow]) -> list[str]:
    return [
        over_seeds([row.delta_to_guided for row in rows], "{:+.1f}"),
        over_seeds([row.caption_delta_to_guided for row in rows], "{:+.1f}"),
        over_seeds([row.distance_to_teacher_image for row in rows], "{:.3f}"),
    ]
