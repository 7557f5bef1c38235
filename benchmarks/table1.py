"""Distances over samplers and steps (`bench table1`, the paper's Table 1) or guidance scales (`bench sweep`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..engine.model import ModelFiles
from ..engine.options import STEPS
from ..engine.schedulers import check_steps
from ..engine.student import Distilled, StudentInfo
from .config import SAMPLER_NAMES, Metrics, SweepConfig, Table1Config
from .quality.features import InceptionFeatures
from .quality.quality import QualityRow, compared
from .quality.samples import SampleCache, SamplingVariant, bounded_memory
from .session import Session, Student, with_sampling

SCHEMA_VERSION = 5
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
class Cell:
    """A row at one setting.

    Attributes:
        column: "DDIM, 20 steps", or "w=3".
        sampler: see `SamplingVariant`, as for `guidance`.
        quality: compared with the teacher that comes first in the column; its name is the row's.
        paper: the paper's FID; None where it has none, or has another model, or the distance is no FID.
    """

    column: str
    sampler: str
    guidance: float
    quality: QualityRow
    paper: float | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of distances.

    Attributes:
        name: "table1" or "sweep", also the name of its files.
        cells: column by column; not every row has one in each.
        images: N, of each cell.
        reference_images: real images behind the reference's statistics.
        features: name of the distance.
        caption_label: name of the caption score, with its model; None without one.
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

    def cell(self, row: str, column: str) -> Cell | None:
        """The cell of a row and column, or None."""
        return next((cell for cell in self.cells if (cell.quality.name, cell.column) == (row, column)), None)


Columns = dict[str, list[SamplingVariant]]
"""What is sampled for the cells of each column; a cell's row is the variant's name."""


def table1_columns(session: Session, config: Table1Config) -> Columns:
    """Guided teacher, unguided teacher and students in each column; a column per sampler and number of steps."""
    columns: Columns = {}
    for at in (session.at(sampler, steps) for sampler in config.samplers for steps in config.steps):
        students = [at.student(student, at.guidance) for student in at.students]
        # Beside a few-step student all rows of the column have its timesteps.
        spaced = f", {at.spacing}" if at.spacing != config.timestep_spacing else ""
        column = f"{SAMPLER_NAMES[at.sampler]}, {at.steps} steps{spaced}"
        columns[column] = [at.teacher(at.guidance), at.teacher(1.0), *students]
    return columns


def sweep_columns(session: Session, config: SweepConfig) -> Columns:
    """The teacher at every scale; students only at scales that they were distilled for, see `with_sampling`."""
    session, columns = session.at(str(config.sampler), config.steps or STEPS), Columns()
    for scale in config.guidance:
        variants = columns[f"w={scale:g}"] = [replace(session.teacher(scale), name="teacher")]
        for student in session.students:
            low, high = student.info.guidance_range or (student.info.guidance, student.info.guidance)
            variants += [session.student(student, scale)] if low <= scale <= high else []
    return columns


def is_papers(info: StudentInfo) -> bool:
    """Whether the paper has such a student: plain guidance, w = 3, LoRA at rank 8 in attention or BitFit, no more."""
    conditions = Distilled(**{item.name: getattr(info, item.name) for item in fields(Distilled)})
    if conditions != Distilled(method=info.method, guidance=3.0) or info.settings.get("norms"):
        return False
    rank, alpha, targets = (info.settings.get(name) for name in ("rank", "alpha", "targets"))
    return info.method == "bitfit" or (info.method == "lora" and (rank, alpha or 8, targets) == (8, 8, "attention"))


def papers_figures(files: ModelFiles, students: Sequence[Student]) -> dict[tuple[str, str, int], float]:
    """What of `PAPER` can stand beside this model's rows: that of the paper's model, teacher and kind of student."""
    # Stable Diffusion 2.1 at 768 pixels has as many parameters.
    v_prediction = files.scheduler_config.get("prediction_type") == "v_prediction"
    if v_prediction or sum(p.numel() for p in files.empty_denoiser().parameters()) != PAPER_PARAMETERS:
        return {}
    rows = {"teacher w=1", *(student.name for student in students if is_papers(student.info))}
    if not any(student.info.negative_prompt for student in students):
        # The guided teacher has the students' negative prompt.
        rows.add("teacher w=3")
    # All rows beside a few-step student take its timesteps.
    others = {(student.info.sampler, student.info.steps) for student in students}
    return {key: fid for key, fid in PAPER.items() if key[0] in rows and key[1:] not in others}


def measured_cells(cache: SampleCache, columns: Columns, *, paper: Mapping[tuple[str, str, int], float]) -> list[Cell]:
    """Measure the cells, each beside the first of its column, a teacher; `paper` is what `papers_figures` gave."""
    return [
        Cell(
            column=column,
            sampler=variant.sampler,
            guidance=variant.guidance,
            quality=row,
            paper=paper.get((row.name, variant.sampler, row.steps)),
        )
        for column, variants in columns.items()
        for variant, (row, _) in zip(variants, compared((cache, each) for each in variants), strict=True)
    ]


def measure_grid(
    files: ModelFiles,
    config: Table1Config | SweepConfig,
    *,
    students: list[Path],
    prompts: list[str],
    metrics: Metrics,
    cache: Path | None = None,
    device: str = "auto",
    report: Callable[[str], None] = lambda message: None,
    on_images: Callable[[str, int], None] = lambda name, count: None,
) -> Grid | None:
    """Measure a table, with arguments as `bench.bench` has them; needs no exported engine, but a reference."""
    if metrics.reference is None:
        raise InputError("this is a table of distances to real images: pass --reference DIR")
    if not config.samples:
        raise InputError("--samples must be at least 2: this is a table of distances")
    scale, guided = (config.guidance, True) if isinstance(config, Table1Config) else (None, False)
    if isinstance(config, Table1Config):
        check_steps(files.scheduler_config, config.samplers, config.steps, spacing=config.timestep_spacing)
    else:
        config = with_sampling(config, students)
        steps = [config.steps or STEPS]
        check_steps(files.scheduler_config, [str(config.sampler)], steps, spacing=config.timestep_spacing)
    opened = Session.open(
        files, config, students=students, guidance=scale, prompts=prompts, device=device, guided=guided
    )
    with opened as session:
        if isinstance(config, Table1Config):
            name, title, columns = "table1", "Table 1", table1_columns(session, config)
        else:
            name, title = "sweep", f"Guidance sweep, {SAMPLER_NAMES[str(config.sampler)]}, {config.steps} steps"
            columns = sweep_columns(session, config)
        filled = session.sample_cache(metrics, folder=cache, on_images=on_images)
        report(f"sampling {config.samples} images per cell")
        samples = session.shared_out(filled, [variant for variants in columns.values() for variant in variants])
        if samples is None:
            return None
        with bounded_memory(session.batch_size):
            # The paper's are FID, of the model's own timesteps.
            alike = samples.network.distance_name == InceptionFeatures.distance_name and not config.timestep_spacing
            paper = papers_figures(files, session.students) if alike else {}
            cells = measured_cells(samples, columns, paper=paper)
        return Grid(
            name=name,
            title=title,
            cells=cells,
            images=config.samples,
            reference_images=samples.reference.count if samples.reference else 0,
            features=samples.network.distance_name,
            caption_label=samples.clip.label if samples.clip else None,
            provenance=session.provenance(samples, unet=files.denoiser_sha256()),
        )
