"""TensorRT, full and for RTX: which of them can run a plan, and sessions that do.

The two are separate libraries of almost one interface, and can't both be loaded by one process.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import BoostDiffError, one_line
from .sessions import GRAPH_TYPES, Session
from .versions import is_installed

TENSORRT_FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""Each is also the name of its Python module."""

RTX_COMPUTE_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0))
"""Ampere, Ada and Blackwell: what plans of TensorRT for RTX are built for."""


class TensorRTSession(Session):
    """A TensorRT plan of either flavour, through polygraphy, on CUDA tensors without host copies."""

    name = "tensorrt"

    def __init__(self, path: Path, *, artefact: dict[str, Any], device: torch.device | None = None) -> None:
        """Deserialise a plan that was verified against its manifest, for a GPU or the current one.

        Raises:
            BoostDiffError: no GPU, another device, the flavour is not installed, or the plan is for other hardware.
        """
        super().__init__()
        check_plan(artefact, device)
        from polygraphy.backend.common import bytes_from_path
        from polygraphy.backend.trt import TrtRunner, engine_from_bytes
        from polygraphy.exception import PolygraphyException

        index = None if device is None else device.index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.input_types, self.output_types = (
            {name: GRAPH_TYPES[entry["type"]] for name, entry in artefact[side].items()}
            for side in ("inputs", "outputs")
        )
        # By input the smallest, best and largest shape; the batch comes first.
        profile = artefact["profile"].values()
        self.smallest_batch = max(smallest[0] for smallest, _, _ in profile)
        self.largest_batch = min(largest[0] for _, _, largest in profile)
        # TensorRT and polygraphy know no device but the current one.
        with torch.cuda.device(self.device):
            try:
                self._runner = TrtRunner(engine_from_bytes(bytes_from_path(str(path))))
                self._runner.activate()
            except PolygraphyException as error:
                raise BoostDiffError(
                    f"TensorRT can't load {path}, perhaps for too little GPU memory: {one_line(error)}"
                ) from None
            self._stream = torch.cuda.ExternalStream(self._runner.stream.ptr, self.device)

    def close(self) -> None:
        with torch.cuda.device(self.device):
            self._runner.deactivate()

    def _execute(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        from polygraphy.exception import PolygraphyException

        # Behind what makes the inputs, and what still copies the last results. polygraphy itself waits for its stream
        # before it returns, so that results can be read and inputs freed at once.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.device(self.device):
                results = self._runner.infer(dict(feeds), copy_outputs_to_host=False, check_inputs=False)
        except PolygraphyException as error:
            raise BoostDiffError(
                f"TensorRT failed, perhaps beyond the profile of its plan: {one_line(error)}"
            ) from None
        # polygraphy hands out buffers that the next call overwrites.
        for name, tensor in outputs.items():
            tensor.copy_(results[name])


def load_tensorrt(flavour: str) -> Any:
    """Import one TensorRT flavour and point polygraphy at it; never both in one process.

    Raises:
        BoostDiffError: it is not installed, or the other flavour is loaded already.
    """
    (other,) = set(TENSORRT_FLAVOURS) - {flavour}
    if other in sys.modules:
        raise BoostDiffError(f"{other} is loaded already: run {flavour} in another process")
    if not is_installed(flavour):
        package = "tensorrt-rtx-cu13" if flavour == "tensorrt_rtx" else "tensorrt"
        raise BoostDiffError(f"{flavour} is not installed: pip install {package}")
    # polygraphy reads this when it is first imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(flavour == "tensorrt_rtx"))
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    return importlib.import_module(flavour)


def check_plan(artefact: dict[str, Any], device: torch.device | None = None) -> None:
    """Refuse a plan that a device can't run, before TensorRT is loaded or the plan deserialised.

    `artefact` is the plan's entry in the manifest; without a device the current GPU is meant.

    Raises:
        BoostDiffError: no NVIDIA GPU, another TensorRT flavour or version, or another compute capability.
    """
    flavour = artefact.get("flavour")
    if flavour not in TENSORRT_FLAVOURS:
        raise BoostDiffError(
            f"the plan was built by {flavour!r}, which is no TensorRT flavour: export again with --trt"
        )
    if device is not None and device.type != "cuda":
        raise BoostDiffError(f"a TensorRT engine needs an NVIDIA GPU, and the device is {device.type}")
    if not torch.cuda.is_available():
        raise BoostDiffError("a TensorRT engine needs an NVIDIA GPU, and there is none here")
    module = load_tensorrt(flavour)
    capability = torch.cuda.get_device_capability(device)
    here = "{}.{}".format(*capability)
    advice = "export again with --trt"
    if flavour == "tensorrt_rtx" and capability not in RTX_COMPUTE_CAPABILITIES:
        advice = "TensorRT for RTX builds none for it, export here with --trt-flavour tensorrt"
    built = f"built by {flavour} {artefact['version']} for {', '.join(artefact['compute_capabilities'])}"
    if module.__version__ != artefact["version"]:
        raise BoostDiffError(f"the plan was {built}; here is {module.__version__}: {advice}")
    if here not in artefact["compute_capabilities"]:
        raise BoostDiffError(f"the plan was {built}; this GPU has {here}: {advice}")
