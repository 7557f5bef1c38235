import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from boostdiff.benchmarks.studies.few_steps_study import stages_of
from boostdiff.engine.errors import InputError
from boostdiff.engine.student import read_student
from tiny import few_step_copy

Made = Callable[..., Path]


@pytest.fixture
def made(students: dict[str, Path]) -> Made:
    """`made(folder, steps, start_from=…)`: a few-step student as `distill` describes it."""

    def make(folder: Path, steps: int, *, start_from: Path | None = None) -> Path:
        few_step_copy(students["lora"], folder, steps)
        info = read_student(folder)
        begun = {"start_from": start_from and str(start_from)}
        begun["start_from_sha256"] = start_from and read_student(start_from).adapter_sha256
        replace(info, settings=info.settings | begun).write(folder)
        return folder

    return make


@pytest.fixture
def whole(made: Made, students: dict[str, Path], tmp_path: Path) -> Path:
    """What `--few-steps 32:4` writes."""
    last = made(tmp_path / "whole", 4)
    shutil.copytree(students["lora"], last / "stages/guidance")
    for steps in (16, 8):
        made(last / f"stages/{steps}", steps)
    return last


def test_the_stages_of_a_run_are_found_from_its_last_and_from_any(whole: Path) -> None:
    stages = whole / "stages"
    first = {None: stages / "guidance", 16: stages / "16"}
    assert list(stages_of(whole).items()) == list((first | {8: stages / "8", 4: whole}).items())
    assert stages_of(stages / "8") == first | {8: stages / "8"}
    assert stages_of(stages / "16") == first


def test_a_student_begun_from_a_student_of_guidance(made: Made, students: dict[str, Path], tmp_path: Path) -> None:
    student = made(tmp_path / "s", 2, start_from=students["lora"])
    assert stages_of(student) == {None: students["lora"], 2: student}


@pytest.mark.parametrize("start", [".", "stages/8"])
def test_a_student_begun_from_a_few_step_one_is_followed_to_the_student_of_guidance(
    made: Made, whole: Path, tmp_path: Path, start: str
) -> None:
    begun = whole / start
    steps = read_student(begun).steps
    assert steps is not None
    student = made(tmp_path / "s", steps // 4, start_from=begun)
    between = made(student / f"stages/{steps // 2}", steps // 2, start_from=begun)
    expected = stages_of(begun) | {steps // 2: between, steps // 4: student}
    assert list(stages_of(student).items()) == list(expected.items())
    # And from there once more.
    further = made(tmp_path / "further", 1, start_from=student)
    assert stages_of(further) == expected | {1: further}


def test_a_start_that_has_changed_is_named(made: Made, whole: Path, tmp_path: Path, students: dict[str, Path]) -> None:
    student = made(tmp_path / "s", 2, start_from=whole)
    shutil.rmtree(whole)
    few_step_copy(students["bitfit"], whole, 4)
    with pytest.raises(InputError, match=r"is no longer the student that the one in .*s began with"):
        stages_of(student)
