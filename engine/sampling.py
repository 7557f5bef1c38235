"""From prompts to images: the sampling loop, and noise that depends on the seed alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers import SchedulerMixin
from PIL import Image

from .conditions import TextEmbeddings
from .errors import BoostDiffError, InputError
from .guidance import Denoiser
from .model import Model

PIXELS_512 = 512**2
"""Pixels of an image at 512 by 512."""


def verify_finite(finite: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    """Read what `isfinite().all()` gave for the latents after each step: all at once, as a GPU is waited for.

    Raises:
        BoostDiffError: there were NaN or Inf.
    """
    steps = torch.stack(list(finite)).tolist()
    if not all(steps):
        where = f"after step {steps.index(False) + 1} of {len(steps)}"
        raise BoostDiffError(f"the latents are not finite (NaN or Inf) {where}{_hint(dtype)}")


def _hint(dtype: torch.dtype) -> str:
    """What helps where numbers are not finite."""
    if dtype == torch.float16:
        return ": they may overflow in fp16, which fp32 (a CPU, or --runner onnx --precision fp32) would not"
    return ": the model's weights, its adapter or the guidance scale are at fault"


def check_seed(seed: Any, count: int) -> None:
    """Refuse a seed that can't be that of `count` images, each of which adds one to it.

    Raises:
        InputError: it is no whole number, or an image's is negative or doesn't fit torch's 64 bits.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= int(seed) <= 2**64 - count:
        raise InputError(f"the seed {seed!r} can't be used: it must be a whole number between 0 and 2^64 - 1")


def initial_noise(shape: tuple[int, int, int], *, count: int, seed: int) -> torch.Tensor:
    """Standard normal latents, `(count, *shape)` float32 on the CPU.

    Image i is drawn from a generator seeded with `seed + i`, as a stock pipeline does when it is given
    `generator=[torch.Generator().manual_seed(seed + i) for i in range(count)]`: an image does not depend on the
    batch that it was made in.

    Raises:
        InputError: see `check_seed`.
    """
    check_seed(seed, count)
    return torch.stack(
        [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed + i))[0] for i in range(count)]
    )


@torch.inference_mode()
def sampling(
    denoiser: Denoiser, *, text: TextEmbeddings, noise: torch.Tensor, scheduler: SchedulerMixin, steps: int
) -> Iterator[torch.Tensor]:
    """Denoise from z_T to z_0, one step an item.

    Args:
        denoiser: teacher or student.
        text: embeddings of B prompts.
        noise: `(B, C, H, W)` standard normal.
        scheduler: a fresh one; its state is changed.
        steps: sampling steps.

    Yields:
        `(B, C, H, W)` latents after each step; the last are z_0.
    """
    # Schedulers keep their tables on the CPU: a timestep from the GPU would be waited for in each step.
    scheduler.set_timesteps(steps, device="cpu")
    if hasattr(scheduler, "set_begin_index"):
        # Else it is looked up by the first timestep, of which many steps of flow matching have several.
        scheduler.set_begin_index(0)
    z_t = noise * scheduler.init_noise_sigma
    for t, on_device in zip(scheduler.timesteps, scheduler.timesteps.to(noise.device), strict=True):
        prediction = denoiser(scheduler.scale_model_input(z_t, t), on_device, text)
        z_t = scheduler.step(prediction, t, z_t, return_dict=False)[0]
        yield z_t


def sample(denoiser: Denoiser, **options: Any) -> torch.Tensor:
    """The last latents of `sampling`, which see, `(B, C, H, W)`."""
    return deque(sampling(denoiser, **options), maxlen=1).pop()


@torch.inference_mode()
def decode(model: Model, latents: torch.Tensor, finite: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Latents `(B, C, H, W)` to images `(B, 3, 8H or so, …)`, float32 in [0, 1], on the CPU.

    From 512 pixels on a few at a time: a decoder's activations are the largest of all.

    Raises:
        BoostDiffError: images hold NaN or Inf, or `finite` says so of the latents, see `verify_finite`.
    """
    vae = model.pipeline.vae
    area = _pixels(model, *latents.shape[2:])
    together = len(latents) if area < PIXELS_512 else max(1, 4 * PIXELS_512 // area)
    images, in_range = [], []
    for part in latents.split(together):
        decoded = model.family.decode_latents(vae, model.family.denormalized(part.to(vae.dtype), vae)).float()
        in_range.append(decoded.isfinite().all())
        images.append((decoded / 2 + 0.5).clamp(0, 1))
    # Copied at once: each copy is waited for.
    copied = torch.cat(images).cpu()
    if finite:
        verify_finite(finite, latents.dtype)
    if not torch.stack(in_range).all():
        raise BoostDiffError(f"the VAE's images are not finite (NaN or Inf){_hint(vae.dtype)}")
    return copied


def default_batch_size(model: Model) -> int:
    """Images to denoise together: 8 of up to 512 pixels, so many fewer of larger ones, such as 2 of 1024."""
    return min(8, max(1, 8 * PIXELS_512 // _pixels(model, *model.latent_shape[1:])))


def _pixels(model: Model, height: int, width: int) -> int:
    """Pixels of an image of so many latents."""
    factor: int = model.pipeline.vae_scale_factor
    return factor**2 * height * width


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] to uint8, rounded as diffusers' image processor rounds."""
    return (images * 255).round().to(torch.uint8)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Images `(B, 3, H, W)` in [0, 1] to PIL."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_uint8(images)]


def batches(
    model: Model,
    denoiser: Denoiser,
    *,
    text: TextEmbeddings,
    make_scheduler: Callable[[], SchedulerMixin],
    steps: int,
    seed: int,
    batch_size: int,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[torch.Tensor]:
    """Sample and decode any number of prompts, one batch an item.

    Args:
        text: embeddings of N prompts.
        make_scheduler: gives a fresh scheduler for each batch.
        seed: image i starts from the noise of `seed + i`.
        batch_size: images denoised together.
        on_step: called after each step of each batch with the number of images in it.

    Yields:
        `(B, 3, H, W)` float32 in [0, 1], on the CPU.

    Raises:
        InputError: see `check_seed`.
        BoostDiffError: latents or images hold NaN or Inf.
    """
    check_seed(seed, len(text))
    for start in range(0, len(text), batch_size):
        chunk = text[start : start + batch_size]
        noise = initial_noise(model.latent_shape, count=len(chunk), seed=seed + start)
        noise = noise.to(model.device, model.family.latents_dtype(chunk.conditional.dtype))
        finite = []
        for z_t in sampling(denoiser, text=chunk, noise=noise, scheduler=make_scheduler(), steps=steps):
            finite.append(z_t.isfinite().all())
            if on_step:
                on_step(len(chunk))
        yield decode(model, z_t, finite)


def generate(model: Model, denoiser: Denoiser, *, batch_size: int = 50, **options: Any) -> torch.Tensor:
    """All images of `batches`, which see: `(N, 3, H, W)` float32 in [0, 1], on the CPU."""
    return torch.cat(list(batches(model, denoiser, batch_size=batch_size, **options)))
