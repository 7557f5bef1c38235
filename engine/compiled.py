"""A denoiser compiled by `torch.compile` for the machine it runs on."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config as inductor_config
from diffusers.models.attention_processor import AttnProcessor

from .model import Model, set_attention
from .runners import TorchRunner
from .versions import is_installed

RECOMPILATIONS = 64
"""Graphs that dynamo keeps of one function: one for each denoiser and batch size; its default of 8 is too small."""

PLAIN_ATTENTION = 32
"""Side of the largest latents whose attention runs as plain matrix products; beyond, scores take too much memory."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        # Older torch can't tell, and float32 is never wrong.
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def use_plain_attention(denoiser: Any) -> None:
    """Run a small UNet's attention as matrix products, which a CPU does faster in bfloat16 than the fused kernel.

    On `emoji64`, 18.2 ms against 22.6 per compiled pass of 8 images, and distillation 82 against 68 images per second.
    """
    sizes = denoiser.config.get("sample_size")
    if sizes and max([sizes] if isinstance(sizes, int) else sizes) <= PLAIN_ATTENTION:
        set_attention(denoiser, AttnProcessor())


def with_bfloat16_vae(model: Model) -> Model:
    """The model for a compiled denoiser: on a CPU with bfloat16 instructions it gets a VAE in that, channels last
    but for one of videos.

    On `emoji64` 14 ms per batch of 8 against 48; compiled too, it would gain 5% more. Images differ by 0.25/255 in the
    mean. Elsewhere it is the model itself.
    """
    vae = model.pipeline.vae
    if model.device.type != "cpu" or vae.dtype != torch.float32 or not has_bfloat16(model.device):
        return model
    vae = copy.deepcopy(vae)
    torch.nn.Module.to(vae, torch.bfloat16)
    pipeline = copy.copy(model.pipeline)
    pipeline.vae = vae if model.family.video_vae else vae.to(memory_format=torch.channels_last)
    return replace(model, pipeline=pipeline)


def missing_compiler(device: torch.device) -> str | None:
    """What `torch.compile` lacks on this machine, or None."""
    if device.type == "cuda":
        return None if is_installed("triton") else "torch.compile needs triton"
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    available = any(shutil.which(name) for name in compilers if name)
    return None if available else "torch.compile needs a C++ compiler"


def _compile(denoiser: torch.nn.Module, *, backend: str, mode: str | None = None) -> Any:
    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    return torch.compile(denoiser, backend=backend, mode=mode, dynamic=False)


_without_warnings = partial(warnings.catch_warnings, action="ignore")
"""Dynamo's warnings of diffusers' code help no user."""

QUIET: dict[str, Any] = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
"""Inductor's settings, or it prints every form of a product that max-autotune times."""


class CompiledRunner(TorchRunner):
    """The denoiser through `torch.compile`, compiled for each batch size.

    On CUDA in mode max-autotune, with CUDA graphs, channels last. On a CPU that has bfloat16 instructions, a copy of
    the denoiser in bfloat16, channels last; inputs and predictions keep their dtype. There weights are part of the code
    (Inductor's `freezing`): a pass of 8 images of `emoji64` takes 22.7 ms in place of 27.3.
    """

    name = "compiled"

    def __init__(
        self,
        denoiser: Any,
        *,
        batches: Sequence[int] = (),
        backend: str = "inductor",
        freezing: bool = True,
        max_autotune: bool = False,
    ) -> None:
        """Wrap; the first call with each batch size compiles, which takes from half a minute to many.

        Args:
            denoiser: on CUDA its weights are put into channels-last order, in place; elsewhere it stays as it is.
            batches: sizes to compile for: others are filled up to the next of these, and compiled for beyond them.
            backend: of `torch.compile`.
            freezing: whether code on a CPU holds the weights; without, all denoisers of one architecture share it.
            max_autotune: whether Inductor times several forms of each matrix product on a CPU, too.
        """
        super().__init__(denoiser)
        self.batches, self.freezing = sorted(batches), freezing
        self._graphs = self.device.type == "cuda" and backend == "inductor"
        self.precision = self.dtype
        if self.device.type == "cpu" and self.dtype == torch.float32 and has_bfloat16(self.device):
            self.precision = torch.bfloat16
            denoiser = copy.deepcopy(denoiser)
            # Of torch, not diffusers, whose `to` warns of layers to be kept in float32 that this one hasn't.
            torch.nn.Module.to(denoiser, torch.bfloat16)
            denoiser.to(memory_format=torch.channels_last)
            use_plain_attention(denoiser)
        if self._graphs:
            denoiser.to(memory_format=torch.channels_last)
        tuned = "max-autotune" if self._graphs else "max-autotune-no-cudagraphs"
        self.denoiser = _compile(denoiser, backend=backend, mode=tuned if self._graphs or max_autotune else None)

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = len(inputs["sample"])
        filled = next((size for size in self.batches if size >= batch), batch)
        if filled > batch:
            rows = torch.arange(filled, device=self.device) % batch
            inputs = {name: tensor[rows] for name, tensor in inputs.items()}
        if self.precision != self.dtype:
            inputs = {
                name: tensor.to(self.precision) if tensor.is_floating_point() and name != "timestep" else tensor
                for name, tensor in inputs.items()
            }
        if not self._graphs:
            with torch.no_grad(), _without_warnings(), inductor_config.patch(freezing=self.freezing, **QUIET):
                return super().predict(inputs)[:batch].to(self.dtype)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode(False), torch.no_grad(), _without_warnings(), inductor_config.patch(**QUIET):
            # Tensors born in inference mode are another type to dynamo, which would compile once more for them.
            copies = {name: tensor.clone() for name, tensor in inputs.items()}
            # The next replay of the graph overwrites its output.
            return super().predict(copies)[:batch].clone()


class TrainingRunner(TorchRunner):
    """The denoiser with its adapter through `torch.compile`, gradients included.

    There is code for each batch size, and for the adapter on and off. The denoiser itself becomes channels last. CUDA
    graphs have no part in it: their next replay overwrites activations that the backward pass needs.
    """

    name = "compiled"

    def __init__(self, denoiser: Any, *, backend: str = "inductor") -> None:
        """Wrap; the first call compiles, and so does the first backward pass, minutes each."""
        super().__init__(denoiser)
        denoiser.to(memory_format=torch.channels_last)
        self.denoiser = _compile(denoiser, backend=backend)

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with _without_warnings():
            return super().predict(inputs)
