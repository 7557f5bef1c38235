"""Training states from captioned images: the paper's source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..engine.errors import InputError
from ..engine.model import Model
from ..engine.prompts import is_truncated, token_limit
from .images import ImageData, ImageStream
from .objective import NoiseSchedule
from .order import noise_of
from .source import Batch, Source, draw_guidance

ENCODED_PIXELS = 2**21
"""What the VAE encodes at once, eight images of 512x512: its activations are hundreds of times their size."""

CAPTIONS = 256
"""Captions that live negative prompts are drawn from."""


class CaptionedImages(Source):
    """The paper's source: images encoded by the VAE, diffused to a uniformly random timestep."""

    def __init__(
        self,
        model: Model,
        data: ImageData,
        schedule: NoiseSchedule,
        *,
        max_bad_samples: int = 0,
        timesteps: Sequence[int] | None = None,
        **common: Any,
    ) -> None:
        """Open the data; images are diffused to one of the timesteps, by default of all.

        For what is `common` to all sources see `Source`.
        """
        super().__init__(model, schedule, **common)
        self.timesteps = range(len(schedule)) if timesteps is None else timesteps
        height, width = image_size(model)
        cut = f"with a caption cut to {token_limit(model.pipeline)} tokens"
        self.stream = ImageStream(
            data,
            height=height,
            width=width,
            batch_size=self.share.batch_size,
            seed=self.seed,
            max_bad_samples=max_bad_samples,
            note_on=lambda caption: cut if is_truncated(model.pipeline, caption) else "",
        )
        # The same in every process, whatever its share of the data.
        self.other_captions = self.stream.captions(CAPTIONS) if self.negatives.live else []

    def batch(self, update: int) -> Batch:
        """See `Source.batch`.

        Raises:
            InputError: the images can't be read, or more samples are bad than allowed, here or in another process; the
                stream is then where it was before.
        """
        before, notes, failure = self.stream.state(), self.stream.notes.copy(), ""
        try:
            captions, images = self.stream.next_batch(self.share.members)
        except InputError as error:
            failure = str(error)
        # All processes fail at once: together they can write a checkpoint.
        failures, counts = zip(*self.share.gather_list([(failure, self.stream.notes)]), strict=True)
        try:
            if failure := next(filter(None, failures), ""):
                raise InputError(failure)
            self.stream.check(sum(counts, Counter()))
        except InputError:
            self.stream.restore(before)
            self.stream.notes = notes
            raise
        vae = self.model.pipeline.vae
        with torch.no_grad():
            together = max(1, ENCODED_PIXELS // images[0, 0].numel())
            x = torch.cat([self.model.family.encode_latents(vae, part) for part in images.split(together)])
        timesteps, scales, noise, negatives = [], [], [], []
        for member in self.share.members:
            number = update * self.share.batch_size + member
            random = np.random.default_rng([self.seed, number])
            timesteps.append(self.timesteps[int(random.integers(len(self.timesteps)))])
            scales.append(draw_guidance(random, self.guidance_bounds))
            negatives.append(self.negatives.draw(random, self.other_captions))
            noise.append(noise_of(x.shape[1:], self.seed, number))
        t = torch.tensor(timesteps, device=x.device)
        return Batch(
            z_t=self.schedule.add_noise(x, torch.stack(noise).to(x.device), t),
            t=t,
            prompts=captions,
            negative_prompts=negatives,
            text=self.text(captions, negatives),
            guidance=torch.tensor(scales, device=x.device),
        )

    def notes(self) -> Counter[str]:
        """See `Source.notes`."""
        return sum(self.share.gather_list([self.stream.notes]), Counter[str]())

    def state(self) -> dict[str, torch.Tensor]:
        """See `Source.state`."""
        return self.stream.state()

    def restore(self, state: dict[str, torch.Tensor], notes: Counter[str]) -> None:
        """See `Source.restore`; one process goes on with the counts of all."""
        self.stream.restore(state)
        if self.share.rank == 0:
            self.stream.notes = notes


def image_size(model: Model) -> tuple[int, int]:
    """Height and width in pixels of the images that a model makes."""
    scale = model.pipeline.vae_scale_factor
    _, height, width = model.latent_shape
    return height * scale, width * scale
