"""Exported graphs as sessions: named tensors in, named tensors out, on the device where they lie.

ONNX Runtime and TensorRT differ in nothing else to their callers. Each session is a context manager.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from .errors import BoostDiffError, InputError

TENSORRT_FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""Each is also the name of the Python module that carries it."""

GRAPH_TYPES = {"float": torch.float32, "float16": torch.float16, "int64": torch.int64}
"""Element types of graphs, by ONNX's names."""


class Closing:
    """A context manager that is closed at its end, however that comes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held; nothing, unless a subclass says otherwise."""


class Session(Closing, ABC):
    """Executes one exported graph.

    Attributes:
        kind: "onnx" or "tensorrt".
        device: where inputs and outputs lie.
        input_types: what the graph takes.
        output_types: what it gives.
        largest_batch: what it takes at once; None is any.
    """

    kind: str
    device: torch.device
    input_types: dict[str, torch.dtype]
    output_types: dict[str, torch.dtype]
    largest_batch: int | None = None

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Execute the graph, a batch that is too large in several goes.

        Args:
            inputs: all that the graph takes, converted to its types here if need be.
            outputs: contiguous tensors of the results' shapes and types, which are written into.

        Raises:
            InputError: the graph lacks one of the inputs, or needs another.
            BoostDiffError: the execution failed.
        """
        feeds = self._feeds(inputs)
        batch = len(next(iter(feeds.values())))
        step = self.largest_batch or batch
        for start in range(0, batch, step):
            some = slice(start, start + step)
            self._execute(
                {name: tensor[some] for name, tensor in feeds.items()},
                {name: tensor[some] for name, tensor in outputs.items()},
            )

    @abstractmethod
    def _execute(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run once; see `run`."""

    def _feeds(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs, contiguous, in the graph's types and on its device.

        Raises:
            InputError: the graph lacks one of them, or needs another.
        """
        if inputs.keys() != self.input_types.keys():
            unknown = sorted(inputs.keys() - self.input_types.keys())
            missing = sorted(self.input_types.keys() - inputs.keys())
            reason = f"can't take {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
            raise InputError(f"the {self.kind} graph {reason}: it was exported from another kind of student")
        return {name: tensor.to(self.device, self.input_types[name]).contiguous() for name, tensor in inputs.items()}


def _types(described: list[Any]) -> dict[str, torch.dtype]:
    return {item.name: GRAPH_TYPES[item.type.removeprefix("tensor(").removesuffix(")")] for item in described}


class OnnxSession(Session):
    """ONNX Runtime, on the CPU or through CUDA, with inputs and outputs bound to torch memory."""

    kind = "onnx"

    def __init__(self, path: Path, *, device: torch.device, lean: bool = False) -> None:
        """Open a graph.

        Args:
            path: an ONNX file, already verified.
            device: "cpu" or "cuda".
            lean: keep no second copy of the weights, neither packed for speed nor, of an FP16 graph on a CPU, in FP32.

        Raises:
            BoostDiffError: ONNX Runtime is missing, can't use the device, or can't load the graph.
        """
        try:
            import onnxruntime
        except ImportError:
            raise BoostDiffError("ONNX Runtime is not installed: pip install 'boostdiff[cpu]' or [gpu]") from None
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type)
        if provider not in onnxruntime.get_available_providers():
            raise BoostDiffError(f"this ONNX Runtime can't run on {device.type}: pip install onnxruntime-gpu")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads of one session that wait busily for its next run would hold up the others, and torch.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        left_out = []
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
            left_out = ["ConstantFolding"]
        settings = {"device_id": device.index or 0} if device.type == "cuda" else {}
        try:
            self._session: Any = onnxruntime.InferenceSession(
                path, options, providers=[(provider, settings)], disabled_optimizers=left_out
            )
        except Exception as error:
            # The C++ side raises its own types, none of them exported under a common base.
            raise BoostDiffError(f"ONNX Runtime can't load {path}: {str(error).splitlines()[0]}") from None
        self.device = device
        self.input_types = _types(self._session.get_inputs())
        self.output_types = _types(self._session.get_outputs())
        self._binding: Any = self._session.io_binding()

    def close(self) -> None:
        """See `Session.close`."""
        self._binding = self._session = None

    def _bind(self, bind: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
        element_type = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
        bind(name, self.device.type, self.device.index or 0, element_type, tuple(tensor.shape), tensor.data_ptr())

    def _execute(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `Session.run`."""
        if self._session is None or self._binding is None:
            raise BoostDiffError("the engine is closed")
        for name, tensor in feeds.items():
            self._bind(self._binding.bind_input, name, tensor)
        for name, tensor in outputs.items():
            self._bind(self._binding.bind_output, name, tensor)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise BoostDiffError(f"ONNX Runtime failed: {reason}") from None


class TensorRTSession(Session):
    """A TensorRT plan of either flavour, through polygraphy, on CUDA tensors without host copies."""

    kind = "tensorrt"

    def __init__(self, path: Path, *, artefact: dict[str, Any]) -> None:
        """Deserialise a plan.

        Args:
            path: a plan, already verified against its manifest.
            artefact: its entry in the manifest.

        Raises:
            BoostDiffError: no GPU, the flavour is not installed, or the plan is for other hardware.
        """
        check_plan(artefact)
        load_tensorrt(artefact["flavour"])
        from polygraphy.backend.common import bytes_from_path
        from polygraphy.backend.trt import TrtRunner, engine_from_bytes

        self.device = torch.device("cuda", torch.cuda.current_device())
        self.input_types, self.output_types = (
            {name: GRAPH_TYPES[about["type"]] for name, about in artefact[side].items()}
            for side in ("inputs", "outputs")
        )
        # By input the smallest, best and largest shape; the batch comes first.
        self.largest_batch = min(largest[0] for _, _, largest in artefact["profile"].values())
        self._runner = TrtRunner(engine_from_bytes(bytes_from_path(str(path))))
        self._runner.activate()

    def close(self) -> None:
        """See `Session.close`."""
        self._runner.deactivate()

    def _execute(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `Session.run`."""
        from polygraphy.exception import PolygraphyException

        torch.cuda.current_stream(self.device).synchronize()
        try:
            results = self._runner.infer(dict(feeds), copy_outputs_to_host=False, check_inputs=False)
        except PolygraphyException as error:
            reason = str(error).strip().splitlines()[0]
            raise BoostDiffError(f"TensorRT failed, perhaps beyond the profile of its plan: {reason}") from None
        # polygraphy hands out its own buffers, which the next call overwrites.
        for name, tensor in outputs.items():
            tensor.copy_(results[name])


def load_tensorrt(flavour: str) -> Any:
    """Import one TensorRT flavour and point polygraphy at it; never both in one process.

    Raises:
        BoostDiffError: it is not installed, or the other flavour is loaded already.
    """
    (other,) = set(TENSORRT_FLAVOURS) - {flavour}
    if other in sys.modules:
        raise BoostDiffError(f"{other} is loaded already: {flavour} needs a process of its own")
    if importlib.util.find_spec(flavour) is None:
        package = "tensorrt-rtx-cu13" if flavour == "tensorrt_rtx" else "tensorrt"
        raise BoostDiffError(f"{flavour} is not installed: pip install {package}")
    # polygraphy reads this when it is first imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(flavour == "tensorrt_rtx"))
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    return importlib.import_module(flavour)


def check_plan(artefact: dict[str, Any]) -> None:
    """Refuse a plan that this machine can't run, before it is deserialised.

    Raises:
        BoostDiffError: no NVIDIA GPU, another TensorRT flavour or version, or another compute capability.
    """
    flavour = artefact.get("flavour")
    if flavour not in TENSORRT_FLAVOURS:
        raise BoostDiffError(
            f"the plan was built by {flavour!r}, which is no TensorRT flavour: export again with --trt"
        )
    if not torch.cuda.is_available():
        raise BoostDiffError("a TensorRT engine needs an NVIDIA GPU, and there is none here")
    module = load_tensorrt(flavour)
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    built = f"built by {flavour} {artefact['version']} for {', '.join(artefact['compute_capabilities'])}"
    if module.__version__ != artefact["version"]:
        raise BoostDiffError(f"the plan was {built}; here is {module.__version__}: export again with --trt")
    if here not in artefact["compute_capabilities"]:
        raise BoostDiffError(f"the plan was {built}; this GPU has {here}: export again with --trt")
