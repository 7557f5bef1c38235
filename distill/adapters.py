"""Adapters: what is trained while the UNet stays frozen.

Teacher and student share one UNet: `disabled()` turns it back into the teacher for as long as the block lasts.
To add one, subclass `Adapter` and give it a row in `make_adapter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ..engine.student import ADAPTER_NAME, BITFIT_FILE, LORA_FILE

METHODS = ("lora", "bitfit")
ATTENTION_PROJECTIONS = ("to_k", "to_out.0", "to_q", "to_v")


class Adapter(ABC):
    """Trainable float32 parameters on a frozen UNet of any precision; run it under autocast if that is a lower one."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    @abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, in a fixed order."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the UNet is the teacher, bit for bit."""

    @abstractmethod
    def save(self, folder: Path, pipeline: DiffusionPipeline) -> Path:
        """Write the adapter as safetensors into a folder and return the file."""

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over weights by name.

        Raises:
            ValueError: names or shapes are not this adapter's.
        """
        parameters = self.parameters()
        if weights.keys() != parameters.keys():
            raise ValueError("the checkpoint is of another adapter")
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(weights[name])


class Lora(Adapter):
    """LoRA (Hu et al. 2021) on the attention projections, through peft; alpha equals the rank."""

    def __init__(self, unet: UNet2DConditionModel, rank: int) -> None:
        super().__init__(unet)
        self.rank = rank
        self.config = LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(ATTENTION_PROJECTIONS)
        )
        unet.add_adapter(self.config, adapter_name=ADAPTER_NAME)
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """See `Adapter.parameters`."""
        return {name: p for name, p in self.unet.named_parameters() if ".lora_" in name}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Adapter.disabled`."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> Path:
        """Write the file that diffusers' `load_lora_weights` reads."""
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(self.unet, adapter_name=ADAPTER_NAME),
            weight_name=LORA_FILE,
            # One metadata key only: safetensors writes several in random order, and equal runs must give equal bytes.
            # Nothing is lost: without metadata diffusers takes alpha to be the rank, which it is.
            save_function=lambda weights, path: save_file(weights, path, metadata={"format": "pt"}),
        )
        return folder / LORA_FILE


class BitFit(Adapter):
    """BitFit (Ben Zaken et al. 2022): every bias of the UNet is trained, nothing else."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        for module in unet.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                # Normalisation wants scale and bias of one precision.
                module.float()
        self._base = {}
        for name, parameter in self.parameters().items():
            self._base[name] = parameter.data
            # A copy, and in float32 whatever the frozen weights are in: half precision loses small updates.
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """See `Adapter.parameters`."""
        return {name: p for name, p in self.unet.named_parameters() if name.endswith(".bias")}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Adapter.disabled`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters().items():
            parameter.data, self._base[name] = self._base[name], parameter.data

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> Path:
        """Write every bias by its name; `boostdiff.engine.student.load_biases` reads it."""
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in self.parameters().items()},
            folder / BITFIT_FILE,
        )
        return folder / BITFIT_FILE


def make_adapter(method: str, unet: UNet2DConditionModel, *, rank: int) -> Adapter:
    """Put a new adapter on a frozen UNet; its initial weights come from torch's default generator."""
    return Lora(unet, rank) if method == "lora" else BitFit(unet)
