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
from .config import DistillConfig

PREVIEW_STEPS = 20


def write_preview(model: Model, adapter: Adapter, path: Path, *, prompts: list[str], config: DistillConfig) -> None:
    """Write a grid as a PNG: one row a prompt, by DDIM in `PREVIEW_STEPS` steps.

    Args:
        model: with the trained adapter on.
        adapter: that adapter, switched off for the teacher's columns.
        path: where to write.
        prompts: a handful.
        config: names the method and the guidance; of a range both ends are drawn.
    """
    runner = TorchRunner(model.unet)
    draw = partial(
        generate,
        model,
        text=model.family.encode(model.pipeline, prompts, negative_prompt=config.negative_prompt),
        make_scheduler=partial(make_scheduler, "ddim", model.pipeline.scheduler.config),
        steps=PREVIEW_STEPS,
        seed=0,
        batch_size=8,
    )
    single: Denoiser = SinglePassDenoiser(runner)
    scales = sorted(set(config.guidance_bounds))
    columns = {}
    with adapter.disabled():
        columns["teacher w=1"] = to_uint8(draw(single))
        for scale in scales:
            columns[f"teacher w={scale:g}"] = to_uint8(draw(GuidedDenoiser(runner, scale)))
    for scale in scales:
        student: Denoiser = SinglePassDenoiser(runner, scale if config.takes_guidance else None)
        columns[f"{config.method} w={scale:g}"] = to_uint8(draw(student))
    labelled_grid(columns, prompts).save(path)
