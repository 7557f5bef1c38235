"""The picture of a distillation: teacher guided, teacher unguided, student, same seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..engine.conditions import TextEmbeddings
from ..engine.errors import BoostDiffError
from ..engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ..engine.model import Model
from ..engine.pictures import labelled_grid
from ..engine.runners import TorchRunner
from ..engine.sampling import default_batch_size, generate, to_uint8
from .few_steps import STAGE_SPACING
from .loop import Run

PREVIEW_STEPS = 20


class AutocastRunner(TorchRunner):
    """The denoiser in a training run's precision; a VAE that would overflow in it keeps its own."""

    def __init__(self, model: Model, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(model.denoiser)
        self.autocast = autocast

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Runner.predict`."""
        with self.autocast():
            return super().predict(inputs)


class Preview:
    """Draws a grid of one row per prompt, by DDIM in `PREVIEW_STEPS` steps or as many as a few-step student takes.

    The teacher's columns are drawn once.
    """

    def __init__(
        self, run: Run, prompts: list[str], text: TextEmbeddings | None = None, *, note: Callable[[str], None]
    ) -> None:
        """Take note of what will be drawn.

        Args:
            run: its model has the adapter on, as training leaves it.
            prompts: a handful.
            text: their embeddings, where the model has no text encoders.
            note: callback for warnings.
        """
        self.run, self.prompts, self.text, self.note = run, prompts, text, note
        self.steps = run.frozen.stage.steps if run.frozen else PREVIEW_STEPS
        self.spacing = STAGE_SPACING if run.frozen else None
        self.scales = sorted(set(run.config.guidance_bounds))
        self.runner = AutocastRunner(run.model, run.autocast)
        self.teacher: dict[str, torch.Tensor] = {}

    def write(self, path: Path) -> None:
        """Write the grid with the adapter as it is now, as a PNG; a note instead where it can't be drawn."""
        try:
            self._write(path)
        except (torch.OutOfMemoryError, MemoryError):
            self.note(f"there is no {path.name}: out of memory")
        except BoostDiffError as error:
            self.note(f"there is no {path.name}: {error}")

    @torch.no_grad()
    def _write(self, path: Path) -> None:
        model, config = self.run.model, self.run.config
        text = self.text or model.family.encode(
            model.pipeline, self.prompts, negative_prompt=config.fixed_negative_prompt
        )
        if not self.teacher:
            teacher: dict[str, Denoiser] = {"teacher w=1": SinglePassDenoiser(self.runner)}
            for scale in self.scales:
                teacher[f"teacher w={scale:g}"] = GuidedDenoiser(self.runner, scale, self.run.guider)
            with self.run.adapter.disabled():
                self.teacher = self._drawn(teacher, text)
        student = {
            f"{config.method} w={scale:g}": SinglePassDenoiser(
                self.runner,
                scale if config.guidance_conditioned else None,
                live_negative_prompt=config.live_negative_prompt,
            )
            for scale in self.scales
        }
        labelled_grid(self.teacher | self._drawn(student, text), self.prompts).save(path)

    def _drawn(self, denoisers: Mapping[str, Denoiser], text: TextEmbeddings) -> dict[str, torch.Tensor]:
        """A column of images by each denoiser, under its heading."""
        model = self.run.model
        sampling: dict[str, Any] = {
            "text": text,
            "make_scheduler": partial(model.make_scheduler, "ddim", spacing=self.spacing),
            "steps": self.steps,
            "seed": 0,
            "batch_size": default_batch_size(model),
        }
        return {heading: to_uint8(generate(model, denoiser, **sampling)) for heading, denoiser in denoisers.items()}
