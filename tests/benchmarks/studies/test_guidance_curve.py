from functools import partial
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.report.plots import rendered
from boostdiff.benchmarks.studies.guidance_curve import (
    Point,
    Teachers,
    app,
    dial_points,
    nearest_scale,
    plot,
    range_points,
    tables,
)
from boostdiff.benchmarks.studies.held_out import HeldOut, teacher_model
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distil
from boostdiff.distill.loop import Observers
from boostdiff.engine.errors import InputError
from boostdiff.engine.guidance import teacher_denoiser
from boostdiff.engine.model import Model, locate
from typer.testing import CliRunner


def never() -> Model:
    raise AssertionError("the images are kept already")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, prompt_file: Path) -> Path:
    """One update's student of the embedded model."""
    output = tmp_path_factory.mktemp("dial") / "student"
    config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2, learning_rate=0.05)
    distil(locate("emoji64"), config, output=output, device="cpu", observers=Observers(preview=False))
    return output


def test_effective_guidance_is_that_of_the_nearest_teacher() -> None:
    start, direction = torch.nn.functional.normalize(torch.randn(2, 8, 32, generator=torch.manual_seed(0)), dim=-1)

    def at(scale: float) -> torch.Tensor:
        return start + 0.1 * scale * direction

    teachers = {scale: at(scale) for scale in (1.0, 2.0, 3.0, 5.0)}
    for scale in (1.0, 3.0, 5.0):
        effective, distance = nearest_scale(at(scale), teachers)
        assert effective == pytest.approx(scale, abs=0.15)
        assert distance == pytest.approx(0, abs=1e-6)
    for between in (1.3, 2.5):
        assert nearest_scale(at(between), teachers)[0] == pytest.approx(between, abs=0.2)
    # Beyond the grid there is nothing to tell how far.
    assert nearest_scale(at(9.0), teachers)[0] == 5.0
    # Fewer images on either side are compared with the same seeds.
    assert nearest_scale(at(3.0)[:4], teachers) == nearest_scale(at(3.0), {w: x[:4] for w, x in teachers.items()})


def test_a_dial_at_zero_is_the_unguided_teacher(student: Path, tmp_path: Path) -> None:
    held_out = HeldOut(work=tmp_path, steps=2)
    rows = {f"teacher {w:g}": partial(teacher_denoiser, guidance_scale=w) for w in (1.0, 2.0, 3.0)}
    drawn = held_out.features(rows, 4, open_model=teacher_model, exported=False)
    kept = held_out.features(rows, 4, open_model=never)
    assert all(torch.equal(kept[name], drawn[name]) for name in rows)
    teachers = Teachers(distances={}, features={w: drawn[f"teacher {w:g}"] for w in (1.0, 2.0, 3.0)})
    off, on = dial_points(held_out, student, weights=[0, 1], samples=4, teachers=teachers)
    assert off.effective == pytest.approx(1.0, abs=0.3)
    assert off.paired == pytest.approx(0, abs=1e-5)
    assert on.paired > 1e-3
    assert off.distance == pytest.approx(held_out.distance("teacher 1", drawn["teacher 1"]), rel=1e-4)
    with pytest.raises(InputError, match="no range student"):
        range_points(held_out, student, scales=[3], samples=4, teachers=teachers)


def test_tables_and_plot() -> None:
    point = Point(setting=3.0, distance=110.0, effective=2.5, paired=0.1)
    teachers = Teachers(distances={1.0: 200.0, 3.0: 100.0}, features={})
    dialled = [
        Point(setting=weight, distance=150.0, effective=1 + 2 * weight, paired=0.1) for weight in (0.0, 0.5, 1.0)
    ]
    text = tables([point], dialled, teachers, 3.0)
    assert "| 3 | 100.0 | 110.0 | +10.0% | 2.50 | 0.100 |" in text
    assert "| 0.5 | 150.0 | 2.00 | 0.100 |" in text
    assert rendered(plot([point], dialled, teachers, 3.0), "png").startswith(b"\x89PNG")


def test_options_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    given = ["--work", str(tmp_path / "work"), "--student", "range", "--dial", "lora"]
    result = CliRunner().invoke(app, [*given, "--sample", "4"])
    assert isinstance(result.exception, InputError)
    assert "--sample 4" in str(result.exception)
    assert not (tmp_path / "work").exists()
