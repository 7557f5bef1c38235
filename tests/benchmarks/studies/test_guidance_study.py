import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.studies import seeds
from boostdiff.benchmarks.studies.__main__ import app
from boostdiff.benchmarks.studies.guidance_study import nearest_scale
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.errors import InputError
from boostdiff.engine.guidance import GuidedDenoiser, SinglePassDenoiser
from boostdiff.engine.guidance_term import r2_of, trajectory
from boostdiff.engine.guiders import Guider
from boostdiff.engine.model import Model, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.student import read_student
from tiny import PROMPTS, few_step_copy
from typer.testing import CliRunner


def distilled(output: Path, prompts: Path, *guidance: float) -> Path:
    low, high = (*guidance, None)[:2]
    config = DistillConfig(
        prompts=prompts, updates=1, batch_size=2, learning_rate=0.05, guidance=low, guidance_max=high
    )
    distill(locate("emoji64"), config, output=output, device="cpu", observers=Observers(preview=False))
    return output


def shown(*arguments: object) -> list[list[str]]:
    """The cells of the tables that a study prints, without their headings."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    lines = [line.strip("| ").split(" | ") for line in result.output.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return lines[2:]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, prompt_file: Path) -> Path:
    return distilled(tmp_path_factory.mktemp("student") / "w3", prompt_file, 3.0)


def test_r2_is_one_for_the_teacher_and_zero_without_guidance(tiny: Model) -> None:
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2])
    states = trajectory(tiny, text, 3.0)
    assert len(states) == 4
    runner = TorchRunner(tiny.denoiser)
    assert r2_of(GuidedDenoiser(runner, 3.0), states, text) == pytest.approx(1, abs=1e-6)
    assert r2_of(SinglePassDenoiser(runner), states, text) == pytest.approx(0, abs=1e-6)
    # Half of the guidance leaves a quarter of the squared error.
    assert r2_of(GuidedDenoiser(runner, 2.0), states, text) == pytest.approx(0.75, abs=1e-3)


def test_r2_has_no_value_where_guidance_changes_nothing(tiny: Model) -> None:
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2])
    runner = TorchRunner(tiny.denoiser)
    # At the first of four timesteps alone.
    early = Guider(name="interval", settings={"guidance_interval": "0:0.25"})
    states = trajectory(tiny, text, 3.0, early)
    r2 = [r2_of(SinglePassDenoiser(runner), [state], text) for state in states]
    assert r2[0] == pytest.approx(0, abs=1e-6)
    assert all(math.isnan(each) for each in r2[1:])
    assert r2_of(SinglePassDenoiser(runner), states, text) == pytest.approx(0, abs=1e-6)


def test_r2_over_all_timesteps_lies_within_those_of_each(student: Path) -> None:
    ((name, *cells),) = shown("guidance-r2", student, "--prompts", 2)
    assert name == "w3, w = 3"
    overall, *by_timestep = (float(cell) for cell in cells)
    assert len(by_timestep) == 4
    assert min(by_timestep) <= overall <= max(by_timestep)


def test_r2_is_of_the_teacher_with_the_students_negative_prompt(student: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(student, tmp_path / "w3"))
    replace(read_student(other), negative_prompt="a red apple").write(other)
    rows = [shown("guidance-r2", folder, "--prompts", 2)[0] for folder in (student, other)]
    assert rows[0] != rows[1]


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


@pytest.mark.slow
def test_effective_guidance_at_each_scale_of_the_range(tmp_path: Path, prompt_file: Path) -> None:
    ranged = distilled(tmp_path / "ranged", prompt_file, 2.0, 6.0)
    sampling = ("--work", tmp_path, "--samples", 4, "--steps", 2)
    rows = shown("effective-guidance", ranged, "--scales", "1.5,3,5", *sampling)
    assert [row[:2] for row in rows] == [["ranged", "3"], ["ranged", "5"]]
    assert all(1 <= float(row[2]) <= 9 for row in rows)
    shards = set((tmp_path / "features").iterdir())
    assert len(shards) == 10 + 2
    assert shown("effective-guidance", ranged, "--scales", "3,5", *sampling) == rows
    assert set((tmp_path / "features").iterdir()) == shards
    # Other timesteps, other images.
    assert shown("effective-guidance", ranged, "--scales", "3", *sampling, "--timestep-spacing", "trailing")
    assert len(set((tmp_path / "features").iterdir()) - shards) == 10 + 1


def test_r2_of_few_steps_would_be_of_another_target(student: Path, tmp_path: Path) -> None:
    few = few_step_copy(student, tmp_path / "few", 2)
    result = CliRunner().invoke(app, ["guidance-r2", str(few), "--prompts", "2"])
    assert isinstance(result.exception, InputError)
    assert "is a few-step student, which takes other steps" in str(result.exception)


@pytest.mark.parametrize("beside", [pytest.param([], marks=pytest.mark.slow), ["w3"]])
def test_effective_guidance_of_few_steps_is_at_their_own(student: Path, tmp_path: Path, beside: list[str]) -> None:
    few = few_step_copy(student, tmp_path / "few", 2)
    folders = [*(student.with_name(name) for name in beside), few]
    words = ("effective-guidance", *folders, "--work", tmp_path, "--samples", 4)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert "N = 4, ddim, 2 steps\n" in result.output
    rows = [line.split(" | ")[1:] for line in result.output.splitlines() if " | 3 | " in line]
    # They are one student, so rows at one setting, timesteps included, are the same.
    assert len(rows) == len(folders)
    assert all(row == rows[0] for row in rows)


@pytest.mark.parametrize("options", [(), ("--steps", 2), ("--samplers", "dpm++", "--steps", 4)])
def test_students_of_few_steps_are_trained_for_the_seeds_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    def begun(folder: Path, words: object) -> Path:
        raise InterruptedError

    monkeypatch.setattr(seeds, "trained", begun)
    few = ("--", "--few-steps", "8:4")
    for settings, refused in ((("--samplers", "ddim", "--steps", 4), False), (options, True)):
        words = ["seeds", "--work", tmp_path / "w", "--methods", "lora", *settings, *few]
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert isinstance(result.exception, InputError if refused else InterruptedError)


def test_scales_that_are_no_numbers_are_refused(student: Path) -> None:
    result = CliRunner().invoke(app, ["guidance-r2", str(student), "--scales", "3;5"])
    assert isinstance(result.exception, InputError)
    assert "--scales '3;5'" in str(result.exception)


def test_seeds_are_averaged(student: Path, tmp_path: Path) -> None:
    for name in ("lora-0", "lora-1"):
        shutil.copytree(student, tmp_path / name)
    sampling = ("--work", tmp_path, "--samples", 4, "--steps", 1)
    rows = shown("seeds", *sampling, "--seeds", 2, "--methods", "lora", "--samplers", "ddim")
    assert [row[0] for row in rows] == ["teacher w=3", "teacher w=1", "lora, 2 seeds"]
    # The two are one student, so nothing varies.
    assert rows[2][1].endswith(" ± 0.0")
    assert rows[2][5].endswith(" ± 0.000")
    assert rows[0][5] == "0.000"
