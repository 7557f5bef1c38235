"""The baseline without BoostDiff: a stock diffusers pipeline with guidance."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from ...engine.model import Model
from .device import Stopwatch, synchronize
from .throughput import MODES, RunnerMode, TimedVariant, Workload


def stock_pipeline(model: Model) -> DiffusionPipeline:
    """A pipeline of diffusers itself, as `from_pretrained` makes it; it shares the model's components where it can."""
    components = dict(model.pipeline.components)
    if model.pipeline.vae.dtype != model.denoiser.dtype:
        # Ours is upcast for good; the stock pipeline upcasts one of the UNet's dtype for each decoding.
        components["vae"] = copy.deepcopy(model.pipeline.vae).to(model.denoiser.dtype)
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
        return RunnerMode("stock diffusers", self.mode)

    def passes(self, work: Workload) -> float:
        """See `TimedVariant.passes`; of our guiders the pipeline has guidance rescale alone."""
        return MODES[self.mode]

    def time(self, work: Workload) -> dict[str, float]:
        """See `TimedVariant.time`; of its parts, only the denoiser can be timed from outside."""
        device = self.runner.device
        denoiser = getattr(self.pipeline, self.runner.family.denoiser)
        self.pipeline.scheduler = work.make_scheduler()
        options = self.runner.family.stock_guidance(work.guidance)
        if "negative_prompt" in options:
            # One each, as pipelines that need them don't repeat one for all.
            options["negative_prompt"] = [options["negative_prompt"]] * len(work.prompts)
        if rescale := work.guider.settings.get("guidance_rescale"):
            # Pipelines of UNets alone take it.
            options["guidance_rescale"] = rescale
        _, *sides = work.model.latent_shape
        options["height"], options["width"] = (self.pipeline.vae_scale_factor * side for side in sides)
        watch, forward = Stopwatch(device), denoiser.forward

        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            with watch.part("denoiser"):
                return forward(*args, **kwargs)

        denoiser.forward = timed_forward
        try:
            synchronize(device)
            began = time.perf_counter()
            images = self.pipeline(
                list(work.prompts),
                num_inference_steps=work.steps,
                latents=self.runner.family.packed(work.noise).to(device, self.runner.dtype),
                output_type="pt",
                **options,
            ).images
            images.float().cpu()
            synchronize(device)
            return {"total": time.perf_counter() - began, "denoiser": watch.seconds("denoiser")}
        finally:
            del denoiser.forward
