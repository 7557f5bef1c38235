from itertools import combinations
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.studies.guidance_parts import PARTS, PartOfGuidance, learnt_shares, rows_of, shortened
from boostdiff.benchmarks.studies.held_out import HeldOut, student_model, teacher_model
from boostdiff.benchmarks.studies.prediction_error import trajectory
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distil
from boostdiff.distill.loop import Observers
from boostdiff.engine import embedded
from boostdiff.engine.errors import InputError
from boostdiff.engine.guidance import GuidedDenoiser, SinglePassDenoiser
from boostdiff.engine.model import Model, locate
from boostdiff.engine.prompts import read_prompts
from boostdiff.engine.runners import TorchRunner
from tiny import PROMPTS


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
        torch.testing.assert_close(adding(PARTS["g − s"][1]), student(z_t, t, text))
        torch.testing.assert_close(adding(PARTS["g, as long as s"][1]), student(z_t, t, text))


def test_shortened_guidance_keeps_its_direction() -> None:
    g, s = torch.randn(2, 3, 4, 8, 8, generator=torch.manual_seed(0))
    short = shortened(g, s)
    assert torch.allclose(short.flatten(1).norm(dim=1), s.flatten(1).norm(dim=1))
    assert torch.allclose(torch.cosine_similarity(short.flatten(1), g.flatten(1)), torch.ones(3))
    assert torch.equal(shortened(torch.zeros_like(g), s), torch.zeros_like(g))


def distilled(output: Path, prompts: Path, guidance_max: float | None = None) -> Path:
    config = DistillConfig(prompts=prompts, updates=1, batch_size=2, learning_rate=0.05, guidance_max=guidance_max)
    distil(locate("emoji64"), config, output=output, device="cpu", observers=Observers(preview=False))
    return output


def test_rows_of_the_embedded_model(tmp_path: Path, prompt_file: Path) -> None:
    folder = distilled(tmp_path / "student", prompt_file)
    rows = rows_of(HeldOut(work=tmp_path, steps=2), folder, 2)
    assert len({name for name, _ in rows.values()}) == 5
    for (_, one), (_, other) in combinations(rows.values(), 2):
        assert not torch.allclose(one, other)


def test_shares_are_those_of_the_vectors_themselves(tmp_path: Path, prompt_file: Path) -> None:
    folder = distilled(tmp_path / "student", prompt_file)
    model = teacher_model()
    text = model.family.encode(model.pipeline, read_prompts(embedded.HELD_OUT_PROMPTS)[:2])
    states = trajectory(model, text, 3.0)
    student = SinglePassDenoiser(TorchRunner(student_model(folder).unet))
    with torch.no_grad():
        s = torch.stack([student(state.z_t, state.t, text) - state.unguided for state in states]).double()
    g = torch.stack([state.guided - state.unguided for state in states]).double()
    expected = ((s * g).sum() / g.square().sum()).item(), (s.square().sum() / g.square().sum()).item()
    assert learnt_shares(model, folder, 2) == pytest.approx(expected, rel=1e-3)


def test_a_range_student_is_refused(tmp_path: Path, prompt_file: Path) -> None:
    folder = distilled(tmp_path / "range", prompt_file, guidance_max=5.0)
    with pytest.raises(InputError, match="range student"):
        rows_of(HeldOut(work=tmp_path), folder, 2)
