"""Exported graphs as sessions: named tensors in, named tensors out, on the device where they lie.

ONNX Runtime and TensorRT (`trt`) differ in nothing else to their callers. Each session is a context manager.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import BoostDiffError, InputError, one_line

GRAPH_TYPES = {"float": torch.float32, "float16": torch.float16, "int64": torch.int64}
"""Element types of graphs, by ONNX's names."""


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""What executes graphs for ONNX Runtime, by the type of the device."""


class Session(AbstractContextManager["Session"]):
    """Executes one exported graph.

    Attributes:
        kind: "onnx", "onnx-tensorrt" or "tensorrt".
        device: where inputs and outputs lie.
        input_types: what the graph takes.
        output_types: what it gives.
        smallest_batch: what it takes at least.
        largest_batch: what it takes at once; None is any.
    """

    kind: str
    device: torch.device
    input_types: dict[str, torch.dtype]
    output_types: dict[str, torch.dtype]
    smallest_batch: int = 1
    largest_batch: int | None = None

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held."""

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Execute the graph, a batch that is too large in several runs, one that is too small filled up.

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
            rows = slice(start, min(start + step, batch))
            execute = self._execute if rows.stop - start >= self.smallest_batch else self._execute_filled
            execute(
                {name: tensor[rows] for name, tensor in feeds.items()},
                {name: tensor[rows] for name, tensor in outputs.items()},
            )

    def _execute_filled(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run once with rows repeated up to `smallest_batch`; what they give is dropped."""
        size, filled = len(next(iter(feeds.values()))), self.smallest_batch
        rows = torch.arange(filled, device=self.device) % size
        results = {name: tensor.new_empty(filled, *tensor.shape[1:]) for name, tensor in outputs.items()}
        self._execute({name: tensor[rows] for name, tensor in feeds.items()}, results)
        for name, tensor in outputs.items():
            tensor.copy_(results[name][:size])

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
            raise InputError(f"the {self.kind} graph {reason}: it was exported from a student with other inputs")
        return {name: tensor.to(self.device, self.input_types[name]).contiguous() for name, tensor in inputs.items()}


def _types(described: list[Any]) -> dict[str, torch.dtype]:
    return {item.name: GRAPH_TYPES[item.type.removeprefix("tensor(").removesuffix(")")] for item in described}


def execution_provider(device: torch.device, *, tensorrt: bool = False) -> str:
    """The name of what executes a graph for ONNX Runtime.

    Raises:
        BoostDiffError: ONNX Runtime is missing, or can't use the device.
    """
    try:
        import onnxruntime
    except ImportError:
        raise BoostDiffError("ONNX Runtime is not installed: pip install 'boostdiff[cpu]' or [gpu]") from None
    if tensorrt and device.type != "cuda":
        raise BoostDiffError("TensorRT in ONNX Runtime needs an NVIDIA GPU")
    provider = "TensorrtExecutionProvider" if tensorrt else PROVIDERS.get(device.type, f"any for {device.type}")
    if provider not in onnxruntime.get_available_providers():
        raise BoostDiffError(
            f"this ONNX Runtime can't run on {device.type}{' by TensorRT' if tensorrt else ''}: "
            "pip install onnxruntime-gpu in the place of onnxruntime"
        )
    return provider


class OnnxSession(Session):
    """ONNX Runtime with inputs and outputs bound to torch memory: on the CPU, through CUDA, or TensorRT within it."""

    def __init__(
        self, path: Path, *, device: torch.device, lean: bool = False, tensorrt_engines: Path | None = None
    ) -> None:
        """Open a graph.

        Args:
            path: an ONNX file, already verified.
            device: "cpu" or "cuda".
            lean: keep no second copy of the weights, neither packed for speed nor, of an FP16 graph on a CPU, in FP32.
            tensorrt_engines: where ONNX Runtime's TensorRT provider keeps the engines that it builds when it meets new
                shapes: a folder of these weights alone, as it tells graphs apart by their structure; None runs without.

        Raises:
            BoostDiffError: ONNX Runtime is missing, can't use the device, or can't load the graph.
        """
        provider = execution_provider(device, tensorrt=tensorrt_engines is not None)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads of one session that wait busily for its next run would hold up the others, and torch.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        left_out = []
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
            # The one would cast weights, the other write those of convolutions in an order of its own.
            left_out = ["ConstantFolding", "NchwcTransformer"]
        on_gpu = {"device_id": device.index or 0} if device.type == "cuda" else {}
        providers: list[tuple[str, dict[str, Any]]] = [(provider, on_gpu)]
        if tensorrt_engines is not None:
            kept = {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(tensorrt_engines)}
            # What TensorRT can't take runs on CUDA.
            providers = [(provider, on_gpu | kept), (PROVIDERS["cuda"], on_gpu)]
        try:
            self._session: Any = onnxruntime.InferenceSession(
                path, options, providers=providers, disabled_optimizers=left_out
            )
        except Exception as error:
            # The C++ side raises its own types, none of them exported under a common base.
            raise BoostDiffError(f"ONNX Runtime can't load {path}: {one_line(error)}") from None
        if provider not in self._session.get_providers():
            # It continues by itself, slower, where a library of CUDA or TensorRT is missing.
            used = self._session.get_providers()[0]
            raise BoostDiffError(f"ONNX Runtime could not start {provider} and took {used}: is CUDA's cuDNN installed?")
        self.kind = "onnx" if tensorrt_engines is None else "onnx-tensorrt"
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
            raise BoostDiffError(f"ONNX Runtime failed: {one_line(error)}") from None
