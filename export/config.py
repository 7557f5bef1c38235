"""What to export, and in which shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..engine.errors import InputError
from ..engine.trt import TENSORRT_FLAVOURS

PRECISIONS = ("fp32", "fp16", "both")
LARGE = 1e9
"""Bytes of a UNet in FP32 from which a plan's export leaves the FP32 graph out."""


def parse_profile(text: str, option: str) -> tuple[int, int, int]:
    """`8` or `1:4:16` to smallest, best and largest.

    Raises:
        InputError: it is neither, or not ascending.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", text.strip())
    if not found:
        raise InputError(f"{option} {text!r} is neither a number nor smallest:best:largest, such as 1:4:16")
    low, best, high = (int(found[i] or found[1]) for i in (1, 2, 3))
    if not 1 <= low <= best <= high:
        raise InputError(f"{option} {text} must be at least 1 and ascend: smallest:best:largest")
    return low, best, high


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How to export.

    Attributes:
        precision: of the ONNX graphs: "fp32", "fp16" or "both"; None takes fp32, and with `trt` both, or fp16 alone
            for a UNet of more than `LARGE` bytes.
        trt: build TensorRT plans of the FP16 graphs.
        trt_flavour: a name in `TENSORRT_FLAVOURS`; None chooses, see `plan.choose_flavour`.
        batch: smallest, best and largest batch of a plan. A batched-CFG teacher at batch 8 needs 16.
        size: smallest, best and largest height and width in pixels; None fixes the model's own.
        refittable: plans whose weights can be replaced later.
        workspace_gb: memory that TensorRT may use for scratch; None leaves it free.
        diffusers: also write the merged UNet as diffusers loads it.
    """

    precision: str | None = None
    trt: bool = False
    trt_flavour: str | None = None
    batch: tuple[int, int, int] = (1, 4, 16)
    size: tuple[int, int, int] | None = None
    refittable: bool = False
    workspace_gb: float | None = None
    diffusers: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used, or contradicts another.
        """
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.trt_flavour not in (None, *TENSORRT_FLAVOURS):
            raise InputError(f"unknown flavour {self.trt_flavour!r}: choose one of {', '.join(TENSORRT_FLAVOURS)}")
        if self.trt and self.precision == "fp32":
            raise InputError("--trt builds from FP16 graphs: leave --precision fp32 out, or pass both")
        if not self.trt:
            for option in ("trt_flavour", "refittable", "workspace_gb"):
                if getattr(self, option):
                    name = option.removesuffix("_gb").replace("_", "-")
                    raise InputError(f"--{name} is about TensorRT plans: pass --trt with it")
        if self.workspace_gb is not None and self.workspace_gb <= 0:
            raise InputError("--workspace must be more than 0 GB")

    def precisions(self, parameters: int) -> tuple[str, ...]:
        """Precisions to write for a UNet of so many parameters, the main one first."""
        chosen = self.precision
        if chosen is None:
            chosen = ("fp16" if 4 * parameters > LARGE else "both") if self.trt else "fp32"
        return ("fp32", "fp16") if chosen == "both" else (chosen,)

    def latent_size(self, *, factor: int, multiple: int, own: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Smallest, best and largest (height, width) of the latents.

        Args:
            factor: pixels a latent.
            multiple: of latents that the UNet can halve again and again.
            own: the model's own latent height and width.

        Raises:
            InputError: a size is no multiple of `factor * multiple` pixels.
        """
        if self.size is None:
            return (own,) * 3
        wrong = [size for size in self.size if size % (factor * multiple)]
        if wrong:
            raise InputError(
                f"--size {wrong[0]} can't be used: this model needs multiples of {factor * multiple} pixels"
            )
        return tuple((size // factor, size // factor) for size in self.size)

    def as_json(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
