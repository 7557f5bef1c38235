"""What `boostdiff bench` is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from ..engine.compiled import has_bfloat16
from ..engine.errors import InputError
from ..engine.model import LARGE_PARAMETERS
from ..engine.schedulers import make_scheduler
from .quality.alternatives import candidates


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        steps: sampling steps.
        sampler: a name in `engine.samplers.SAMPLERS`.
        batch_sizes: images made together when speed is measured; None takes 8 on a CPU, else 1, 2, 4, 8, 16.
        runs: timed batches of each; intervals are of 95% or more from six on, of 94% with five, of 75% with three.
        samples: N, images per row when quality is measured; 0 measures speed alone.
        seed: of the initial noise.
        guidance: of a student that takes it as an input, and of its teacher; None takes the student's own.
        compile: also run teacher and student through `torch.compile`; None does so on CUDA, where it takes many minutes
            the first time, and for small models on CPUs with bfloat16.
        alternatives: also judge what saves passes without training, see `benchmarks.alternatives`.
    """

    steps: int = 20
    sampler: str = "ddim"
    batch_sizes: tuple[int, ...] | None = None
    runs: int = 5
    samples: int = 200
    seed: int = 0
    guidance: float | None = None
    compile: bool | None = None
    alternatives: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        if self.batch_sizes is not None and min(self.batch_sizes, default=0) < 1:
            raise InputError("--batch-sizes must be at least 1, as in --batch-sizes 1,2,4")
        for name, least in (("steps", 1), ("runs", 3), ("samples", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}")
        if self.samples == 1:
            raise InputError("--samples 1 has no distribution: pass at least 2, or --speed-only")
        if self.alternatives and not self.samples:
            raise InputError("--alternatives is about quality: leave --speed-only out")
        if self.alternatives and self.steps < 2:
            raise InputError("--alternatives needs --steps of at least 2: with one, no pass can be saved")
        make_scheduler(self.sampler, {})

    def denoised(self, students: int) -> int:
        """Steps of single images that the quality rows take together, with so many students."""
        swept = candidates(steps=self.steps, guidance=1.0) if self.alternatives else []
        return self.samples * ((students + 3) * self.steps + sum(one.steps for one in swept))

    def compiles(self, unet: UNet2DConditionModel) -> bool:
        """Whether to run `torch.compile` on a UNet, where it is."""
        if self.compile is not None:
            return self.compile
        small = unet.num_parameters() < LARGE_PARAMETERS
        return unet.device.type == "cuda" or (small and has_bfloat16(unet.device))

    def batch_sizes_on(self, device: torch.device) -> tuple[int, ...]:
        """The batch sizes to measure on a device, ascending."""
        default = (8,) if device.type == "cpu" else (1, 2, 4, 8, 16)
        return tuple(sorted(set(self.batch_sizes or default)))


def parse_batch_sizes(text: str | None) -> tuple[int, ...] | None:
    """`1,2,4` to numbers; None stays None.

    Raises:
        InputError: it is no list of whole numbers.
    """
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--batch-sizes {text!r} is no list of whole numbers, such as 1,2,4") from None
