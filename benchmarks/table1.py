"""Distances over samplers and steps (`bench table1`, the paper's Table 1) or guidance scales (`bench sweep`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..engine.model import ModelFiles
from ..engine.schedulers import check_steps
from .config import SAMPLER_NAMES, Metrics, SweepConfig, Table1Config
from .quality.distances import Distance
from .quality.reference import Reference
from .quality.samples import SampleCache, SamplingVariant, bounded_memory
from .session import Session, Student, read_students
from .stats import Estimate, Score

SCHEMA_VERSION = 4
"""Version of `table1.json` and `sweep.json`."""

PAPER_PARAMETERS = 865_910_724
"""UNet parameters of the paper's model, Stable Diffusion 2.1 base."""

PAPER: dict[tuple[str, str, int], float] = {
    (row, sampler, steps): value
    for row, values in {
        "teacher w=3": (15.0, 14.4, 14.2, 14.1),
        "teacher w=1": (34.7, 28.1, 28.6, 28.4),
        "student lora": (15.6, 14.5, 14.5, 14.5),
        "student bitfit": (15.4, 14.5, 14.5, 14.4),
    }.items()
    for (sampler, steps), value in zip(
        [(sampler, steps) for sampler in ("ddim", "dpm++") for steps in (20, 50)], values, strict=True
    )
}
"""The paper's Table 1: FID on 10,000 captions of COCO 2017 validation, by row, sampler and steps."""


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """A cell that is to be measured.

    Attributes:
        row: "teacher w=3", "student lora", …
        column: "DDIM, 20 steps", or "w=3".
        sampler: a name in `engine.schedulers.SAMPLERS`.
        guidance: guidance scale w; of a student, the one that it was distilled at or is given.
        variant: what is sampled.
    """

    row: str
    column: str
    sampler: str
    guidance: float
    variant: SamplingVariant


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure, with its place as in `CellSpec`.

    Attributes:
        row: see `CellSpec`.
        column: see `CellSpec`.
        sampler: see `CellSpec`.
        steps: sampling steps.
        guidance: see `CellSpec`.
        cost: UNet passes per image.
        distance: Fréchet distance to real images.
        interval: interval of `distance`; None below N = 4.
        delta_to_guided: ΔFD to the teacher that comes first in the column, paired; None for itself.
        caption_score: mean of `Grid.caption_label`; None without a CLIP model.
        caption_delta_to_guided: like `delta_to_guided`.
        paper: the paper's figure; None where it has none, or has another model.
    """

    row: str
    column: str
    sampler: str
    steps: int
    guidance: float
    cost: int
    distance: float
    interval: Estimate | None
    delta_to_guided: Estimate | None
    caption_score: Estimate | None = None
    caption_delta_to_guided: Estimate | None = None
    paper: float | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of distances.

    Attributes:
        name: "table1" or "sweep", also the name of its files.
        title: heading.
        cells: row by row; not every place is taken.
        images: N, of each cell.
        reference_images: real images behind the reference's statistics.
        features: name of the distance.
        caption_label: name of the caption score, with its model; None without one.
        provenance: model, settings, hardware, versions.
    """

    name: str
    title: str
    cells: list[Cell]
    images: int
    reference_images: int
    features: str
    caption_label: str | None = None
    provenance: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

    def place(self, row: str, column: str) -> Cell | None:
        """The cell in a place, or None."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)


def table1_cells(session: Session, config: Table1Config) -> list[CellSpec]:
    """Guided teacher, unguided teacher and students in each column; a column per sampler and number of steps."""
    cells = []
    for at in (session.at(sampler, steps) for sampler in config.samplers for steps in config.steps):
        column = f"{SAMPLER_NAMES[at.sampler]}, {at.steps} steps"
        variants = [(scale, at.teacher(scale)) for scale in (at.guidance, 1.0)]
        variants += [(at.guidance, at.student(student, at.guidance)) for student in at.students]
        cells += [
            CellSpec(row=variant.name, column=column, sampler=at.sampler, guidance=scale, variant=variant)
            for scale, variant in variants
        ]
    return cells


def sweep_cells(session: Session, config: SweepConfig) -> list[CellSpec]:
    """The teacher at every scale; students only at scales that they were distilled for."""
    cells = []
    for scale in config.guidance:
        rows = {"teacher": session.teacher(scale)}
        for student in session.students:
            low, high = student.info.guidance_range or (student.info.guidance, student.info.guidance)
            if low <= scale <= high:
                rows[student.name] = session.student(student, scale)
        cells += [
            CellSpec(row=row, column=f"w={scale:g}", sampler=session.sampler, guidance=scale, variant=variant)
            for row, variant in rows.items()
        ]
    return cells


def papers_rows(files: ModelFiles, students: Sequence[Student]) -> set[str]:
    """Rows that the paper has too: its model, LoRA at rank 8 and BitFit, at w = 3."""
    if sum(p.numel() for p in files.empty_unet().parameters()) != PAPER_PARAMETERS:
        return set()
    same = [s for s in students if s.info.guidance == 3 and s.info.settings.get("rank", 8) == 8]
    return {"teacher w=3", "teacher w=1", *(student.name for student in same)}


def measured_cells(
    cache: SampleCache, specs: Sequence[CellSpec], reference: Reference, *, paper: set[str]
) -> list[Cell]:
    """Measure the cells, each after the first of its column, a teacher.

    Args:
        cache: samples, or reads what was sampled before.
        specs: cells to measure.
        reference: real images.
        paper: rows that have the paper's figures.
    """
    cells = []
    first: dict[str, tuple[Distance, Score | None]] = {}
    for spec in specs:
        sampled, variant = cache.sampled(spec.variant), spec.variant
        distance = Distance.of(reference, sampled.features)
        caption = None if sampled.clip is None else Score.of(sampled.clip.tolist())
        teacher, teachers_caption = first.get(spec.column, (None, None))
        cells.append(
            Cell(
                row=spec.row,
                column=spec.column,
                sampler=spec.sampler,
                steps=variant.steps,
                guidance=spec.guidance,
                cost=variant.cost,
                distance=distance.value,
                interval=distance.interval,
                delta_to_guided=distance.delta_to(teacher) if teacher else None,
                caption_score=caption.interval if caption else None,
                caption_delta_to_guided=caption.delta_to(teachers_caption) if caption and teachers_caption else None,
                paper=PAPER.get((spec.row, spec.sampler, variant.steps)) if spec.row in paper else None,
            )
        )
        first.setdefault(spec.column, (distance, caption))
    return cells


def measure_grid(
    files: ModelFiles,
    config: Table1Config | SweepConfig,
    *,
    students: list[Path],
    prompts: list[str],
    metrics: Metrics,
    cache: Path | None = None,
    device: str = "auto",
    on_images: Callable[[str, int], None] = lambda name, count: None,
) -> Grid | None:
    """Measure a table; needs no exported engine.

    Args:
        files: the model.
        config: which table.
        students: student folders.
        prompts: at least `config.samples`.
        metrics: what images are compared by; must have a reference.
        cache: folder where a killed run finds what it had sampled; None keeps nothing.
        device: "auto", "cpu", "cuda", …
        on_images: progress callback: row name, and number of images that took a step.

    Returns:
        None in all processes but the first, where several were launched.

    Raises:
        InputError: the students, the prompts or the metrics can't be used.
    """
    if metrics.reference is None:
        raise InputError("this is a table of distances to real images: pass --reference DIR")
    if not config.samples:
        raise InputError("--samples must be at least 2: this is a table of distances")
    if isinstance(config, Table1Config):
        name, sampler, steps, scale = "table1", config.samplers[0], config.steps[0], config.guidance
        title = "Table 1"
        check_steps(files.scheduler_config, config.samplers, config.steps)
    else:
        name, sampler, steps, scale = "sweep", config.sampler, config.steps, None
        title = f"Guidance sweep, {SAMPLER_NAMES[sampler]}, {steps} steps"
        check_steps(files.scheduler_config, [sampler], [steps])
    infos, guidance = read_students(students, files, scale)
    opened = Session.open(
        files,
        config,
        sampler=sampler,
        steps=steps,
        students=students,
        infos=infos,
        guidance=guidance,
        prompts=prompts,
        device=device,
    )
    with opened as session:
        specs = table1_cells(session, config) if isinstance(config, Table1Config) else sweep_cells(session, config)
        opened_cache = session.sample_cache(metrics, folder=cache, on_images=on_images)
        reference = metrics.reference_for(opened_cache.network)
        assert reference is not None
        samples = session.shared_out(opened_cache, [spec.variant for spec in specs])
        if samples is None:
            return None
        with bounded_memory(session.batch_size):
            cells = measured_cells(samples, specs, reference, paper=papers_rows(files, session.students))
        return Grid(
            name=name,
            title=title,
            cells=cells,
            images=config.samples,
            reference_images=reference.count,
            features=samples.network.distance_name,
            caption_label=samples.clip.label if samples.clip else None,
            provenance=session.provenance(samples, unet=files.unet_sha256()),
        )
