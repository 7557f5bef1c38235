import html
import io
import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from boostdiff.benchmarks import bench as bench_module
from boostdiff.benchmarks.bench import BenchResult, _compared, _in_torch, bench
from boostdiff.benchmarks.config import BenchConfig, Metrics, Table1Config, parse_batch_sizes
from boostdiff.benchmarks.quality.samples import COLORS, bounded_memory
from boostdiff.benchmarks.report import report as report_module
from boostdiff.benchmarks.report.report import terminal_report, write_report
from boostdiff.benchmarks.report.tables import baselines_table, quality_table
from boostdiff.benchmarks.session import Session
from boostdiff.benchmarks.speed.flops import Flops
from boostdiff.benchmarks.speed.throughput import RunnerMode, Speed, SpeedRatio, SpeedRow
from boostdiff.benchmarks.stats import Estimate, Percentiles
from boostdiff.benchmarks.table1 import measure_grid
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine import embedded
from boostdiff.engine.compiled import has_bfloat16
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.model import Model, ModelFiles, locate
from boostdiff.engine.runners import TorchRunner
from diffusers import UNet2DConditionModel
from rich.console import Console
from tiny import CPU, PROMPTS, make_xl_pipeline

MANY = [f"{prompt} on a red background" for prompt in PROMPTS] * 6


@pytest.mark.parametrize(
    ("value", "low", "high", "says"),
    [
        (
            -19.6,
            -25.0,
            -14.2,
            "differs from the teacher's by -19.6 [-25.0, -14.2] (nearer to real images, no closer copy of the teacher)",
        ),
        (3.0, 1.0, 5.0, "differs from the teacher's by +3.0 [+1.0, +5.0] (farther from real images)"),
        (-1.0, -3.0, 1.0, "is within noise of the teacher's (-1.0 [-3.0, +1.0])"),
    ],
)
def test_the_verdict_tells_how_far_the_student_is_from_its_teacher(
    value: float, low: float, high: float, says: str
) -> None:
    assert _compared(Estimate(value=value, low=low, high=high, coverage=0.95)) == says


def test_too_few_images_are_said(result: BenchResult) -> None:
    assert result.quality
    rows = [
        replace(row, distance_interval=None, delta_to_guided=None, gain_recovered=None) for row in result.quality.rows
    ]
    few = replace(result, quality=replace(result.quality, rows=rows, images=2))
    assert "N = 2 images are too few to compare quality" in few.verdict()
    column = quality_table(few.quality).headings.index("guidance gain recovered")
    assert {row[column] for row in quality_table(few.quality).cells} == {"–"}


def test_every_runner_here_is_timed(result: BenchResult) -> None:
    speed = result.speed
    variants = [(row.runner, row.mode, row.batch_size) for row in speed.rows]
    ours = product(("torch", "onnx"), ("teacher", "student", "unguided"), (1, 2))
    assert sorted(variants) == sorted([*ours, ("stock diffusers", "teacher", 1), ("stock diffusers", "teacher", 2)])
    if not torch.cuda.is_available():
        assert "exported without --trt" in result.skipped["tensorrt"]
    for row in speed.rows:
        assert 0 < row.images_per_second.low <= row.images_per_second.value <= row.images_per_second.high
        assert row.latency.median <= row.latency.p90
        assert 0 < row.tflops == pytest.approx(row.peak_share * speed.peaks["float32"])
        assert row.memory_in_use is None
        stock = row.runner == "stock diffusers"
        assert (row.host_gap is None) == (row.text_encoder is None) == (row.vae_decode is None) == stock
        assert 3 * row.denoiser_step.median < row.latency.median
    assert speed.peaks.keys() == {"float32", *(["bfloat16"] if has_bfloat16(CPU) else [])}
    pairs = 2 + 3 + 1
    for batch_size in (1, 2):
        found = [r for r in speed.ratios if r.batch_size == batch_size]
        fastest = speed.fastest_teacher(batch_size).runner
        (best,) = {r.faster for r in found if r.slower.runner == "stock diffusers"}
        assert len(found) == 2 * (pairs + (best.runner == "torch" and fastest == "onnx"))
        assert (RunnerMode(fastest, "teacher"), best) in [(r.slower, r.faster) for r in found]
        rates = {
            r.runner: r.images_per_second.value
            for r in speed.rows
            if r.mode == "student" and r.batch_size == batch_size
        }
        (over,) = {r.faster for r in speed.ratios if r.slower.runner[:5] == "stock" and r.batch_size == batch_size}
        assert over == RunnerMode(max(rates, key=rates.get), "student")
    assert "as fast as stock diffusers with guidance" in result.verdict()
    for ratio in speed.ratios:
        assert (ratio.ceiling is None) == (ratio.slower != RunnerMode(ratio.faster.runner, "teacher"))
    assert result.headline is not None
    assert result.headline.part == "images"


def test_a_report_is_written_where_teacher_and_student_were_never_timed_together(
    result: BenchResult, tmp_path: Path
) -> None:
    of_one_mode = [[row for row in result.speed.rows if row.mode == mode] for mode in ("student", "teacher")]
    for rows in (*of_one_mode, []):
        alone = replace(result, speed=replace(result.speed, rows=rows, ratios=[]))
        write_report(alone, tmp_path)
        verdict = json.loads((tmp_path / "report.json").read_text())["verdict"]
        assert verdict.startswith("Student and teacher could not be timed on one runner")
        assert "N = 8" in verdict
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(terminal_report(alone))
        assert "could not be timed" in console.export_text()


def test_the_verdict_speaks_of_one_row_of_the_student() -> None:
    estimate, spread = Estimate(value=2.0, low=2.0, high=2.0, coverage=0.95), Percentiles.of([0.5])

    def student(runner: str, batch_size: int, rate: float) -> SpeedRow:
        per_second = replace(estimate, value=rate)
        values = {"precision": "float32", "latency": spread, "denoiser_step": spread, "tflops": 1.0}
        return SpeedRow(mode="student", runner=runner, batch_size=batch_size, images_per_second=per_second, **values)

    def ratio(slower: str, faster: str, batch_size: int, value: float) -> SpeedRatio:
        return SpeedRatio(
            slower=RunnerMode(slower, "teacher"),
            faster=RunnerMode(faster, "student"),
            part="images",
            batch_size=batch_size,
            estimate=replace(estimate, value=value),
            ceiling=2.0,
        )

    # At batch 16 the two-pass teacher ran out of memory; captured was the fastest student there.
    rows = [student("captured", 16, 9.0), student("captured", 8, 8.0), student("torch", 8, 7.0)]
    others = [ratio("stock diffusers", "captured", 16, 9.0), ratio("captured", "captured", 8, 1.8)]
    for stock, says in (([], None), ([ratio("stock diffusers", "captured", 8, 2.4)], "2.40x")):
        flops = Flops(denoiser=1, vae_decode=1, text_encoder=1)
        speed = Speed(rows=rows, ratios=others + stock, flops=flops, peaks={})
        provenance = {"config": {"steps": 20}}
        verdict = BenchResult(speed=speed, skipped={}, quality=None, prompts=[], provenance=provenance).verdict()
        assert verdict.startswith("The student makes images 1.80x ")
        assert "(captured, batch 8, 20 steps" in verdict
        assert re.findall(r"(\S+) \[\S+ \S+\] as fast as stock diffusers", verdict) == ([says] if says else [])


def test_rows_share_their_seeds_and_are_compared(result: BenchResult) -> None:
    assert result.quality is not None
    rows = {row.name: row for row in result.quality.main_rows()}
    assert list(rows) == [
        "teacher w=3",
        "teacher w=1",
        "student lora",
        "student bitfit",
        "teacher w=3 reseeded",
    ]
    assert rows["teacher w=3"].distance_to_teacher_image < 1e-6
    assert rows["teacher w=1"].distance_to_teacher_image > 0
    assert [row.passes for row in rows.values()] == [2, 1, 1, 1, 2]
    assert [row.cost for row in rows.values()] == [6, 3, 3, 3, 6]
    samples = result.quality.samples
    assert not torch.equal(samples["teacher w=3"], samples["teacher w=3 reseeded"])
    assert result.quality.real_vs_real_distance is not None
    guided, unguided, student = (rows[name].distance for name in ("teacher w=3", "teacher w=1", "student lora"))
    if share := rows["student lora"].gain_recovered:
        assert share.value == pytest.approx((unguided - student) / (unguided - guided))
    for row in rows.values():
        assert row.distance_interval.low < row.distance < row.distance_interval.high
        assert row.caption_score.low <= row.caption_score.value <= row.caption_score.high
        assert list(row.colors) == list(COLORS)
        assert all(0 <= color.value <= 100 for color in row.colors.values())
    assert rows["teacher w=3"].delta_to_guided is rows["teacher w=3"].caption_delta_to_guided is None
    assert rows["student lora"].delta_to_guided.value == pytest.approx(student - guided)
    scores = [rows[name].caption_score.value for name in ("student lora", "teacher w=3")]
    assert rows["student lora"].caption_delta_to_guided.value == pytest.approx(scores[0] - scores[1])
    assert f"Its CLIP score (clip0) is {scores[0]:.1f} against the teacher's {scores[1]:.1f} (" in result.verdict()
    for name, color in rows["student lora"].colors.items():
        of_teacher = rows["teacher w=3"].colors[name]
        assert of_teacher.delta_to_guided is None
        assert color.delta_to_guided.value == pytest.approx(color.value - of_teacher.value)
    _, *brief = quality_table(result.quality).brief().headings
    assert brief[1:] == ["ΔFD to the guided teacher", "guidance gain recovered", "CLIP score (clip0)"]


def test_the_report_is_one_self_contained_page(result: BenchResult, tmp_path: Path) -> None:
    write_report(result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "report.html",
        "grid.png",
    }
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == result.verdict()
    assert html.escape(report["verdict"]) in page
    assert report["provenance"]["versions"]["torch"]
    roles = [row["role"] for row in report["quality"]["rows"]]
    assert [roles.count(role) for role in ("teacher", "unguided", "student", "reseeded")] == [1, 1, 2, 1]
    assert set(report["quality"]["best_alternatives"]) < {row["name"] for row in report["quality"]["rows"]}


def test_figures_outlive_a_page_that_can_not_be_drawn(
    result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(result: BenchResult) -> str:
        assert read_json(tmp_path / "report.json")["verdict"] == result.verdict()
        raise ValueError("no picture")

    write_report(replace(result, prompts=[]), tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(report_module, "html_report", fails)
    with pytest.raises(ValueError, match="no picture"):
        write_report(result, tmp_path)
    # And no page of another run beside it.
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "mine.txt"}


def test_the_best_of_each_sweep_is_shown(result: BenchResult) -> None:
    assert result.quality is not None
    best, swept = result.quality.best_baselines(), [r for r in result.quality.rows if r.role == "alternative"]
    assert {(row.method, row.cost) for row in best} == {(row.method, row.cost) for row in swept}
    for row in best:
        assert row.distance == min(o.distance for o in swept if (o.method, o.cost) == (row.method, row.cost))
    cells = baselines_table(result.quality).cells
    assert [row[0] for row in cells[:4]] == ["teacher w=3", "teacher w=1", "student lora", "student bitfit"]
    assert {row[0] for row in cells[4:]} == {row.name for row in best}
    assert sum(int(row[-1]) for row in cells[4:]) == len(swept)


def test_an_engine_of_another_student_is_refused(
    tiny_files: ModelFiles, students: dict[str, Path], engine: Path
) -> None:
    with pytest.raises(InputError, match="exported from another student"):
        bench(
            tiny_files,
            BenchConfig(samples=0),
            students=[students["bitfit"]],
            engine=engine,
            prompts=MANY,
            metrics=Metrics(),
        )


def test_a_runner_that_can_not_start_is_left_out(
    tiny_files: ModelFiles, students: dict[str, Path], engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> BenchResult | None:
        config = BenchConfig(steps=1, runs=3, samples=0, batch_sizes=(1,), compile=False)
        return bench(
            tiny_files,
            config,
            students=[students["lora"]],
            engine=engine,
            prompts=MANY,
            metrics=Metrics(),
            device="cpu",
            report=told.append,
        )

    def fails(*_: object, **__: object) -> None:
        raise error

    told: list[str] = []
    monkeypatch.setattr(Engine, "load", fails)
    error: BoostDiffError = BoostDiffError("libnvinfer is missing")
    result = run()
    assert result is not None
    assert result.skipped["onnx"] == "libnvinfer is missing"
    assert "onnx: left out, libnvinfer is missing" in told
    assert {row.runner for row in result.speed.rows} == {"torch", "stock diffusers"}
    error = InputError("was changed")
    with pytest.raises(InputError, match="was changed"):
        run()


@pytest.mark.parametrize(("error", "rows"), [(torch.OutOfMemoryError(), 0), (None, 3)])
def test_a_copy_that_does_not_fit_takes_no_other_row_along(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, error: Exception | None, rows: int
) -> None:
    class Copying(TorchRunner):
        name = "compiled"

        def __init__(self, denoiser: object, **options: object) -> None:
            if error:
                raise error
            super().__init__(denoiser)

    monkeypatch.setattr("boostdiff.benchmarks.bench.CompiledRunner", Copying)
    monkeypatch.setattr("boostdiff.benchmarks.bench.missing_compiler", lambda device: None)
    variants, skipped = _in_torch(tiny, tiny.denoiser, BenchConfig(compile=True, batch_sizes=[2], samples=0))
    assert [variant.key.runner for variant in variants] == ["torch"] * 3 + ["stock diffusers"] + ["compiled"] * rows
    assert skipped == ({"compiled": "out of memory"} if error else {})


def test_memory_that_does_not_suffice_ends_in_advice() -> None:
    with (
        pytest.raises(BoostDiffError, match=r"8 images together: pass --sampling-batch-size 4, stop"),
        bounded_memory(8),
    ):
        raise torch.OutOfMemoryError


@pytest.fixture(scope="module")
def xl(prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Stable Diffusion XL of 16 pixels and a student, which may be used at any size."""
    root = tmp_path_factory.mktemp("xl")
    make_xl_pipeline().save_pretrained(root / "model")
    config = DistillConfig(prompts=prompt_file, updates=1, batch_size=1)
    observers = Observers(preview=False)
    distill(locate(str(root / "model")), config, output=root / "student", device="cpu", observers=observers)
    return root / "model", root / "student"


@pytest.mark.parametrize(
    ("kind", "side", "asked", "together"),
    [
        ("sd", 8, None, 8),
        ("sd", 8, 3, 3),
        pytest.param("xl", 8, None, 8, marks=pytest.mark.slow),
        pytest.param("xl", 8, 3, 3, marks=pytest.mark.slow),
        pytest.param("xl", 128, None, 2, marks=pytest.mark.slow),
    ],
)
def test_as_many_images_are_denoised_together_as_the_report_says(
    tiny_folder: Path,
    students: dict[str, Path],
    xl: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    side: int,
    asked: int | None,
    together: int,
) -> None:
    """Of latents of `side` by `side`; the UNets themselves are asked."""
    source, student = (tiny_folder, students["lora"]) if kind == "sd" else xl
    folder = shutil.copytree(source, tmp_path / "model")
    write_json(folder / "unet/config.json", read_json(folder / "unet/config.json") | {"sample_size": side})
    batches: list[int] = []
    forward = UNet2DConditionModel.forward

    def recorded(self: UNet2DConditionModel, sample: torch.Tensor, *inputs: object, **more: object) -> object:
        assert sample.shape[2:] == (side, side)
        batches.append(len(sample))
        return forward(self, sample, *inputs, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", recorded)
    samples = together + 1
    config = BenchConfig(samples=samples, steps=1, sampling_batch_size=asked, compile=False)
    options = {"guidance": None, "prompts": MANY, "device": "cpu"}
    with Session.open(locate(str(folder)), config, students=[student], **options) as opened:
        session = opened.at("ddim", 1)
        cache = session.sample_cache(Metrics(), folder=None)
        for variant, passes in ((session.student(session.students[0], 3.0), 1), (session.teacher(3.0), 2)):
            batches.clear()
            cache.sampled(variant)
            assert batches == [passes * together, passes]
    assert session.provenance(None)["sampling_batch_size"] == together


@pytest.mark.parametrize("sides", [(8, 12), (12, 8)])
def test_real_images_are_not_cut_to_squares_beside_others(
    tiny_folder: Path, students: dict[str, Path], reference: Path, tmp_path: Path, sides: tuple[int, int]
) -> None:
    """Squeezed to the network's square, the model's images would differ from them by their shape alone."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    write_json(folder / "unet/config.json", read_json(folder / "unet/config.json") | {"sample_size": sides})
    options = {"guidance": None, "prompts": MANY, "device": "cpu"}
    config = BenchConfig(samples=2, steps=1, compile=False)
    with Session.open(locate(str(folder)), config, students=[students["lora"]], **options) as session:
        with pytest.raises(InputError, match="--reference-size cuts squares, and this model's images are none"):
            session.sample_cache(Metrics(reference=folder, reference_size=8), folder=None)
        session.sample_cache(Metrics(reference=reference), folder=None)


def test_more_samples_than_prompts(tiny_files: ModelFiles, students: dict[str, Path], engine: Path) -> None:
    with pytest.raises(InputError, match="needs as many prompts: there are 24"):
        bench(
            tiny_files,
            BenchConfig(samples=25),
            students=[students["lora"]],
            engine=engine,
            prompts=MANY,
            metrics=Metrics(),
        )


def test_wrong_settings() -> None:
    for changes, message in (
        ({"steps": 0}, "--steps"),
        ({"batch_sizes": (4, 0)}, "--batch-sizes"),
        ({"batch_sizes": ()}, "--batch-sizes"),
        ({"samples": 1}, "--samples 1"),
        ({"sampler": "x"}, "unknown sampler"),
        ({"runs": 2}, "--runs must be at least 3"),
        ({"alternatives": True, "samples": 0}, "leave --speed-only out"),
        ({"alternatives": True, "steps": 1}, "--steps of at least 2"),
    ):
        with pytest.raises(InputError, match=message):
            BenchConfig(**changes)
    assert parse_batch_sizes("8,1") == (8, 1)
    assert parse_batch_sizes(None) is None
    with pytest.raises(InputError, match="no comma-separated list such as 1,2,4"):
        parse_batch_sizes("1;2")


def test_default_batch_sizes() -> None:
    assert BenchConfig().batch_sizes_on(torch.device("cpu")) == (8,)
    assert BenchConfig().batch_sizes_on(torch.device("cuda")) == (1, 2, 4, 8, 16)
    assert BenchConfig(batch_sizes=(4, 1, 4)).batch_sizes_on(torch.device("cpu")) == (1, 4)


def test_torch_is_compiled_for_one_batch_size_unless_others_are_asked_for(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "missing_compiler", lambda device: None)
    for batch_sizes, compiled_at in ((None, (8,)), ((1, 2), None)):
        variants, skipped = _in_torch(tiny, tiny.denoiser, BenchConfig(compile=True, batch_sizes=batch_sizes))
        assert {v.batch_sizes for v in variants if v.key.runner == "compiled"} == {compiled_at}
        assert {v.batch_sizes for v in variants if v.key.runner != "compiled"} == {None}
        assert not skipped
    monkeypatch.setattr(bench_module, "missing_compiler", lambda device: "no compiler")
    variants, skipped = _in_torch(tiny, tiny.denoiser, BenchConfig(compile=True))
    assert skipped == {"compiled": "no compiler"}
    assert {v.key.runner for v in variants} == {"torch", "stock diffusers"}


def test_a_guidance_conditioned_student_is_evaluated_at_the_guidance_asked_for(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Speed, and whether the engine is the student's, is tested elsewhere.
    speed = Speed(rows=[], ratios=[], flops=Flops(denoiser=1, vae_decode=1, text_encoder=1), peaks={"float32": 1.0})
    monkeypatch.setattr(bench_module, "_measure_speed", lambda *_, **__: (speed, {}))
    manifest = SimpleNamespace(check_student=lambda *_, **__: None, inputs={})
    monkeypatch.setattr(bench_module, "read_manifest", lambda folder: manifest)
    training = DistillConfig(guidance=1.0, guidance_max=6.0, prompts=prompt_file, updates=4, batch_size=2)
    distill(tiny_files, training, output=tmp_path / "student", device="cpu", observers=Observers(preview=False))

    def run(guidance: float | None) -> BenchResult:
        config = BenchConfig(steps=2, runs=3, samples=4, batch_sizes=(2,), guidance=guidance, compile=False)
        return bench(
            tiny_files,
            config,
            students=[tmp_path / "student"],
            engine=tmp_path / "engine",
            prompts=list(PROMPTS),
            metrics=Metrics(),
            device="cpu",
        )

    shown = {}
    for guidance in (3.0, 5.0):
        quality = run(guidance).quality
        assert quality is not None
        assert f"teacher w={guidance:g}" in [row.name for row in quality.rows]
        shown[guidance] = quality.samples["student lora"]
    assert not torch.equal(shown[3.0], shown[5.0])
    with pytest.raises(InputError, match="for guidance 1 to 6"):
        run(7.0)
    # It would be measured in full and then compared with itself.
    monkeypatch.setattr("boostdiff.benchmarks.session.load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="--guidance 1 is no guidance, there is nothing to compare"):
        run(1.0)
    with pytest.raises(InputError, match="--guidance 1 is no guidance, there is nothing to compare"):
        measure_grid(
            tiny_files,
            Table1Config(samples=4, guidance=1.0),
            students=[tmp_path / "student"],
            prompts=list(PROMPTS),
            metrics=Metrics(reference=embedded.REFERENCE),
            device="cpu",
        )


@pytest.mark.parametrize("interval", [True, False])
def test_no_gain_is_within_noise_where_there_is_no_interval(result: BenchResult, interval: bool) -> None:
    assert result.quality is not None
    without = {"delta_to_guided": None, "gain_recovered": None}
    without |= {f"caption_{name}": None for name in without} | ({} if interval else {"distance_interval": None})
    rows = [
        replace(row, **without, **({} if interval else {"caption_score": row.caption_value}))
        for row in result.quality.rows
    ]
    quality = replace(result.quality, rows=rows)
    table = quality_table(quality)
    line = next(line for line in table.cells if line[0] == "student lora")
    cells = dict(zip(table.headings, line, strict=True))
    expected = "gain within noise" if interval else "–"
    assert cells["guidance gain recovered"] == cells["its gain recovered"] == expected
    assert cells["CLIP score (clip0)"].startswith(f"{quality.student.caption_value:.1f}")
    assert ("[" in cells["CLIP score (clip0)"]) == interval
    assert "CLIP score" not in replace(result, quality=quality).verdict(), "without a paired difference"
