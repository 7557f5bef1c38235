"""TensorRT plans from ONNX graphs, through polygraphy, by either backend.

`tensorrt` builds on the GPU that the plan will run on. `tensorrt_rtx` (TensorRT for RTX) builds ahead of time,
without a GPU, for given compute capabilities.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import BoostDiffError, one_line
from ..engine.terminal import quiet_libraries
from ..engine.trt import RTX_COMPUTE_CAPABILITIES, TENSORRT_FLAVOURS, load_tensorrt
from ..engine.versions import is_installed, to_install
from .graph import graph_signature

FP8_CAPABILITY = (8, 9)
"""Smallest compute capability with FP8."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Which TensorRT builds the plan, and why that one."""

    name: str
    reason: str


def choose_backend(forced: str | None = None, *, fp8: bool = False) -> Backend:
    """The one that the user wants; else TensorRT where there is a GPU and it is installed, or TensorRT for RTX.

    Raises:
        BoostDiffError: neither is installed, or the wanted one can't build here, or not with FP8.
    """
    backend = _choose_backend(forced)
    if fp8 and backend.name == "tensorrt" and (here := torch.cuda.get_device_capability()) < FP8_CAPABILITY:
        raise BoostDiffError(
            "FP8 needs a GPU of compute capability {}.{} or newer; this one has {}.{}".format(*FP8_CAPABILITY, *here)
        )
    return backend


def _choose_backend(forced: str | None) -> Backend:
    installed = {name: is_installed(name) for name in TENSORRT_FLAVOURS}
    gpu = torch.cuda.is_available()
    if forced == "tensorrt" and not gpu:
        raise BoostDiffError(
            "tensorrt builds on the GPU that will run the plan, and there is none here: use tensorrt_rtx"
        )
    if forced:
        load_tensorrt(forced)
        return Backend(name=forced, reason="asked for by --trt-flavour")
    if gpu and installed["tensorrt"]:
        return Backend(name="tensorrt", reason="this machine has an NVIDIA GPU and TensorRT")
    if installed["tensorrt_rtx"]:
        why = "TensorRT is not installed" if gpu else "there is no GPU here, and it builds ahead of time"
        return Backend(name="tensorrt_rtx", reason=why)
    raise BoostDiffError(
        "no TensorRT is installed (the extra cpu has TensorRT for RTX, which builds without a GPU): "
        f"{to_install('cpu', 'gpu')}"
    )


def plan_from_onnx(
    graph: Path, plan: Path, *, backend: Backend, profile: dict[str, list[tuple[int, ...]]], fp8: bool = False
) -> dict[str, Any]:
    """Build a strongly typed plan, whose precision is the graph's; gives its entry for the manifest.

    `profile` is the smallest, best and largest shape of each input; `fp8`, whether the graph has FP8 layers.

    Raises:
        BoostDiffError: the graph can't be parsed, or the build fails.
    """
    module = load_tensorrt(backend.name)
    from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    shapes = Profile()
    for name, (smallest, best, largest) in profile.items():
        shapes.add(name, smallest, best, largest)
    if backend.name == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        built_for = [each for each in RTX_COMPUTE_CAPABILITIES if not fp8 or each >= FP8_CAPABILITY]
        capabilities = [f"{major}.{minor}" for major, minor in built_for]
        config = CreateConfigRTX(use_gpu=False, compute_capabilities=built_for, profiles=[shapes])
    else:
        capabilities = ["{}.{}".format(*torch.cuda.get_device_capability())]
        config = CreateConfig(profiles=[shapes])
    try:
        network = network_from_onnx_path(str(graph), strongly_typed=True)
        plan.write_bytes(engine_bytes_from_network(network, config=config))
    except PolygraphyException as error:
        raise BoostDiffError(f"{backend.name} can't build a plan from {graph.name}: {one_line(error)}") from error
    return {
        "flavour": backend.name,
        "version": module.__version__,
        "reason": backend.reason,
        "compute_capabilities": capabilities,
        "profile": {name: [list(shape) for shape in three] for name, three in profile.items()},
        **graph_signature(graph),
    }


def plan_in_a_process(graph: Path, plan: Path, *, backend: Backend, **options: Any) -> dict[str, Any]:
    """As `plan_from_onnx`, in a separate process: what a large build took returns to the system with it.

    Raises:
        BoostDiffError: see `plan_from_onnx`; or the process died, as one that is out of memory does.
    """
    # TensorRT builds for the current GPU, TensorRT for RTX needs none.
    gpu = torch.cuda.current_device() if backend.name == "tensorrt" else None
    with ProcessPoolExecutor(1, get_context("spawn"), quiet_libraries) as processes:
        try:
            return processes.submit(_plan_on, gpu, graph, plan, backend=backend, **options).result()
        except BrokenProcessPool:
            raise BoostDiffError(f"{backend.name} died while it built the {plan.parent.name}'s plan") from None


def _plan_on(gpu: int | None, graph: Path, plan: Path, **options: Any) -> dict[str, Any]:
    if gpu is not None:
        torch.cuda.set_device(gpu)
    return plan_from_onnx(graph, plan, **options)
