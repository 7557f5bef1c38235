"""Floating-point operations of a model, counted, and the speed-up that they allow at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...engine import live_negative
from ...engine.model import Model


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations for one image or prompt; a multiplication and an addition count as two.

    Attributes:
        denoiser: one pass over the latents of one image.
        live_denoiser: the same of a student with a live negative prompt, which attends to two texts; None if there is
            none.
        vae_decode: one image.
        text_encoder: one prompt.
    """

    denoiser: int
    vae_decode: int
    text_encoder: int
    live_denoiser: int | None = None

    def of_pass(self, *, live: bool = False) -> int:
        """One pass of a denoiser, with `live` of one that reads two texts."""
        return self.live_denoiser if live and self.live_denoiser else self.denoiser

    def of_batch(self, *, passes: float, steps: int, batch_size: int, live: bool = False) -> float:
        """Prompts to pixels for a batch; where two texts are read, the empty prompt is encoded once for all."""
        prompts = batch_size + (passes > 1 or live)
        return batch_size * (passes * steps * self.of_pass(live=live) + self.vae_decode) + prompts * self.text_encoder

    def ceiling(
        self, *, steps: int, batch_size: int, passes: float = 2, live: bool = False, live_teacher: bool = False
    ) -> float:
        """The teacher's operations over one pass a step: the speed-up of whole images at equal efficiency."""
        teacher = self.of_batch(passes=passes, steps=steps, batch_size=batch_size, live=live_teacher)
        return teacher / self.of_batch(passes=1, steps=steps, batch_size=batch_size, live=live)


def count_flops(model: Model, *, live: bool = False) -> Flops:
    """Count matrix multiplications, convolutions and attention with torch's `FlopCounterMode`.

    Every part is rebuilt on the meta device from its configuration: nothing is computed, no memory is taken. `live` is
    for a UNet with a student of live negative prompts.
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
        counted = _counted(lambda: model.family.forward(denoiser, inputs))
        live_counted = None
        if live:
            live_negative.attach(denoiser)
            texts = {"encoder_hidden_states": inputs["encoder_hidden_states"].repeat(1, 2, 1)}
            live_counted = _counted(lambda: model.family.forward(denoiser, inputs | texts))
        vae = type(pipeline.vae).from_config(pipeline.vae.config)
        return Flops(
            denoiser=counted,
            live_denoiser=live_counted,
            vae_decode=_counted(lambda: model.family.decode_latents(vae, torch.empty(1, *model.latent_shape))),
            text_encoder=text_encoder,
        )


@torch.no_grad()
def _counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
