"""Few-step students against the same numbers of steps without further training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...engine import embedded
from ...engine.errors import InputError
from ...engine.model import locate
from ...engine.prompts import read_prompts
from ...engine.student import read_student
from ..config import Metrics, Table1Config
from ..quality.distances import paired_feature_distance
from ..quality.quality import Figures
from ..report.tables import Table, formatted
from ..session import Session
from ..stats import Statistic
from .held_out import Samples, Work

STAGES = "stages"
"""Where `boostdiff distill --few-steps` keeps the students before the last."""


def stages_of(student: Path) -> dict[int | None, Path]:
    """Folders of the stages by number of steps, None for the student of guidance.

    Raises:
        InputError: it is no few-step student.
    """
    info = read_student(student)
    if info.steps is None:
        raise InputError(
            f"the student in {student} is no few-step student: pass one of `boostdiff distill --few-steps`"
        )
    # A stage before the last lies beside the others.
    within = student.parent if student.absolute().parent.name == STAGES else student / STAGES
    begun, folders = within / "guidance", dict[int | None, Path]()
    if started := info.settings["start_from"]:
        begun = Path(started)
        found = read_student(begun)
        if found.adapter_sha256 != info.settings["start_from_sha256"]:
            raise InputError(f"{started} is no longer the student that the one in {student} began with")
        if found.steps is not None:
            folders = stages_of(begun)
    earlier = {int(path.name): path for path in within.glob("*") if path.name.isdecimal()}
    later = {steps: earlier[steps] for steps in sorted(earlier, reverse=True) if steps > info.steps}
    return (folders or {None: begun}) | later | {info.steps: student}


def _value(figure: Statistic | None) -> str:
    return formatted(figure.interval if figure else None)


def _delta(figure: Statistic | None, other: Statistic | None) -> str:
    return formatted(figure.delta_to(other) if figure else None, "+.1f")


def few_steps(
    student: Annotated[Path, typer.Option("--student", help="Folder that `boostdiff distill --few-steps` wrote.")],
    work: Work,
    samples: Samples = 200,
) -> None:
    """Images of every stage, of the student of guidance and of the guided teacher at as few steps, on `emoji64`.

    All rows are DDIM on trailing timesteps, from the same held-out prompts, seeds and noise. ΔFD and Δ caption score
    are paired, in brackets their 95% intervals: to the guided teacher of as many steps, and to the stage before, of
    twice as many. The last column is the mean feature distance to the same seed's image by what the first stage begins
    with, which perfect stages would leave as it is. Samples that are in the folder are kept.
    """
    folders = stages_of(student)
    steps = [number for number in folders if number is not None]
    config = Table1Config(samplers=("ddim",), steps=tuple(steps), samples=samples)
    metrics, prompts = Metrics().for_model(embedded.MODEL_NAME), read_prompts(embedded.HELD_OUT_PROMPTS)
    opened = Session.open(
        locate(embedded.MODEL_NAME),
        config,
        students=list(folders.values()),
        guidance=None,
        prompts=prompts,
        device="auto",
    )
    with opened as session:
        cache = session.sample_cache(metrics, folder=work / "features")
        plain, *stages = session.students
        # With the first few-step student: it sets the spacing.
        first = session.at("ddim", steps[0])
        before = Figures.of(cache, replace(first, steps=2 * steps[0]).student(plain, session.guidance))
        original, cells = before.sampled.features, []
        for number, stage in zip(steps, stages, strict=True):
            at = session.at("ddim", number)
            variants = {
                f"teacher w={session.guidance:g}": at.teacher(session.guidance),
                "student of guidance": at.student(plain, session.guidance),
                f"few-step student, stage {number}": at.student(stage, session.guidance),
            }
            guided = None
            for name, variant in variants.items():
                found = Figures.of(cache, variant)
                guided = guided or found
                cells.append(
                    [
                        str(number),
                        name,
                        str(variant.cost),
                        _value(found.distance),
                        _delta(found.distance, guided.distance),
                        _delta(found.distance, before.distance),
                        _value(found.caption),
                        _delta(found.caption, before.caption),
                        f"{paired_feature_distance(found.sampled.features, original):.3f}",
                    ]
                )
            before = found
    headings = ["steps", f"N = {samples}", "passes", cache.network.distance_name, "ΔFD to the teacher"]
    headings += ["ΔFD to the stage before", "caption score", "Δ caption score to the stage before"]
    print(Table(headings=[*headings, f"distance to the image of {2 * steps[0]} steps"], cells=cells).markdown())
