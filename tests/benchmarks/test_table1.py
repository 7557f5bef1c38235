import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from boostdiff.benchmarks import table1
from boostdiff.benchmarks.config import Metrics, SweepConfig, Table1Config
from boostdiff.benchmarks.quality.distances import frechet_distance
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features, features_of
from boostdiff.benchmarks.quality.quality import QualityRow
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.benchmarks.quality.samples import SampleCache
from boostdiff.benchmarks.report.grids import further_tables, grid_table, markdown, terminal_grid, write_grid
from boostdiff.benchmarks.session import Session, Student, read_students, scales_for
from boostdiff.benchmarks.speed.random_weights import locate_configs
from boostdiff.benchmarks.table1 import PAPER, Cell, Grid, measure_grid, papers_figures, table1_columns
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import hash_of
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import generate, to_uint8
from boostdiff.engine.schedulers import make_scheduler
from boostdiff.engine.student import Distilled, StudentInfo, read_student
from rich.console import Console
from tiny import CPU, PROMPTS

MANY = [f"{prompt} {i}" for i in range(2) for prompt in PROMPTS]
MANY[3] += " apple" * 100
SAMPLES = 8


@pytest.fixture(scope="module")
def grids(tiny_folder: Path, students: dict[str, Path], reference: Path, clip_folder: Path) -> list[Grid]:
    measured = [
        measure_grid(
            locate(str(tiny_folder)),
            config,
            students=[students["lora"], students["bitfit"]],
            prompts=MANY,
            metrics=Metrics(reference=reference, clip=str(clip_folder)),
            device="cpu",
        )
        for config in (
            Table1Config(samplers=("ddim", "dpm++", "unipc", "euler"), steps=(3,), samples=SAMPLES),
            # The students' own scale, 3, is added.
            SweepConfig(guidance=(1.0,), steps=3, samples=SAMPLES),
        )
    ]
    return [grid for grid in measured if grid is not None]


def test_every_place_of_table_1_is_filled(grids: list[Grid]) -> None:
    table = grid_table(grids[0])
    headings, cells = table.headings, table.cells
    samplers = ("DDIM", "DPM-Solver++", "UniPC", "Euler")
    assert headings[1:] == [f"{sampler}, 3 steps" for sampler in samplers]
    assert [row[0] for row in cells] == ["teacher w=3", "teacher w=1", "student lora", "student bitfit"]
    assert len({cell for row in cells for cell in row[1:]}) > 12
    for cell in grids[0].cells:
        row, interval, delta = cell.quality, cell.quality.distance_interval, cell.quality.delta_to_guided
        assert interval is not None
        assert interval.low < row.distance < interval.high
        assert row.cost == row.steps * (1 + (row.name == "teacher w=3"))
        found = grids[0].cell("teacher w=3", cell.column)
        assert found is not None
        teacher = found.quality
        if row is teacher:
            assert delta is None
        else:
            assert delta is not None
            assert delta.value == pytest.approx(row.distance - teacher.distance)
            # What all rows share, the same prompts and noise, cancels.
            width = teacher.distance_interval.high - teacher.distance_interval.low
            assert 0 < delta.high - delta.low < interval.high - interval.low + width
        # The tiny model is not the paper's.
        assert cell.paper is None


def test_a_cell_is_what_its_settings_give(grids: list[Grid], tiny_folder: Path, reference: Path) -> None:
    model = load(locate(str(tiny_folder)), device=CPU)
    images = generate(
        model,
        GuidedDenoiser(TorchRunner(model.denoiser), 3.0),
        text=model.family.encode(model.pipeline, MANY),
        make_scheduler=lambda: make_scheduler("dpm++", model.pipeline.scheduler.config),
        steps=3,
        seed=0,
    )
    features = features_of(EfficientNetLite0Features(), to_uint8(images))
    cell = grids[0].cell("teacher w=3", "DPM-Solver++, 3 steps")
    assert cell is not None
    assert cell.quality.distance == pytest.approx(frechet_distance(Reference.load(reference), features), rel=1e-3)


def test_a_sweep_asks_no_student_for_what_it_has_not_learned(grids: list[Grid]) -> None:
    swept_table = grid_table(grids[1])
    headings, cells = swept_table.headings, swept_table.cells
    assert headings[1:] == ["w=1", "w=3"]
    shown = {row[0]: [cell != "–" for cell in row[1:]] for row in cells}
    assert shown == {
        "teacher": [True, True],
        "student lora": [False, True],
        "student bitfit": [False, True],
    }
    (_, _, deltas), *_ = further_tables(grids[1])
    assert [row[:2] for row in deltas.cells] == [["student lora", "–"], ["student bitfit", "–"]]
    # The scales that both tables have are the same images.
    table = grids[0].cell("teacher w=3", "DDIM, 3 steps")
    swept = grids[1].cell("teacher", "w=3")
    assert table is not None
    assert swept is not None
    assert table.quality.distance == swept.quality.distance


@pytest.mark.parametrize(
    ("bounds", "asked", "scales"),
    [
        (None, (1.0, 5.0), [4.0]),
        (None, (1.0, 4.0), [4.0]),
        ((2.0, 6.0), (1.0, 3.0, 5.0), [3.0, 5.0]),
        ((2.0, 6.0), (1.0, 9.0), [4.0]),
    ],
)
def test_a_student_has_a_place_at_any_scales(
    bounds: tuple[float, float] | None, asked: tuple[float, ...], scales: list[float]
) -> None:
    info = Distilled(method="lora", guidance=4.0, guidance_range=bounds)
    assert scales_for(info, asked) == scales


def test_all_forms_show_the_same_figures(grids: list[Grid], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    for grid in grids:
        write_grid(grid, tmp_path)
    files = {f"{name}.{kind}" for name in ("table1", "sweep") for kind in ("md", "json", "html")}
    assert {path.name for path in tmp_path.iterdir()} == files | {"report.json"}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for grid in grids:
        console.print(terminal_grid(grid))
    terminal = console.export_text()
    for grid in grids:
        text, page = ((tmp_path / f"{grid.name}.{kind}").read_text() for kind in ("md", "html"))
        values = json.loads((tmp_path / f"{grid.name}.json").read_text())["cells"]
        assert len(values) == len(grid.cells)
        for row in (cell["quality"] for cell in values):
            figures = [f"{row['distance']:.1f} [", f"{row['caption_score']['value']:.1f} ["]
            for key in ("delta_to_guided", "caption_delta_to_guided"):
                figures += [f"{row[key]['value']:+.1f} ["] if row[key] else []
            for figure in figures:
                assert figure in text
                assert figure.replace("[", "<span>[") in page
                assert figure in terminal
        assert f"{grid.caption_label}: 100 times the cosine" in text
        assert page.count("<img") == (grid.name == "sweep")


def test_prompts_that_are_cut_are_said(grids: list[Grid], tmp_path: Path) -> None:
    for grid in grids:
        (note,) = grid.provenance["notes"]
        assert note.startswith(f"1 of {SAMPLES} prompts are cut to ")
        assert f"\n- {note}\n" in markdown(grid)
        write_grid(grid, tmp_path)
        assert f'<p class="note">{note}' in (tmp_path / f"{grid.name}.html").read_text()


def test_a_table_says_what_it_was_measured_of(grids: list[Grid], students: dict[str, Path], reference: Path) -> None:
    for grid in grids:
        found = grid.provenance
        assert found["hashes"]["prompts"] == hash_of(MANY)
        assert found["hashes"]["reference"] == Reference.load(reference).sha256
        assert found["sampling_runner"] == "torch"
        adapters = [each["adapter_sha256"] for each in found["students"].values()]
        assert adapters == [read_student(students[name]).adapter_sha256 for name in ("lora", "bitfit")]
        assert "jackknife over 4 groups" in markdown(grid)


def test_columns_beside_few_step_students_name_their_timesteps(tiny: Model, students: dict[str, Path]) -> None:
    info = replace(read_student(students["lora"]), sampler="ddim", steps=2, timestep_spacing="trailing")
    student = Student(name="few", folder=students["lora"], info=info, denoiser=tiny.denoiser)
    for spacing, first, notes in ((None, "DDIM, 2 steps, trailing", 0), ("trailing", "DDIM, 2 steps", 1)):
        config = Table1Config(samplers=("ddim",), steps=(2, 3), timestep_spacing=spacing)
        session = Session(model=tiny, students=[student], config=config)
        assert list(table1_columns(session, config)) == [first, "DDIM, 3 steps"]
        said = session.provenance(None)["notes"]
        assert [note.startswith("timesteps of all rows are trailing") for note in said] == [True] * notes


def test_a_sweep_takes_students_of_several_scales(
    tiny_folder: Path, students: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(students["bitfit"], tmp_path / "w5"))
    replace(read_student(other), guidance=5.0).write(other)
    grid = measure_grid(
        locate(str(tiny_folder)),
        SweepConfig(guidance=(1.0,), steps=1, samples=2),
        students=[students["lora"], other],
        prompts=MANY,
        metrics=Metrics(reference=reference),
        device="cpu",
    )
    assert grid
    found = {(cell.quality.name, cell.guidance) for cell in grid.cells if cell.quality.name != "teacher"}
    assert found == {("student lora", 3.0), ("student bitfit", 5.0)}
    assert "So few images have no intervals" in markdown(grid)
    with pytest.raises(InputError, match="distilled at different guidance: compare them one at a time"):
        read_students([students["lora"], other], locate(str(tiny_folder)), None)


@pytest.mark.parametrize(
    ("ranges", "advice"),
    [
        ([(1.5, 5.0)], "all can give --guidance 3, pass it"),
        ([(2.0, 6.0), (1.5, 7.5)], "all can give --guidance 3, pass it"),
        ([(3.5, 9.0)], "compare them one at a time"),
        ([(1.5, 5.0), (4.0, 9.0)], "compare them one at a time"),
    ],
)
def test_the_scale_that_all_students_can_give_is_named(
    tiny_folder: Path, students: dict[str, Path], tmp_path: Path, ranges: list[tuple[float, float]], advice: str
) -> None:
    folders, files = [students["lora"]], locate(str(tiny_folder))
    for low, high in ranges:
        folders.insert(0, Path(shutil.copytree(students["lora"], tmp_path / f"{low}-{high}")))
        replace(read_student(folders[0]), guidance=(low + high) / 2, guidance_range=(low, high)).write(folders[0])
    with pytest.raises(InputError, match=f"the students were distilled at different guidance: {advice}"):
        read_students(folders, files, None)
    if "pass" in advice:
        assert read_students(folders, files, 3.0)[1] == 3


@pytest.mark.parametrize(
    "samples", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_few_images_have_a_caption_score_without_an_interval(
    tiny_folder: Path, students: dict[str, Path], reference: Path, clip_folder: Path, tmp_path: Path, samples: int
) -> None:
    grid = measure_grid(
        locate(str(tiny_folder)),
        SweepConfig(guidance=(1.0, 3.0), steps=1, samples=samples),
        students=[students["lora"]],
        prompts=MANY,
        metrics=Metrics(reference=reference, clip=str(clip_folder)),
        device="cpu",
    )
    assert grid
    write_grid(grid, tmp_path)
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    text, page = ((tmp_path / f"sweep.{kind}").read_text() for kind in ("md", "html"))
    assert text.count("100 times the cosine") == page.count("100 times the cosine") == 1
    assert len(cells) == 3
    for score in (cell["quality"]["caption_score"] for cell in cells):
        assert isinstance(score, float) == (samples < 4)
        shown = f"{score:.1f} |" if samples < 4 else f"{score['value']:.1f} ["
        assert shown in text


@pytest.mark.parametrize(
    ("prompts", "negative_prompt", "notes"),
    [
        (["a red cat"], MANY[3], ["1 of 1 negative prompts are cut to 16 tokens"]),
        (
            ["a red cat", MANY[3], f"{MANY[3]} dog"],
            f"{MANY[3]} fish",
            ["2 of 3 prompts are cut to 16 tokens", "1 of 1 negative prompts are cut to 16 tokens"],
        ),
        (["a red cat"], "a white fish", []),
    ],
)
def test_the_students_negative_prompt_counts(
    tiny: Model, prompts: list[str], negative_prompt: str, notes: list[str]
) -> None:
    network = EfficientNetLite0Features()
    cache = SampleCache(
        model=tiny, network=network, prompts=prompts, negative_prompt=negative_prompt, seed=0, batch_size=1
    )
    assert Session(model=tiny).provenance(cache)["notes"] == notes


def test_the_papers_figures_stand_beside_its_own_model() -> None:
    row = QualityRow(
        name="student lora",
        role="student",
        method=None,
        steps=20,
        cost=20,
        distance=16.04,
        distance_to_teacher_image=0.0,
        colors={},
    )
    paper = PAPER["student lora", "ddim", 20]
    cell = Cell(column="DDIM, 20 steps", sampler="ddim", guidance=3.0, quality=row, paper=paper)
    grid = Grid(
        name="table1",
        title="Table 1",
        cells=[cell],
        images=10,
        reference_images=20,
        features="FID",
        provenance={"model": "x", "config": {"seed": 0}, "notes": []},
    )
    assert "| student lora | 16.0 (paper: FID 15.6) |" in markdown(grid)
    assert "CLIP" not in markdown(grid)
    assert PAPER["teacher w=1", "dpm++", 50] == 28.4
    assert PAPER["teacher w=3", "ddim", 50] == 14.4


def test_the_papers_figures_stand_beside_what_the_paper_measured_alone(students: dict[str, Path]) -> None:
    files = locate_configs("sd21-base")
    infos = {method: read_student(folder) for method, folder in students.items()}

    def rows(*beside: StudentInfo, of: ModelFiles = files, steps: int = 20) -> set[str]:
        made = [Student(name=f"student {info.method}", folder=Path(), info=info, denoiser=None) for info in beside]
        return {key[0] for key in papers_figures(of, made) if key[1:] == ("ddim", steps)}

    teachers = {"teacher w=3", "teacher w=1"}
    assert rows() == teachers
    assert rows(*infos.values()) == {*teachers, "student lora", "student bitfit"}
    assert rows(*infos.values(), of=locate_configs("sd15")) == set()
    # Of as many parameters: Stable Diffusion 2.1 at 768 pixels.
    assert rows(of=replace(files, scheduler_config={"prediction_type": "v_prediction"})) == set()
    lora = infos["lora"]
    for changes in (
        {"guidance": 5.0},
        {"guidance_range": (1.0, 5.0)},
        {"live_negative_prompt": True},
        *({"settings": lora.settings | own} for own in ({"rank": 4}, {"alpha": 16.0}, {"targets": "all"})),
        {"method": "dora"},
    ):
        assert rows(replace(lora, **changes)) == teachers, changes
    assert rows(replace(lora, settings=lora.settings | {"alpha": 8.0})) == {*teachers, "student lora"}
    assert rows(replace(lora, negative_prompt="blurry")) == {"teacher w=1"}
    few = replace(lora, sampler="ddim", steps=20, timestep_spacing="trailing")
    assert rows(few, infos["bitfit"]) == set()
    assert rows(few, infos["bitfit"], steps=50) == {*teachers, "student bitfit"}


@pytest.mark.parametrize(
    ("distance", "spacing", "shown"), [("FID", None, 15.0), ("FD-EffNetLite0", None, None), ("FID", "trailing", None)]
)
def test_the_papers_fid_stands_beside_fid_alone(
    tiny_folder: Path,
    students: dict[str, Path],
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    distance: str,
    spacing: Literal["trailing"] | None,
    shown: float | None,
) -> None:
    """As if the tiny model were the paper's, and the network's name its distance's."""
    monkeypatch.setattr(table1, "papers_figures", lambda *_: {("teacher w=3", "ddim", 1): 15.0})
    monkeypatch.setattr(EfficientNetLite0Features, "distance_name", distance)
    grid = measure_grid(
        locate(str(tiny_folder)),
        Table1Config(samplers=("ddim",), steps=(1,), samples=2, timestep_spacing=spacing),
        students=[students["lora"]],
        prompts=MANY,
        metrics=Metrics(reference=reference),
        device="cpu",
    )
    assert grid
    assert grid.cells[0].paper == shown
    assert ("(paper: FID 15.0)" in markdown(grid)) == bool(shown)


def test_wrong_tables(tiny_folder: Path, students: dict[str, Path], reference: Path) -> None:
    with pytest.raises(InputError, match=r"--guidance 0\.5"):
        SweepConfig(guidance=(0.5,))
    with pytest.raises(InputError, match="unknown sampler 'magic'"):
        Table1Config(samplers=("magic",))
    for config, metrics, message in (
        (Table1Config(), Metrics(), "pass --reference DIR"),
        (SweepConfig(samples=0), Metrics(reference=reference), "--samples must be at least 2"),
        (Table1Config(samples=9), Metrics(reference=reference), "there are 8"),
    ):
        with pytest.raises(InputError, match=message):
            measure_grid(
                locate(str(tiny_folder)),
                config,
                students=[students["lora"]],
                prompts=MANY,
                metrics=metrics,
                device="cpu",
            )
