"""How far each layer, quantized to 8 bits, moves the UNet's prediction: all layers at once, by a few backward passes.

To first order, a layer whose output is off by d moves the prediction by J d, J the Jacobian of the prediction with
respect to that output. With v of independent standard normal numbers, E⟨v, J d⟩² = ‖J d‖² (Hutchinson's estimator), and
⟨v, J d⟩ = ⟨Jᵀ v, d⟩: one backward pass from v gives Jᵀ v at every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..engine.guidance import Denoiser
from ..engine.guidance_term import total_sum_of_squares
from .calibration import Calibration
from .eight_bits import Scheme

DIRECTIONS, SEED = 4, 0
"""Backward passes per state, and the seed of their directions."""


class MinMax(NamedTuple):
    """Smallest and largest number."""

    low: float = math.inf
    high: float = -math.inf

    def widened(self, values: torch.Tensor) -> MinMax:
        """With these."""
        low, high = values.aminmax()
        return MinMax(min(self.low, low.item()), max(self.high, high.item()))


Ranges = dict[str, tuple[MinMax, MinMax]]
"""Of each layer's inputs and outputs, by its name."""


@contextmanager
def _hooked(denoiser: nn.Module, hook: Any) -> Iterator[None]:
    """`hook(name, layer, input, output)` after each call of a layer; what it returns, if anything, is the output."""
    with ExitStack() as hooks:
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):

                def after(module: Any, inputs: Any, output: Any, name: str = name) -> Any:
                    return hook(name, module, inputs[0], output)

                hooks.callback(module.register_forward_hook(after).remove)
        yield


@contextmanager
def recorded_ranges(denoiser: nn.Module) -> Iterator[Ranges]:
    """Ranges of all that goes through the layers meanwhile."""
    ranges: Ranges = {}

    def record(name: str, layer: nn.Module, values: torch.Tensor, output: torch.Tensor) -> None:
        inputs, outputs = ranges.get(name, (MinMax(), MinMax()))
        ranges[name] = inputs.widened(values), outputs.widened(output)

    with _hooked(denoiser, record):
        yield ranges


def _quantization_error(
    layer: Any, values: torch.Tensor, output: torch.Tensor, ranges: tuple[MinMax, MinMax], scheme: Scheme
) -> torch.Tensor:
    """What 8 bits change in a layer's output."""
    values, weight = scheme.fake_quantized(values, *ranges[0]), scheme.fake_quantized_weight(layer.weight)
    if isinstance(layer, nn.Conv2d):
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        quantized = F.conv2d(values, weight, layer.bias, *geometry)  # type: ignore[arg-type]
    else:
        quantized = F.linear(values, weight, layer.bias)
    return (scheme.fake_quantized(quantized, *ranges[1]) if scheme.quantizes_outputs else quantized) - output


def layer_errors(
    unet: nn.Module, denoiser: Denoiser, calibration: Calibration, ranges: Ranges, scheme: Scheme
) -> dict[str, torch.Tensor]:
    """Estimate what layers in 8 bits cost at the states that these are judged by.

    The UNet is the merged student's, in float32; `denoiser` is the student's, on it.

    Returns:
        A vector per layer, by its name: the square of the sum of some layers' vectors is what these cost together,
        Σ‖J d‖² / Σ‖ε̂_1 − ε̂_w‖².
    """
    generator = torch.Generator().manual_seed(SEED)
    products: dict[str, list[torch.Tensor]] = {name: [] for name in ranges}

    def watch(name: str, layer: nn.Module, values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            error = _quantization_error(layer, values, output, ranges[name], scheme)
        # Where only conditions went in, nothing before this layer asks for a gradient.
        output = output if output.requires_grad else output.detach().requires_grad_()

        def add(gradient: torch.Tensor) -> None:
            products[name][-1] += (gradient * error).sum().cpu()

        output.register_hook(add)
        return output

    unet.requires_grad_(False)
    with torch.inference_mode(False), torch.enable_grad(), _hooked(unet, watch):
        # One row at a time: a large UNet's activations fill memory.
        for state in calibration.checked:
            for row in range(len(state.z_t)):
                # Tensors of inference mode can't be saved for a backward pass; their copies can.
                one = slice(row, row + 1)
                text = calibration.text[one].to(state.z_t.device, copy=True)
                prediction = denoiser(state.z_t[one].clone(), state.t.clone(), text)
                for index in range(DIRECTIONS):
                    direction = torch.randn(prediction.shape, generator=generator).to(prediction)
                    for found in products.values():
                        found.append(torch.zeros(()))
                    prediction.backward(direction, retain_graph=index < DIRECTIONS - 1)
    norm = math.sqrt(DIRECTIONS * total_sum_of_squares(calibration.checked))
    return {name: torch.stack(found) / norm for name, found in products.items()}
