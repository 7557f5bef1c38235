"""The paper's Table 1 for any model, and a sweep of guidance: distances over samplers, steps and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..engine.model import ModelFiles
from ..engine.schedulers import make_scheduler
from .config import BenchConfig
from .fastest import FastestRunners
from .quality.distances import Distance
from .quality.metrics import Metrics, bounded_memory
from .quality.quality import clip_interval
from .quality.reference import Reference
from .quality.samples import Campaign, Contestant
from .session import Contest, Lineup, Student, read_students
from .stats import Estimate

SCHEMA_VERSION = 3
"""Of `table1.json` and `sweep.json`."""

SAMPLER_NAMES = {"ddim": "DDIM", "dpm++": "DPM-Solver++", "unipc": "UniPC", "euler": "Euler"}
TABLE1_STEPS = (20, 50)

PAPER_PARAMETERS = 865_910_724
"""Of the UNet that the paper's figures are of, Stable Diffusion 2.1 base."""

PAPER: dict[tuple[str, str, int], float] = {
    (row, sampler, steps): value
    for row, values in {
        "teacher w=3": (15.0, 14.4, 14.2, 14.1),
        "teacher w=1": (34.7, 28.1, 28.6, 28.4),
        "student lora": (15.6, 14.5, 14.5, 14.5),
        "student bitfit": (15.4, 14.5, 14.5, 14.4),
    }.items()
    for (sampler, steps), value in zip(
        [(sampler, steps) for sampler in ("ddim", "dpm++") for steps in TABLE1_STEPS], values, strict=True
    )
}
"""The paper's Table 1: FID on 10,000 captions of COCO 2017 validation, by row, sampler and steps."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure.

    Attributes:
        row: "teacher w=3", "student lora", …
        column: "DDIM, 20 steps", or "w=3".
        sampler: a name in `engine.samplers.SAMPLERS`.
        steps: sampling steps.
        guidance: w, or what the student stands for.
        cost: UNet passes an image.
        distance: Fréchet distance to real images.
        interval: of `distance`; None below N = 4.
        behind: how much further away than the teacher that comes first in the column, whose own is None; the interval
            is that of the difference, over the same prompts.
        clip: mean CLIP score; None where no CLIP model was named.
        paper: the paper's figure; None where it has none, or is of another model.
    """

    row: str
    column: str
    sampler: str
    steps: int
    guidance: float
    cost: int
    distance: float
    interval: Estimate | None
    behind: Estimate | None
    clip: Estimate | None
    paper: float | None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of distances.

    Attributes:
        name: "table1" or "sweep", also of its files.
        title: for people.
        cells: row by row; not every place is taken.
        images: N, of each cell.
        reference_images: behind the reference's statistics.
        features: what the distance is called.
        provenance: model, settings, hardware, versions.
    """

    name: str
    title: str
    cells: list[Cell]
    images: int
    reference_images: int
    features: str
    provenance: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

    def place(self, row: str, column: str) -> Cell | None:
        """The cell in a place, or None."""
        return next((cell for cell in self.cells if (cell.row, cell.column) == (row, column)), None)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Which tables to measure.

    Attributes:
        table1: the paper's.
        samplers: columns of the paper's table; names in `engine.samplers.SAMPLERS`.
        steps: sampling steps of the paper's table.
        sweep: guidance scales; empty for no sweep.
    """

    table1: bool = True
    samplers: tuple[str, ...] = tuple(SAMPLER_NAMES)
    steps: tuple[int, ...] = TABLE1_STEPS
    sweep: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        for sampler in self.samplers:
            make_scheduler(sampler, {})
        for scale in self.sweep:
            if not 1 <= scale < float("inf"):
                raise InputError(f"--sweep {scale:g} can't be used: guidance must be at least 1")

    def denoised(self, config: BenchConfig, students: int) -> int:
        """Steps of single images that all cells take together, at most."""
        steps = (students + 2) * len(self.samplers) * sum(self.steps) if self.table1 else 0
        return config.samples * (steps + len(self.sweep) * (students + 1) * config.steps)


def parse_sweep(text: str | None) -> tuple[float, ...]:
    """`1,2,3,5` to numbers, each once, in their order; None to none.

    Raises:
        InputError: it is no list of numbers.
    """
    try:
        return () if text is None else tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--sweep {text!r} is no list of numbers, such as 1,2,3,5") from None


Place = tuple[str, float, Contestant]
"""A cell to be: its column, its guidance and who fills it."""


def _table1_places(lineups: Sequence[Lineup], students: Sequence[Student], guidance: float) -> list[Place]:
    places: list[Place] = []
    for lineup in lineups:
        column = f"{SAMPLER_NAMES[lineup.sampler]}, {lineup.steps} steps"
        places += [(column, scale, lineup.teacher(scale)) for scale in (guidance, 1.0)]
        places += [(column, guidance, lineup.student(student, guidance)) for student in students]
    return places


def _sweep_places(lineup: Lineup, students: Sequence[Student], scales: Sequence[float]) -> list[Place]:
    """The teacher at every scale; students where they can follow, at their own scale alone if they take no other."""
    places: list[Place] = []
    for scale in scales:
        column = f"w={scale:g}"
        places.append((column, scale, lineup.teacher(scale)))
        for student in students:
            low, high = student.info.guidance_range or (student.info.guidance, student.info.guidance)
            if low <= scale <= high:
                places.append((column, scale, lineup.student(student, scale)))
    return places


def _row(contestant: Contestant, *, swept: bool) -> str:
    return "teacher" if swept and contestant.kind != "student" else contestant.name


def papers_rows(files: ModelFiles, students: Sequence[Student]) -> set[str]:
    """Rows that the paper has too: of its model, of LoRA at rank 8 and BitFit, at w = 3."""
    if sum(p.numel() for p in files.empty_unet().parameters()) != PAPER_PARAMETERS:
        return set()
    same = [s for s in students if s.info.guidance == 3 and s.info.settings.get("rank", 8) == 8]
    return {"teacher w=3", "teacher w=1", *(student.name for student in same)}


def _cells(
    campaign: Campaign, places: Sequence[tuple[str, Place]], reference: Reference, *, swept: bool, of_paper: set[str]
) -> list[Cell]:
    """Measure the cells, each after its column's first, a teacher.

    Args:
        campaign: gives the images' features.
        places: each with its sampler.
        reference: real images.
        swept: whether this is a sweep, whose rows are named without the scale.
        of_paper: rows that have the paper's figures.
    """
    cells = []
    first: dict[str, Distance] = {}
    for sampler, (column, guidance, contestant) in places:
        sampled = campaign.sampled(contestant)
        distance = Distance.of(reference, sampled.features)
        row = _row(contestant, swept=swept)
        cells.append(
            Cell(
                row=row,
                column=column,
                sampler=sampler,
                steps=contestant.steps,
                guidance=guidance,
                cost=contestant.cost,
                distance=distance.value,
                interval=distance.interval,
                behind=distance.gap(first[column]) if column in first else None,
                clip=clip_interval(sampled.clip),
                paper=PAPER.get((row, sampler, contestant.steps)) if row in of_paper else None,
            )
        )
        first.setdefault(column, distance)
    return cells


def measure_grids(
    files: ModelFiles,
    grids: GridConfig,
    config: BenchConfig,
    *,
    students: list[Path],
    prompts: list[str],
    metrics: Metrics,
    cache: Path | None = None,
    device: str = "auto",
    on_images: Callable[[str, int], None] = lambda name, count: None,
) -> list[Grid] | None:
    """Measure the tables that were asked for; needs no exported engine.

    Args:
        files: the model.
        grids: which tables.
        config: samples, seed and guidance; the sampler and steps of the sweep.
        students: folders.
        prompts: at least `config.samples`.
        metrics: what images are judged by; must have a reference.
        cache: folder where a killed run finds what it had sampled; None keeps nothing.
        device: "auto", "cpu", "cuda", …
        on_images: told of progress: the row's name and how many images took a step.

    Returns:
        None in all processes but the first, where several were launched.

    Raises:
        InputError: the students, the prompts or the metrics can't be used.
    """
    if metrics.reference is None:
        raise InputError("--table1 and --sweep are tables of distances to real images: pass --reference DIR")
    if not config.samples:
        raise InputError("--table1 and --sweep are about quality: leave --speed-only out")
    infos, guidance = read_students(students, files, config.guidance)
    contest = Contest.open(
        files, config, students=students, infos=infos, guidance=guidance, prompts=prompts, device=device
    )
    model, taking_part, processes = contest.model, contest.students, contest.processes
    runners = FastestRunners(model, passes=grids.denoised(config, len(students)), compiles=config.compile is not False)
    campaign = contest.campaign(metrics, cache=cache, on_images=on_images, runner=runners.name)
    reference = metrics.reference_for(campaign.network)
    assert reference is not None
    at = partial(Lineup, model=model, runner=runners)
    wanted: list[tuple[str, str, list[tuple[str, Place]]]] = []
    if grids.table1:
        lineups = [at(sampler=name, steps=steps) for name in grids.samplers for steps in grids.steps]
        places = [(lineup.sampler, p) for lineup in lineups for p in _table1_places([lineup], taking_part, guidance)]
        wanted.append(("table1", "Table 1", places))
    if grids.sweep:
        lineup = at(sampler=config.sampler, steps=config.steps)
        swept = [(config.sampler, place) for place in _sweep_places(lineup, taking_part, grids.sweep)]
        title = f"Guidance sweep, {SAMPLER_NAMES[config.sampler]}, {config.steps} steps"
        wanted.append(("sweep", title, swept))
    hashes = {"unet": files.unet_sha256(), "features": campaign.network.sha256}
    if campaign.clip:
        hashes["clip"] = campaign.clip.sha256
    with bounded_memory(), runners:
        if processes:
            campaign = campaign.fill([place[2] for _, _, places in wanted for _, place in places], processes)
            if not processes.is_main_process:
                return None
        of_paper = papers_rows(files, taking_part)
        return [
            Grid(
                name=name,
                title=title,
                cells=_cells(campaign, places, reference, swept=name == "sweep", of_paper=of_paper),
                images=config.samples,
                reference_images=reference.count,
                features=campaign.network.distance_name,
                provenance=contest.provenance() | {"hashes": hashes},
            )
            for name, title, places in wanted
        ]
