"""The picture at the end of a distillation: teacher guided, teacher unguided, student, same seeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..engine.generate import generate, to_uint8
from ..engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ..engine.model import Model
from ..engine.pictures import labelled_grid
from ..engine.runners import TorchRunner
from ..engine.samplers import make_scheduler
from .adapters import Adapter

PREVIEW_STEPS = 20


def write_preview(
    model: Model, adapter: Adapter, folder: Path, *, prompts: list[str], guidance: float, method: str
) -> None:
    """Write `grid.png` into a folder: one row a prompt, by DDIM in `PREVIEW_STEPS` steps.

    Args:
        model: with the trained adapter on.
        adapter: that adapter, switched off for the teacher's columns.
        folder: where to write.
        prompts: a handful.
        guidance: w of the guided column.
        method: names the student's column.
    """
    runner = TorchRunner(model.unet)
    draw = partial(
        generate,
        model,
        text=model.family.encode(model.pipeline, prompts),
        make_scheduler=partial(make_scheduler, "ddim", model.pipeline.scheduler.config),
        steps=PREVIEW_STEPS,
        seed=0,
        batch_size=8,
    )
    guided: Denoiser = GuidedDenoiser(runner, guidance)
    single: Denoiser = SinglePassDenoiser(runner)
    with adapter.disabled():
        columns = {f"teacher w={guidance:g}": to_uint8(draw(guided)), "teacher w=1": to_uint8(draw(single))}
    columns[f"student {method}"] = to_uint8(draw(single))
    labelled_grid(columns, prompts).save(folder / "grid.png")
