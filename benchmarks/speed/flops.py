"""Floating-point operations of a model, counted, and the speed-up that they allow at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...engine.model import Model


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations for one image or prompt; a multiplication and an addition count as two.

    Attributes:
        denoiser: one pass over the latents of one image.
        vae_decode: one image.
        text_encoder: one prompt.
    """

    denoiser: int
    vae_decode: int
    text_encoder: int

    def of_batch(self, *, passes: float, steps: int, batch_size: int) -> float:
        """Prompts to pixels for a batch; with more than one pass a step, the empty prompt is encoded once for all."""
        prompts = batch_size + (passes > 1)
        return batch_size * (passes * steps * self.denoiser + self.vae_decode) + prompts * self.text_encoder

    def ceiling(self, *, steps: int, batch_size: int, passes: float = 2) -> float:
        """The teacher's operations over one pass a step: the speed-up of whole images at equal efficiency."""
        teacher = self.of_batch(passes=passes, steps=steps, batch_size=batch_size)
        return teacher / self.of_batch(passes=1, steps=steps, batch_size=batch_size)


def count_flops(model: Model) -> Flops:
    """Count matrix multiplications, convolutions and attention with torch's `FlopCounterMode`.

    Every part is rebuilt on the meta device from its configuration: nothing is computed, no memory is taken.
    """
    pipeline = model.pipeline
    inputs = {
        name: tensor.to("meta", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.family.example_inputs(pipeline, batch=1).items()
    }
    text_encoder = 0
    with torch.device("meta"):
        for name in model.family.present_text_encoders(pipeline):
            encoder = getattr(pipeline, name)
            tokens = torch.zeros(1, model.family.encoded_tokens(pipeline, name), dtype=torch.int64)
            text_encoder += _counted(partial(type(encoder)(encoder.config), tokens))
        denoiser = type(model.denoiser).from_config(model.denoiser.config)
        vae = type(pipeline.vae).from_config(pipeline.vae.config)
        return Flops(
            denoiser=_counted(lambda: model.family.forward(denoiser, inputs)),
            vae_decode=_counted(lambda: model.family.decode_latents(vae, torch.empty(1, *model.latent_shape))),
            text_encoder=text_encoder,
        )


@torch.no_grad()
def _counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
