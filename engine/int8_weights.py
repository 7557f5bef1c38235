"""Frozen linear layers with weights in 8 bits, by torchao, under an adapter that is trained."""

from __future__ import annotations

from typing import Any

import torch


def int8_weights(part: str) -> Any:
    """What a stock pipeline's `from_pretrained` takes to hold the linear layers of a part in 8 bits."""
    # Slow to import, and an optional dependency.
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return PipelineQuantizationConfig(quant_mapping={part: TorchAoConfig(Int8WeightOnlyConfig())})


def freeze_int8(denoiser: torch.nn.Module) -> None:
    """Let its layers of 8 bits keep no more than these for the backward pass."""
    from torchao.quantization import Int8Tensor

    for module in denoiser.modules():
        if type(module) is torch.nn.Linear and isinstance(module.weight, Int8Tensor):
            module.__class__ = FrozenLinear


class FrozenLinear(torch.nn.Linear):
    """A linear layer whose weight is not trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `torch.nn.Linear.forward`."""
        product: torch.Tensor = _Product.apply(x, self.weight)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ. torchao's product keeps W in full for the backward pass, and in FP16 overflows before it is scaled."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        context.weight, context.dtype = weight, x.dtype
        return torch.nn.functional.linear(x, weight.dequantize())

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return (gradient @ context.weight.dequantize().to(gradient.dtype)).to(context.dtype), None
