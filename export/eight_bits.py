"""Quantization schemes of 8 bits: what ONNX Runtime's quantizer is told, and the same as fake quantization in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .graph import LAYERS

MAX_VALUE = {"int8": float(torch.iinfo(torch.int8).max), "fp8": torch.finfo(torch.float8_e4m3fn).max}
"""Largest number of each, by precision."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A quantization scheme.

    Attributes:
        precision: "int8" or "fp8".
        source: precision of the graph that is quantized.
        weights: their numbers, in words.
        activations: likewise.
        quantizes_outputs: whether a layer's output is quantized, too.
        reduce_range: whether weights have 7 bits.
        options: `extra_options` of ONNX Runtime's `quantize_static`.
    """

    precision: str
    source: str
    weights: str
    activations: str
    quantizes_outputs: bool
    reduce_range: bool
    options: dict[str, Any]

    def fake_quantized(self, activations: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """Activations as 8 bits hold them, per tensor, where they lay between `low` and `high` in calibration."""
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            return activations
        if self.precision == "fp8":
            return _as_fp8(activations, torch.tensor(max(-low, high), device=activations.device))
        scale = (high - low) / 255
        return torch.fake_quantize_per_tensor_affine(activations, scale, round(-low / scale), 0, 255)

    def fake_quantized_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight `(C_out, …)` as 8 bits hold it, per output channel."""
        largest = weight.abs().flatten(1).amax(1).clamp(min=1e-30)
        if self.precision == "fp8":
            return _as_fp8(weight, largest.view(-1, *(1,) * (weight.ndim - 1)))
        zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, largest / 64, zeros, 0, -64, 64)


def _as_fp8(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scale = largest / MAX_VALUE["fp8"]
    numbers = (values / scale).clamp(-MAX_VALUE["fp8"], MAX_VALUE["fp8"])
    return numbers.to(torch.float8_e4m3fn).to(values.dtype) * scale


INT8 = Scheme(
    precision="int8",
    source="fp32",
    # Without VNNI, a CPU's 8-bit products of 8-bit weights saturate.
    weights="int8, 7 bits, per channel",
    activations="uint8, per tensor",
    quantizes_outputs=True,
    reduce_range=True,
    options={},
)
FP8 = Scheme(
    precision="fp8",
    source="fp16",
    weights="float8 e4m3, per channel",
    activations="float8 e4m3, per tensor",
    quantizes_outputs=False,
    # Symmetric, as FP8 has no zero point; weights stay as they are, for `quantize._as_fp8`.
    reduce_range=False,
    options={
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(LAYERS),
    },
)
SCHEMES = {scheme.precision: scheme for scheme in (INT8, FP8)}
