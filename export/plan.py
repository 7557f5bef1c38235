"""TensorRT plans from ONNX graphs, through polygraphy, in either flavour.

`tensorrt` builds on the GPU that the plan will run on. `tensorrt_rtx` (TensorRT for RTX) builds ahead of time,
without a GPU, for the compute capabilities that it is told.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import BoostDiffError
from ..engine.runners import load_tensorrt
from .graph import graph_signature

RTX_COMPUTE_CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0))
"""Ampere, Ada and Blackwell: what TensorRT for RTX serves today (Hopper is not among them)."""


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """Which TensorRT builds the plan, and why that one."""

    name: str
    reason: str


def choose_flavour() -> Flavour:
    """TensorRT where there is a GPU and it is installed, else TensorRT for RTX.

    Raises:
        BoostDiffError: neither is installed.
    """
    installed = {name: importlib.util.find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx")}
    gpu = torch.cuda.is_available()
    if gpu and installed["tensorrt"]:
        return Flavour(name="tensorrt", reason="this machine has an NVIDIA GPU and TensorRT")
    if installed["tensorrt_rtx"]:
        why = "TensorRT is not installed" if gpu else "there is no GPU here, and it builds ahead of time"
        return Flavour(name="tensorrt_rtx", reason=why)
    raise BoostDiffError(
        "no TensorRT is installed: pip install 'boostdiff[cpu]' (TensorRT for RTX, builds without a GPU) "
        "or 'boostdiff[gpu]'"
    )


def plan_from_onnx(
    graph: Path,
    plan: Path,
    *,
    flavour: Flavour,
    shapes: dict[str, tuple[int, ...]],
    batches: tuple[int, int, int],
) -> dict[str, Any]:
    """Build a strongly typed plan: its precision is the graph's own.

    Args:
        graph: an FP16 ONNX file.
        plan: where to write.
        flavour: from `choose_flavour`.
        shapes: input shapes without their batch dimension, by name.
        batches: smallest, best and largest batch of the profile.

    Returns:
        The plan's entry for the manifest.

    Raises:
        BoostDiffError: the graph can't be parsed, or the build fails.
    """
    module = load_tensorrt(flavour.name)
    from polygraphy.backend.trt import (
        CreateConfig,
        Profile,
        engine_bytes_from_network,
        network_from_onnx_path,
    )
    from polygraphy.exception import PolygraphyException

    profile = Profile()
    for name, shape in shapes.items():
        profile.add(name, *((batch, *shape) for batch in batches))
    if flavour.name == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [f"{major}.{minor}" for major, minor in RTX_COMPUTE_CAPABILITIES]
        config = CreateConfigRTX(use_gpu=False, compute_capabilities=list(RTX_COMPUTE_CAPABILITIES), profiles=[profile])
    else:
        capabilities = ["{}.{}".format(*torch.cuda.get_device_capability())]
        config = CreateConfig(profiles=[profile])
    try:
        network = network_from_onnx_path(str(graph), strongly_typed=True)
        plan.write_bytes(engine_bytes_from_network(network, config=config))
    except PolygraphyException as error:
        raise BoostDiffError(f"{flavour.name} can't build a plan from {graph.name}: {error}") from error
    return {
        "flavour": flavour.name,
        "version": module.__version__,
        "reason": flavour.reason,
        "compute_capabilities": capabilities,
        "precision": "fp16",
        "profile": {name: [[batch, *shape] for batch in batches] for name, shape in shapes.items()},
        **graph_signature(graph),
    }
