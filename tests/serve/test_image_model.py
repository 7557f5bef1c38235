"""What a replica checks of its model, and what it makes of a student and of a job."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from boostdiff.engine.errors import BoostDiffError
from boostdiff.engine.model import Model
from boostdiff.engine.student import apply_student, read_student
from boostdiff.serve.image_model import ImageModel, Job, Picture, open_model
from boostdiff.serve.local import LocalBackend
from boostdiff.serve.settings import ModelSettings
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
    unmerged = ImageModel(name="x", model=tiny, distilled=info, engine=None, max_batch=None)
    first, second = (
        np.asarray(each.draw([Job(prompt="a red cat", seed=3, steps=3)])[0].image).astype(int)
        for each in (served, unmerged)
    )
    assert np.abs(first - second).max() <= 1
