"""A denoiser recorded once as a CUDA graph and replayed: no kernel waits for Python to launch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import BoostDiffError, InputError
from .family import Family
from .runners import TorchRunner

WARM_UPS = 3
"""Calls before a recording: cuDNN and cuBLAS choose their kernels and take their workspaces in them."""

Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]


def missing_cuda(device: torch.device) -> str | None:
    """Why CUDA graphs can't be recorded on a device, or None."""
    return None if device.type == "cuda" else "CUDA graphs need an NVIDIA GPU"


def check_capturable(family: Family) -> None:
    """Refuse a family whose denoisers no CUDA graph can hold.

    Raises:
        InputError: it is one.
    """
    if not family.capturable:
        raise InputError(f"CUDA graphs can't hold the denoiser of a {family.name} model: choose another --runner")


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """A graph, and the memory that it reads and writes at every replay."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    prediction: torch.Tensor


class CapturedRunner(TorchRunner):
    """Eager torch's own kernels in a CUDA graph for each shape of the inputs.

    A recording takes a few passes, where `torch.compile` takes minutes. All graphs share one pool of memory, as only
    one is replayed at a time and predictions are copied out
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """

    name = "captured"

    def __init__(self, denoiser: Any, *, layout: torch.memory_format = torch.channels_last) -> None:
        """Wrap.

        Args:
            denoiser: its weights are put into the layout, in place; they must not be replaced from now on.
            layout: channels last is faster for one or two rows; from eight on it is a little slower, as torch's group
                normalization copies into the other order (`studies layouts`).

        Raises:
            InputError: see `check_capturable`.
            BoostDiffError: the denoiser is on no CUDA device.
        """
        super().__init__(denoiser)
        check_capturable(self.family)
        if reason := missing_cuda(self.device):
            raise BoostDiffError(reason)
        denoiser.to(memory_format=layout)
        self._recordings: dict[Shapes, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Runner.predict`; a first call with other shapes records."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))
        # Tensors that are born in inference mode could not be written to outside of it.
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            recording = self._recordings.get(shapes)
            if recording is None:
                recording = self._recordings[shapes] = self._record(inputs)
            for name, tensor in inputs.items():
                recording.inputs[name].copy_(tensor)
            recording.graph.replay()
            return recording.prediction.clone()

    def close(self) -> None:
        """See `Runner.close`."""
        self._recordings.clear()

    def _record(self, inputs: dict[str, torch.Tensor]) -> _Recording:
        static = {name: tensor.to(self.device).clone() for name, tensor in inputs.items()}
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                super().predict(static)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            prediction = super().predict(static)
        return _Recording(graph=graph, inputs=static, prediction=prediction)
