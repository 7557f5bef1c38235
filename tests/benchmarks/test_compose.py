import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.compose import (
    Configuration,
    compose,
    exported_configurations,
    torch_configurations,
    usable,
)
from boostdiff.benchmarks.config import ComposeConfig, Metrics
from boostdiff.benchmarks.quality.composition import Composition, Row, loss_of, with_front
from boostdiff.benchmarks.quality.quality import QualityRow
from boostdiff.benchmarks.report.composed import composed_table, markdown, write_composed
from boostdiff.benchmarks.session import Session
from boostdiff.benchmarks.stats import Estimate
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.manifest import read_manifest
from boostdiff.engine.model import locate
from boostdiff.engine.student import read_student
from tiny import PROMPTS, few_step_copy


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Compiling every row's denoiser would take minutes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("boostdiff.benchmarks.session.MANY_PASSES", 0)
        yield


@pytest.fixture(scope="module")
def result(
    tiny_folder: Path,
    students: dict[str, Path],
    engines: dict[str, Path],
    reference: Path,
    clip_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Composition:
    few = few_step_copy(students["lora"], tmp_path_factory.mktemp("few") / "student", 2)
    return compose(
        locate(str(tiny_folder)),
        ComposeConfig(steps=(2, 4, 3), samples=8, runs=3, alternatives=True),
        students=[students["lora"], few],
        engines=[engines["lora"]],
        prompts=PROMPTS * 4,
        metrics=Metrics(reference=reference, clip=str(clip_folder)),
        device="cpu",
    )


STEPS = ("4 steps", "3 steps", "2 steps, trailing")
"""What rows are named after: those of a few-step student's steps have its timesteps."""


def test_every_combination_is_a_row(result: Composition, engines: dict[str, Path]) -> None:
    rows = {row.quality.name: row for row in result.rows if row.quality.role != "alternative"}
    (plain,) = {name.split(",")[0] for name in rows if name.startswith("student")}
    onnx = f"{engines['lora'].name}: onnx"
    assert set(rows) == {
        *(f"teacher w=3, {steps}, torch float32" for steps in STEPS),
        "teacher w=1, 4 steps, torch float32",
        *(f"{plain}, {steps}, {runner} float32" for steps in STEPS for runner in ("torch", onnx)),
        "few-step student lora, 2 steps, trailing, torch float32",
    }
    assert result.rows[0].quality.name == "teacher w=3, 4 steps, torch float32"
    alternatives = [row.quality.name for row in result.rows if row.quality.role == "alternative"]
    assert {name.count("trailing") for name in alternatives} == {0, 1}
    assert {name.split(", ")[1] for name in result.left_out} <= {"tensorrt"}
    for row in result.rows:
        passes = 2 if row.quality.name.startswith("teacher w=3") else 1
        if row.quality.role != "alternative":
            assert row.quality.cost == passes * row.quality.steps
        assert row.seconds_per_image.value > 0
        assert row.speedup.low <= row.speedup.value <= row.speedup.high
    # A graph's images are those of torch but for rounding.
    graph, eager = (rows[f"{plain}, 4 steps, {runner} float32"].quality for runner in (onnx, "torch"))
    assert graph.distance == pytest.approx(eager.distance, rel=1e-2)


def test_it_is_written_as_page_markdown_and_json(result: Composition, tmp_path: Path) -> None:
    write_composed(result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"compose.md", "compose.html", "compose.json"}
    written = json.loads((tmp_path / "compose.json").read_text(encoding="utf-8"))
    assert written["verdict"] == result.verdict()
    assert len(written["rows"]) == len(result.rows)
    page = (tmp_path / "compose.html").read_text(encoding="utf-8")
    assert "image/svg+xml" in page
    assert result.verdict() in (text := markdown(result))
    assert all(row.quality.name in text for row in result.rows)
    table = composed_table(result)
    names = [cells[0].partition(". ")[2].removesuffix(" *") for cells in table.cells]
    assert names == [row.quality.name for row in sorted(result.rows, key=lambda row: -row.speedup.value)]


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value, coverage=0.95)


def difference(value: float) -> Estimate:
    return Estimate(value=value, low=value - 12, high=value + 12, coverage=0.95)


def row(name: str, *, seconds: float, distance: float, caption: float, teacher: QualityRow | None = None) -> Row:
    quality = QualityRow(
        name=name,
        role="student" if teacher else "teacher",
        method=None,
        steps=4,
        cost=4,
        distance=distance,
        distance_to_teacher_image=0.0,
        caption_score=estimate(caption),
        delta_to_guided=difference(distance - (teacher.distance or 0)) if teacher else None,
        caption_delta_to_guided=difference(caption - (teacher.caption_value or 0)) if teacher else None,
        colors={},
    )
    return Row(
        runner="torch",
        precision="float32",
        seconds_per_image=estimate(seconds),
        speedup=estimate(8 / seconds),
        quality=quality,
        loss=loss_of(quality, teacher or quality),
    )


def test_the_verdict_takes_the_worse_of_distance_and_caption_score(result: Composition) -> None:
    teacher = row("two passes", seconds=4.0, distance=100.0, caption=60.0)
    others = [
        ("one pass", 2.0, 99.0, 59.0),
        ("few steps", 1.0, 102.0, 54.5),
        ("slow", 3.0, 100.5, 60.0),
        ("blurred", 0.5, 140.0, 60.0),
    ]
    rows = [row(n, seconds=s, distance=d, caption=c, teacher=teacher.quality) for n, s, d, c in others]
    measured = replace(result, rows=with_front([teacher, *rows]), features="FD", caption_label="caption score")
    assert [r.loss for r in rows] == pytest.approx([1 / 60, 5.5 / 60, 0.005, 0.4])
    assert measured.verdict() == (
        "By point estimates, the fastest of what loses little of FD and caption score against two passes: within 1% it "
        "is slow (ΔFD +0.5 [-11.5, +12.5], Δ caption score +0.0 [-12.0, +12.0]), 2.67x [2.67, 2.67] as fast as stock "
        "diffusers with guidance; within 3% it is one pass (ΔFD -1.0 [-13.0, +11.0], Δ caption score -1.0 [-13.0, "
        "+11.0]), 4.00x [4.00, 4.00] as fast as stock diffusers with guidance; within 10% it is few steps (ΔFD +2.0 "
        "[-10.0, +14.0], Δ caption score -5.5 [-17.5, +6.5]), 8.00x [8.00, 8.00] as fast as stock diffusers with "
        "guidance."
    )
    assert [r.quality.name for r in measured.rows if r.on_front] == ["one pass", "few steps", "blurred"]
    assert (
        replace(measured, caption_label=None)
        .verdict()
        .endswith("Whether prompts are followed was not measured (--clip).")
    )


def test_rows_of_one_name_stay_apart(result: Composition) -> None:
    """The fastest is the one that the front and the verdict name, whatever the milliseconds of another round say."""
    teacher = row("two passes", seconds=4.0, distance=100.0, caption=60.0)
    one, other = (
        row("twin", seconds=s, distance=d, caption=60.0, teacher=teacher.quality) for s, d in ((2, 102), (1, 109))
    )
    faster = replace(one, seconds_per_image=estimate(0.9), quality=replace(one.quality, name="third"))
    verdict = replace(
        result, rows=with_front([teacher, one, other, faster]), features="FD", caption_label="c"
    ).verdict()
    assert "within 3% it is twin (ΔFD +2.0 [-10.0, +14.0], Δ caption score +0.0 [-12.0, +12.0]), 4.00x" in verdict
    assert "within 10% it is twin (ΔFD +9.0 [-3.0, +21.0], Δ caption score +0.0 [-12.0, +12.0]), 8.00x" in verdict
    assert [r.on_front for r in with_front([other, replace(other, quality=faster.quality)])] == [False, True]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": ()}, "--steps must be at least 1"),
        ({"samples": 3}, "--samples must be at least 4"),
        ({"steps": (1,), "alternatives": True}, "--alternatives needs --steps of at least 2"),
        ({"sampler": "magic"}, "unknown sampler 'magic'"),
    ],
)
def test_what_can_not_be_composed_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ComposeConfig(**options)  # type: ignore[arg-type]


def test_what_does_not_belong_together_is_refused(
    tiny_folder: Path, students: dict[str, Path], engines: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    def tried(student: Path, engine: Path | None, metrics: Metrics, **options: object) -> None:
        config = ComposeConfig(steps=(2,), samples=4, runs=3, **options)  # type: ignore[arg-type]
        compose(
            locate(str(tiny_folder)),
            config,
            students=[student],
            engines=[engine] if engine else [],
            prompts=PROMPTS * 4,
            metrics=metrics,
            device="cpu",
        )

    with pytest.raises(InputError, match="exported from another student"):
        tried(students["lora"], engines["bitfit"], Metrics(reference=reference))
    with pytest.raises(InputError, match=r"--max-autotune is for rows by torch\.compile: here they are by torch"):
        tried(students["lora"], engines["lora"], Metrics(reference=reference), max_autotune=True)
    with pytest.raises(InputError, match=r"--max-autotune is for rows by torch\.compile: here they are by torch"):
        tried(students["lora"], None, Metrics(reference=reference), max_autotune=True, runner="torch")
    if not torch.cuda.is_available():
        with pytest.raises(BoostDiffError, match="CUDA graphs need an NVIDIA GPU"):
            tried(students["lora"], None, Metrics(reference=reference), runner="captured")
    with pytest.raises(InputError, match="pass --reference DIR"):
        tried(students["lora"], engines["lora"], Metrics())
    few = few_step_copy(students["lora"], tmp_path / "few", 2)
    with pytest.raises(InputError, match=r"distilled for ddim: pass --sampler ddim"):
        tried(few, engines["lora"], Metrics(reference=reference), sampler="dpm++")
    rescaled = tmp_path / "rescaled"
    shutil.copytree(students["lora"], rescaled)
    settings = {"guider": "rescale", "guider_settings": {"guidance_rescale": 0.5}}
    replace(read_student(rescaled), **settings).write(rescaled)
    with pytest.raises(InputError, match="--alternatives is for teachers with plain guidance"):
        tried(rescaled, None, Metrics(reference=reference), alternatives=True)

    larger = tmp_path / "larger"
    shutil.copytree(engines["lora"], larger)
    manifest = read_manifest(larger)
    manifest.denoiser_config["sample_size"] *= 2
    manifest.save(larger)
    with pytest.raises(InputError, match="draws images of another size than the model"):
        tried(students["lora"], larger, Metrics(reference=reference))


def test_an_engine_that_can_draw_no_batch_is_left_out(
    tiny_folder: Path, students: dict[str, Path], reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, config = locate(str(tiny_folder)), ComposeConfig(steps=(2,), samples=4, runs=3)
    opened = Session.open(
        files, config, students=[students["lora"]], guidance=None, prompts=PROMPTS * 4, device="cpu", guided=True
    )
    with opened as session:
        first, *others = torch_configurations(replace(session, sampler="ddim"), config)

        def fails(self: Configuration, prompts: object, noise: object) -> float:
            if self.variant.name == first.variant.name:
                raise RuntimeError("a batch beyond the profile")
            return 1.0

        monkeypatch.setattr(Configuration, "seconds", fails)
        left_out: dict[str, str] = {}
        found = list(usable(session, [first, *others], left_out))
    assert [each.variant.name for each in found] == [each.variant.name for each in others]
    assert left_out == {first.variant.name: "a batch beyond the profile"}


def test_an_engine_whose_library_is_missing_is_left_out(
    tiny_folder: Path,
    students: dict[str, Path],
    engines: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, config = locate(str(tiny_folder)), ComposeConfig(steps=(2,), samples=4, runs=3)
    other = Path(shutil.copytree(engines["lora"], tmp_path / "other"))
    load = Engine.load

    def loads(folder: Path, **options: object) -> Engine:
        if folder == other:
            raise error
        return load(folder, **options)

    monkeypatch.setattr(Engine, "load", loads)
    opened = Session.open(
        files, config, students=[students["lora"]], guidance=None, prompts=PROMPTS * 4, device="cpu", guided=True
    )
    manifests = {folder: read_manifest(folder) for folder in (other, engines["lora"])}
    with opened as session, ExitStack() as stack:
        session, left_out = replace(session, sampler="ddim"), dict[str, str]()
        error: BoostDiffError = BoostDiffError("libonnx is missing")
        found = list(exported_configurations(session, config, manifests, opened=stack, left_out=left_out))
        assert [each.runner for each in found] == [f"{engines['lora'].name}: onnx"]
        assert left_out.pop("other, onnx") == "libonnx is missing"
        # What a user can put right ends it.
        error = InputError("was changed")
        with pytest.raises(InputError, match="was changed"):
            list(exported_configurations(session, config, manifests, opened=stack, left_out=left_out))
