from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.quality.distances import frechet_distance
from boostdiff.benchmarks.quality.predictions import trajectory
from boostdiff.benchmarks.report.plots import rendered
from boostdiff.benchmarks.studies.__main__ import app
from boostdiff.benchmarks.studies.guidance_study import (
    PARTS,
    PartOfGuidance,
    Point,
    Teachers,
    explained_shares,
    lora_scale_variants,
    nearest_scale,
    plot,
    points,
    range_rows,
    rows_of,
    shortened,
    tables,
)
from boostdiff.benchmarks.studies.held_out import HeldOut, merged_student, teacher_model
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine import embedded
from boostdiff.engine.errors import InputError
from boostdiff.engine.guidance import GuidedDenoiser, SinglePassDenoiser
from boostdiff.engine.model import Model, locate
from boostdiff.engine.prompts import read_prompts
from boostdiff.engine.runners import TorchRunner
from tiny import PROMPTS
from typer.testing import CliRunner


def test_all_of_guidance_is_the_teacher_and_none_of_it_the_network_alone(tiny: Model) -> None:
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2])
    z_t, t = torch.randn(2, *tiny.latent_shape, generator=torch.manual_seed(0)), torch.tensor(500)
    runner = TorchRunner(tiny.unet)
    alone, guided, student = SinglePassDenoiser(runner), GuidedDenoiser(runner, 3.0), GuidedDenoiser(runner, 2.0)

    def adding(part) -> torch.Tensor:
        return PartOfGuidance(runner, student, 3.0, part)(z_t, t, text)

    with torch.no_grad():
        torch.testing.assert_close(adding(lambda g, s: g), guided(z_t, t, text))
        torch.testing.assert_close(adding(lambda g, s: s), student(z_t, t, text))
        torch.testing.assert_close(adding(lambda g, s: 0 * g), alone(z_t, t, text))
        # A student of w = 2 has half of the teacher's guidance, and leaves the other half.
        torch.testing.assert_close(adding(PARTS["g − s"]), student(z_t, t, text))
        torch.testing.assert_close(adding(PARTS["g, as long as s"]), student(z_t, t, text))


def test_shortened_guidance_keeps_its_direction() -> None:
    g, s = torch.randn(2, 3, 4, 8, 8, generator=torch.manual_seed(0))
    short = shortened(g, s)
    assert torch.allclose(short.flatten(1).norm(dim=1), s.flatten(1).norm(dim=1))
    assert torch.allclose(torch.cosine_similarity(short.flatten(1), g.flatten(1)), torch.ones(3))
    assert torch.equal(shortened(torch.zeros_like(g), s), torch.zeros_like(g))


def distilled(output: Path, prompts: Path, guidance_max: float | None = None) -> Path:
    config = DistillConfig(prompts=prompts, updates=1, batch_size=2, learning_rate=0.05, guidance_max=guidance_max)
    distill(locate("emoji64"), config, output=output, device="cpu", observers=Observers(preview=False))
    return output


def test_rows_of_the_embedded_model(tmp_path: Path, prompt_file: Path) -> None:
    folder = distilled(tmp_path / "student", prompt_file)
    rows = rows_of(HeldOut(work=tmp_path, steps=2), folder, 2)
    assert len(rows) == 5
    for one, other in combinations(rows.values(), 2):
        assert not torch.allclose(one, other)


def test_shares_are_those_of_the_vectors_themselves(tmp_path: Path, prompt_file: Path) -> None:
    folder = distilled(tmp_path / "student", prompt_file)
    model = teacher_model()
    text = model.family.encode(model.pipeline, read_prompts(embedded.HELD_OUT_PROMPTS)[:2])
    states = trajectory(model, text, 3.0)
    student = SinglePassDenoiser(TorchRunner(merged_student(model, folder).unet))
    with torch.no_grad():
        s = torch.stack([student(state.z_t, state.t, text) - state.unguided for state in states]).double()
    g = torch.stack([state.guided - state.unguided for state in states]).double()
    expected = ((s * g).sum() / g.square().sum()).item(), (s.square().sum() / g.square().sum()).item()
    assert explained_shares(model, folder, 2) == pytest.approx(expected, rel=1e-3)


def test_a_range_student_is_refused(tmp_path: Path, prompt_file: Path) -> None:
    folder = distilled(tmp_path / "range", prompt_file, guidance_max=5.0)
    with pytest.raises(InputError, match="guidance-conditioned student"):
        rows_of(HeldOut(work=tmp_path), folder, 2)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, prompt_file: Path) -> Path:
    """One update's student of the embedded model."""
    output = tmp_path_factory.mktemp("lora") / "student"
    config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2, learning_rate=0.05)
    distill(locate("emoji64"), config, output=output, device="cpu", observers=Observers(preview=False))
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


def test_a_lora_scale_of_zero_is_the_unguided_teacher(student: Path, tmp_path: Path) -> None:
    held_out = HeldOut(work=tmp_path, steps=2)
    with held_out.sampling(4) as sampling:
        drawn = {w: sampling.features(sampling.session.teacher(w)) for w in (1.0, 2.0, 3.0)}
    kept = set((tmp_path / "features").iterdir())
    teachers = Teachers.of(held_out, [1.0], 4, [2.0, 3.0], 4)
    # They were kept.
    assert set((tmp_path / "features").iterdir()) == kept
    assert all(torch.equal(teachers.features[w], features) for w, features in drawn.items())
    off, on = points(held_out, partial(lora_scale_variants, folder=student, weights=[0, 1]), 4, teachers)
    assert off.effective == pytest.approx(1.0, abs=0.3)
    assert off.paired == pytest.approx(0, abs=1e-5)
    assert on.paired > 1e-3
    assert off.distance == pytest.approx(frechet_distance(held_out.reference, drawn[1.0]), rel=1e-4)
    with pytest.raises(InputError, match="no guidance-conditioned student"):
        points(held_out, partial(range_rows, folder=student, scales=[3]), 4, teachers)


def test_tables_and_plot() -> None:
    point = Point(setting=3.0, distance=110.0, effective=2.5, paired=0.1)
    teachers = Teachers(distances={1.0: 200.0, 3.0: 100.0}, features={})
    scaled = [Point(setting=weight, distance=150.0, effective=1 + 2 * weight, paired=0.1) for weight in (0.0, 0.5, 1.0)]
    text = tables([point], scaled, teachers, 3.0)
    assert "| 3 | 100.0 | 110.0 | +10.0% | 2.50 | 0.100 |" in text
    assert "| 0.5 | 150.0 | 2.00 | 0.100 |" in text
    assert rendered(plot([point], scaled, teachers, 3.0), "png").startswith(b"\x89PNG")


def test_options_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    given = ["--work", str(tmp_path / "work"), "--student", "range", "--lora", "lora"]
    result = CliRunner().invoke(app, ["guidance-curve", *given, "--sample", "4"])
    assert isinstance(result.exception, InputError)
    assert "--sample 4" in str(result.exception)
    assert not (tmp_path / "work").exists()
