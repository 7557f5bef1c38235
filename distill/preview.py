"""The picture of a distillation: teacher guided, teacher unguided, student, same seeds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from ..engine.adapters import Adapter
from ..engine.conditions import TextEmbeddings
from ..engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ..engine.model import Model
from ..engine.pictures import labelled_grid
from ..engine.runners import TorchRunner
from ..engine.sampling import default_batch_size, generate, to_uint8
from .config import DistillConfig
from .few_steps import SAMPLER, SPACING

PREVIEW_STEPS = 20


class AutocastRunner(TorchRunner):
    """The UNet in a training run's precision; a VAE that would overflow in it keeps its own."""

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
        self,
        model: Model,
        adapter: Adapter,
        prompts: list[str],
        config: DistillConfig,
        *,
        steps: int | None = None,
        autocast: Callable[[], AbstractContextManager[None]],
        note: Callable[[str], None],
        text: TextEmbeddings | None = None,
    ) -> None:
        """Take note of what will be drawn.

        Args:
            model: with the adapter on, as training leaves it.
            adapter: switched off for the teacher's columns.
            prompts: a handful.
            config: names the method and the guidance; both ends of a range are drawn.
            steps: of a few-step student, for all columns.
            autocast: the run's precision.
            note: callback for warnings.
            text: embeddings of the prompts, where the model has no text encoders.
        """
        self.note, self.text = note, text
        self.steps, self.spacing = steps or PREVIEW_STEPS, SPACING if steps else None
        self.model, self.adapter, self.prompts, self.config = model, adapter, prompts, config
        self.scales = sorted(set(config.guidance_bounds))
        self.runner = AutocastRunner(model, autocast)
        self.guider = config.chosen_guider.for_schedule(model.pipeline.scheduler.config)
        self.teacher: dict[str, torch.Tensor] = {}

    def write(self, path: Path) -> None:
        """Write the grid with the adapter as it is now, as a PNG; a note instead where memory does not suffice."""
        try:
            self._write(path)
        except torch.OutOfMemoryError:
            self.note(f"there is no {path.name}: out of memory")

    @torch.no_grad()
    def _write(self, path: Path) -> None:
        text = self.text or self.model.family.encode(
            self.model.pipeline, self.prompts, negative_prompt=self.config.fixed_negative_prompt
        )
        draw = partial(
            generate,
            self.model,
            text=text,
            make_scheduler=partial(self.model.make_scheduler, SAMPLER, spacing=self.spacing),
            steps=self.steps,
            seed=0,
            batch_size=default_batch_size(self.model),
        )
        if not self.teacher:
            with self.adapter.disabled():
                unguided = to_uint8(draw(SinglePassDenoiser(self.runner)))
                self.teacher = {"teacher w=1": unguided}
                for scale in self.scales:
                    guided = GuidedDenoiser(self.runner, scale, self.guider)
                    self.teacher[f"teacher w={scale:g}"] = to_uint8(draw(guided))
        columns = dict(self.teacher)
        for scale in self.scales:
            student: Denoiser = SinglePassDenoiser(
                self.runner,
                scale if self.config.guidance_conditioned else None,
                live_negative_prompt=self.config.live_negative_prompt,
            )
            columns[f"{self.config.method} w={scale:g}"] = to_uint8(draw(student))
        labelled_grid(columns, self.prompts).save(path)
