"""Normalizations trained beside another adapter: their scales, and their biases where that leaves them frozen.

LN tuning (Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models") on a
UNet's group and layer normalizations; DiffFit (Xie et al. 2023) tunes those of diffusion transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from .adapters import Adapter, copy_by_name, multiply_change, swapped, trained_copies

NORMS_FILE = "norms.safetensors"


def _parameters(unet: Any) -> dict[str, torch.nn.Parameter]:
    """Scales ("….weight") and biases of all normalizations, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
        for key, parameter in module.named_parameters(recurse=False)
    }


class Norms(Adapter):
    """Another adapter, and with it the scale and bias of every normalization.

    In a stock diffusers pipeline: `Norms.load(pipe.unet, folder)`, beside what loads the other adapter.
    """

    file = NORMS_FILE

    def __init__(self, unet: UNet2DConditionModel, inner: Adapter) -> None:
        super().__init__(unet)
        self.inner = inner
        taken = inner.parameters()
        self._base = trained_copies(unet, {name: p for name, p in _parameters(unet).items() if name not in taken})

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {**self.inner.parameters(), **self._own()}

    def _own(self) -> dict[str, torch.nn.Parameter]:
        return {name: self.denoiser.get_parameter(name) for name in self._base}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with swapped(self._own(), self._base), self.inner.disabled():
            yield

    def scale(self, factor: float, largest: float | None = None) -> None:
        self.inner.scale(factor, largest)
        multiply_change(self._own(), self._base, factor)

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the other adapter, and the normalizations' new parameters by name in a file beside it."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self._own().items()}
        save_file(tensors, folder / NORMS_FILE)
        return [*self.inner.save(folder, pipeline), folder / NORMS_FILE]

    @staticmethod
    def load(unet: UNet2DConditionModel, folder: str | Path) -> None:
        """See `Adapter.load`, of the normalizations; the other adapter has a file of its own."""
        tensors = load_file(Path(folder) / NORMS_FILE)
        known = _parameters(unet)
        # Beside BitFit, which has all biases, the scales alone.
        copy_by_name({name: p for name, p in known.items() if name in tensors or name.endswith(".weight")}, tensors)

    def load_for_training(self, folder: Path) -> None:
        self.inner.load_for_training(folder)
        copy_by_name(self._own(), load_file(folder / NORMS_FILE))
