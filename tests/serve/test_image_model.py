"""What a replica checks of its model, and what it makes of a student and of a job."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.engine.compiled import CompiledRunner, missing_compiler
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.student import apply_student, read_student
from boostdiff.serve.image_model import ImageModel, Job, Picture
from boostdiff.serve.loading import open_model
from boostdiff.serve.local import LocalBackend
from boostdiff.serve.settings import ModelSettings, parse_settings
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image


@pytest.fixture(scope="module")
def teacher(tiny_folder: Path) -> ImageModel:
    return open_model(ModelSettings(model=str(tiny_folder), device="cpu"))


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_replica_starts_where_images_differ_by_one_level(
    teacher: ImageModel, monkeypatch: pytest.MonkeyPatch, levels: int
) -> None:
    """Wherever that level is: of all pairs in float32, some are further apart than 1/255."""

    def draw(jobs: Sequence[Job]) -> list[Picture]:
        values = np.arange(256).clip(min=levels).astype(np.uint8) - (levels if len(jobs) > 1 else 0)
        image = Image.fromarray(values.reshape(16, 16, 1).repeat(3, axis=2).astype(np.uint8))
        facts = {"step": 2, "passes": 4, "seconds": 0.1, "batch": len(jobs), "width": 16, "height": 16}
        return [Picture(image=image, seed=job.seed, **facts) for job in jobs]

    monkeypatch.setattr(teacher, "draw", draw)
    monkeypatch.setattr(teacher, "description", teacher.description)
    if levels > 1:
        with pytest.raises(BoostDiffError, match="depend on the batch that they are drawn in, by 2/255"):
            teacher.check_itself()
        return
    teacher.check_itself()
    assert f"differ by {levels}/255 at most" in teacher.description.checked


@pytest.mark.parametrize(("device", "precision"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
@pytest.mark.parametrize("moved", [3, 40])
def test_where_sums_are_rounded_otherwise_a_few_levels_are_no_fault(
    teacher: ImageModel, monkeypatch: pytest.MonkeyPatch, moved: int, device: str, precision: torch.dtype
) -> None:
    def draw(jobs: Sequence[Job]) -> list[Picture]:
        values = np.arange(256).clip(max=255 - moved) + (moved if len(jobs) > 1 else 0)
        image = Image.fromarray(values.reshape(16, 16, 1).repeat(3, axis=2).astype(np.uint8))
        facts = {"step": 2, "passes": 4, "seconds": 0.1, "batch": len(jobs), "width": 16, "height": 16}
        return [Picture(image=image, seed=job.seed, **facts) for job in jobs]

    monkeypatch.setattr(teacher, "draw", draw)
    monkeypatch.setattr(teacher, "description", teacher.description)
    monkeypatch.setattr(teacher._runner, "device", torch.device(device))
    monkeypatch.setattr(teacher._runner, "precision", precision)
    if moved > 3:
        with pytest.raises(BoostDiffError, match="depend on the batch that they are drawn in, by 40/255"):
            teacher.check_itself()
        return
    teacher.check_itself()
    assert "differ by 3/255 at most" in teacher.description.checked


@pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("role", "backend"),
    [
        ("student", "eager"),
        pytest.param("teacher", "eager", marks=pytest.mark.slow),
        pytest.param("student", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_it_draws_the_same_and_fills_batches_up(
    tiny_folder: Path, students: dict[str, Path], monkeypatch: pytest.MonkeyPatch, role: str, backend: str
) -> None:
    monkeypatch.setattr("boostdiff.serve.loading.CompiledRunner", partial(CompiledRunner, backend=backend))
    settings = {"model": str(tiny_folder), "device": "cpu", "max_batch": 3}
    settings |= {"student": str(students["lora"])} if role == "student" else {}
    eager, compiled = (open_model(ModelSettings(**settings, runner=name)) for name in ("torch", "compiled"))
    assert compiled.description.runner == "compiled"
    assert compiled._runner.batches == ([1, 3] if role == "student" else [2, 6])
    jobs = [Job(prompt=prompt, seed=seed, steps=2) for seed, prompt in enumerate(("a", "a red cat"))]
    for first, second in zip(eager.draw(jobs), compiled.draw(jobs), strict=True):
        # In bfloat16, where the CPU has it.
        assert np.abs(np.asarray(first.image, dtype=int) - np.asarray(second.image, dtype=int)).mean() < 5
    compiled.check_itself()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
def test_without_a_gpu_no_cuda_graph(tiny_folder: Path) -> None:
    with pytest.raises(BoostDiffError, match="CUDA graphs need an NVIDIA GPU"):
        open_model(ModelSettings(model=str(tiny_folder), runner="captured"))


@pytest.mark.parametrize(
    "values",
    [{"runner": "onnx"}, {"engine": "/e", "runner": "torch"}, {"student": "/s", "runner": "tensorrt"}],
)
def test_a_runner_of_another_kind_of_model(values: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"runner {values['runner']} can't be used here"):
        parse_settings({"models": [values]})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_it_draws_the_same(tiny_folder: Path, students: dict[str, Path]) -> None:
    settings = {"model": str(tiny_folder), "student": str(students["lora"]), "device": "cuda"}
    eager, captured = (open_model(ModelSettings(**settings, runner=name)) for name in ("torch", "captured"))
    captured.check_itself()
    for count in (2, 1, 2):
        jobs = [Job(prompt="a red cat", seed=seed, steps=3) for seed in range(count)]
        for first, second in zip(eager.draw(jobs), captured.draw(jobs), strict=True):
            assert np.abs(np.asarray(first.image, dtype=int) - np.asarray(second.image, dtype=int)).mean() < 2


def test_what_is_left_out_is_drawn_together_with_what_is_given(teacher: ImageModel) -> None:
    asked = ({}, {"steps": 20}, {"sampler": "ddim"}, {"width": 16, "height": 16})
    backend = LocalBackend(teacher)

    async def together() -> list[int]:
        jobs = (Job(prompt="a", seed=seed, **given) for seed, given in enumerate(asked))
        return [drawn.batch for drawn in await asyncio.gather(*map(backend.draw, jobs))]

    assert asyncio.run(together()) == [4] * 4
    assert len({teacher.completed(Job(prompt="a", seed=0, steps=steps)).batch_key for steps in (None, 20, 21)}) == 2


def test_a_student_in_torch_is_merged(tiny: Model, tiny_folder: Path, students: dict[str, Path]) -> None:
    folder = students["lora"]
    served = open_model(ModelSettings(student=str(folder), model=str(tiny_folder), device="cpu"))
    assert not any(isinstance(module, BaseTunerLayer) for module in served._model.denoiser.modules())
    info = read_student(folder, tiny.files)
    apply_student(tiny.denoiser, folder, info)
    unmerged = ImageModel(
        name="x", model=tiny, runner=TorchRunner(tiny.denoiser), distilled=info, engine=None, max_batch=None
    )
    first, second = (
        np.asarray(each.draw([Job(prompt="a red cat", seed=3, steps=3)])[0].image).astype(int)
        for each in (served, unmerged)
    )
    assert np.abs(first - second).max() <= 1
