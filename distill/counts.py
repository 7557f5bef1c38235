"""What a run trains and holds in memory, counted from configuration files alone."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.adapters import Adapter
from ..engine.guidance_input import make_adapter
from ..engine.model import ModelFiles
from .config import DistillConfig, RunConfig

TRAINED_BYTES = 16
"""Per trained parameter: weight, gradient and AdamW's two moments, in float32."""


def base_dtype(config: DistillConfig, device: torch.device) -> torch.dtype:
    """The frozen weights' precision."""
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    return torch.float32 if device.type == "cpu" else half


def adapter_of(denoiser: Any, config: DistillConfig) -> Adapter:
    """A new adapter on a denoiser, see `make_adapter`."""
    return make_adapter(
        config.method,
        denoiser,
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        tokens=config.tokens,
        norms=config.norms,
        guidance_input=config.guidance_conditioned,
        live_negative_prompt=config.live_negative_prompt,
    )


def memory_needed(
    files: ModelFiles, config: DistillConfig, execution: RunConfig, trained: int, device: torch.device
) -> dict[str, int]:
    """Bytes of memory by part, counted from configurations; activations are not in it."""
    each = base_dtype(config, device).itemsize
    parts = {name: each * count for name, count in files.parameters().items()}
    if execution.cache_text is not None:
        parts = {name: size for name, size in parts.items() if name not in files.family.text_encoders}
    if config.base_precision == "int8":
        linear = [m for m in files.empty_denoiser().modules() if isinstance(m, torch.nn.Linear)]
        # A byte per weight, and a scale per output.
        parts[files.family.denoiser] -= sum((each - 1) * m.weight.numel() - each * m.out_features for m in linear)
    return parts | {"adapter": TRAINED_BYTES * trained}


def count_parameters(files: ModelFiles, config: DistillConfig) -> dict[str, int]:
    """Parameters that would be trained, and those of the denoiser without an adapter."""
    denoiser = files.empty_denoiser().requires_grad_(False)
    total = sum(p.numel() for p in denoiser.parameters())
    with torch.device("meta"):
        adapter = adapter_of(denoiser, config)
    return {"trainable_parameters": adapter.count(), "total_parameters": total}
