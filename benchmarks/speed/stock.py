"""The baseline without BoostDiff: a stock diffusers pipeline with guidance."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from ...engine.model import Model
from .device import Stopwatch, synchronize
from .throughput import RunnerMode, TimedVariant


def stock_pipeline(model: Model) -> DiffusionPipeline:
    """A pipeline of diffusers itself, as `from_pretrained` makes it; it shares the model's components where it can."""
    components = dict(model.pipeline.components)
    if model.pipeline.vae.dtype != model.unet.dtype:
        # Ours is upcast for good; the stock pipeline upcasts one of the UNet's dtype for each decoding.
        components["vae"] = copy.deepcopy(model.pipeline.vae).to(model.unet.dtype)
    pipeline = model.family.pipeline_class(**model.family.load_options | components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True, kw_only=True)
class StockVariant(TimedVariant):
    """The stock pipeline's own `__call__` with guidance, eager, without our loop.

    Attributes:
        pipeline: what `stock_pipeline` gave.
    """

    pipeline: DiffusionPipeline

    @property
    def key(self) -> RunnerMode:
        """See `TimedVariant`."""
        return RunnerMode("stock diffusers", self.mode)

    def time(
        self,
        model: Model,
        *,
        prompts: Sequence[str],
        noise: torch.Tensor,
        guidance: float,
        scheduler: SchedulerMixin,
        steps: int,
    ) -> dict[str, float]:
        """See `TimedVariant.time`; of its parts, only the UNet can be timed from outside."""
        unet, device = self.pipeline.unet, self.runner.device
        self.pipeline.scheduler = scheduler
        watch = Stopwatch(device)
        spans: list[Any] = []

        def begin(*_: Any) -> None:
            spans.append(watch.part("unet"))
            spans[-1].__enter__()

        def end(*_: Any) -> None:
            # Must give None: what a hook returns takes the place of the output.
            spans.pop().__exit__(None, None, None)

        hooks = [unet.register_forward_pre_hook(begin), unet.register_forward_hook(end)]
        try:
            synchronize(device)
            began = time.perf_counter()
            images = self.pipeline(
                list(prompts),
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=noise.to(device, self.runner.dtype),
                output_type="pt",
            ).images
            images.float().cpu()
            synchronize(device)
            return {"total": time.perf_counter() - began, "unet": watch.seconds("unet")}
        finally:
            for hook in hooks:
                hook.remove()
