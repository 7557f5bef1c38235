"""A UNet recorded once as a CUDA graph and replayed: no kernel waits for Python to launch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from diffusers import UNet2DConditionModel

from .errors import BoostDiffError
from .runners import TorchRunner, unet_forward

Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]


def missing_cuda(device: torch.device) -> str | None:
    """Why the captured runner can't run there, or None."""
    return None if device.type == "cuda" else "CUDA graphs need an NVIDIA GPU"


class CapturedRunner(TorchRunner):
    """Eager torch's own kernels, channels last, in a CUDA graph for each shape of the inputs.

    Recorded by `torch.cuda.make_graphed_callables`. All graphs share one pool of memory, as only one is replayed at a
    time and predictions are copied out.
    """

    name = "captured"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        """Wrap.

        Args:
            unet: its weights are put into channels-last order, in place; they must not be replaced from now on.

        Raises:
            BoostDiffError: the UNet is on no CUDA device.
        """
        super().__init__(unet)
        if reason := missing_cuda(self.device):
            raise BoostDiffError(reason)
        unet.to(memory_format=torch.channels_last)
        self._graphs: dict[Shapes, Callable[..., torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Runner.predict`."""
        names = sorted(inputs)
        given = tuple(inputs[name] for name in names)
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in zip(names, given, strict=True))
        # Tensors that are born in inference mode could not be written to outside of it.
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            if shapes not in self._graphs:

                def forward(*tensors: torch.Tensor) -> torch.Tensor:
                    return unet_forward(self.unet, dict(zip(names, tensors, strict=True)))

                # The samples become the graph's own inputs.
                samples = tuple(tensor.clone() for tensor in given)
                graphed = torch.cuda.make_graphed_callables(forward, samples, pool=self._pool)
                self._graphs[shapes] = cast("Callable[..., torch.Tensor]", graphed)
            return self._graphs[shapes](*given).clone()

    def close(self) -> None:
        """See `Runner.close`."""
        self._graphs.clear()
