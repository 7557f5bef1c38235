"""Exported graphs as sessions: named tensors in, named tensors out, on the device where they lie.

ONNX Runtime and TensorRT (`trt`) differ in nothing else to their callers. Each session is a context manager.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import BoostDiffError, InputError, one_line
from .versions import to_install

GRAPH_TYPES = {"float": torch.float32, "float16": torch.float16, "int64": torch.int64}
"""Element types of graphs, by ONNX's names."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's execution providers, by the type of the device."""


class Session(AbstractContextManager["Session"]):
    """Executes one exported graph; several threads may share it, and take turns.

    Attributes:
        name: the runner's name: "onnx" or "tensorrt".
        device: device of inputs and outputs.
        input_types: dtypes of the inputs by name.
        output_types: dtypes of the outputs by name.
        smallest_batch: smallest batch of one run.
        largest_batch: largest batch of one run; None is any.
    """

    name: str
    device: torch.device
    input_types: dict[str, torch.dtype]
    output_types: dict[str, torch.dtype]
    smallest_batch: int = 1
    largest_batch: int | None = None

    def __init__(self) -> None:
        # Between binding tensors and running, another thread's would take their place.
        self._turn = threading.Lock()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held."""

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Execute the graph, a batch that is too large in several runs, one that is too small padded with its rows.

        Args:
            inputs: all inputs, converted to the graph's types here if need be.
            outputs: contiguous tensors of the results' shapes and types, which are written into.

        Raises:
            InputError: an input is missing, or the graph has no such input.
            BoostDiffError: the execution failed.
        """
        if inputs.keys() != self.input_types.keys():
            unknown = sorted(inputs.keys() - self.input_types.keys())
            missing = sorted(self.input_types.keys() - inputs.keys())
            reason = f"can't take {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
            raise InputError(f"the {self.name} graph {reason}: it was exported from a student with other inputs")
        feeds = {name: x.to(self.device, self.input_types[name]).contiguous() for name, x in inputs.items()}
        batch = len(next(iter(feeds.values())))
        step = self.largest_batch or batch
        with self._turn:
            for start in range(0, batch, step):
                rows = slice(start, min(start + step, batch))
                size = rows.stop - start
                part = {name: tensor[rows] for name, tensor in feeds.items()}
                results = {name: tensor[rows] for name, tensor in outputs.items()}
                if size >= self.smallest_batch:
                    self._execute(part, results)
                    continue
                repeated = torch.arange(self.smallest_batch, device=self.device) % size
                padded = {name: tensor.new_empty(len(repeated), *tensor.shape[1:]) for name, tensor in results.items()}
                self._execute({name: tensor[repeated] for name, tensor in part.items()}, padded)
                for name, tensor in results.items():
                    tensor.copy_(padded[name][:size])

    @abstractmethod
    def _execute(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run once, in this thread's turn; see `run`."""


def execution_provider(device: torch.device) -> str:
    """The name of ONNX Runtime's execution provider for a device.

    Raises:
        BoostDiffError: ONNX Runtime is missing, or can't use the device.
    """
    try:
        import onnxruntime
    except ImportError:
        raise BoostDiffError(f"ONNX Runtime is not installed: {to_install('cpu', 'gpu')}") from None
    provider = PROVIDERS.get(device.type, "")
    if provider not in onnxruntime.get_available_providers():
        advice = "pip install onnxruntime-gpu in the place of onnxruntime" if provider else "choose --device cpu"
        raise BoostDiffError(f"this ONNX Runtime can't run on {device.type}: {advice}")
    return provider


class OnnxSession(Session):
    """ONNX Runtime with inputs and outputs bound to torch memory, on the CPU or through CUDA."""

    name = "onnx"

    def __init__(self, path: Path, *, device: torch.device, low_memory: bool = False) -> None:
        """Open a graph that was verified, on a CPU or through CUDA.

        `low_memory` keeps no second copy of the weights, packed for speed or, of an FP16 graph on a CPU, in FP32.

        Raises:
            BoostDiffError: ONNX Runtime is missing, can't use the device, or can't load the graph.
        """
        super().__init__()
        provider = execution_provider(device)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if path.name.endswith(".fp8.onnx"):
            # It has no kernels to fuse these into, and moves them to where FP8 may not be.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        # Threads of one session that wait busily for its next run would hold up the others, and torch.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        left_out = []
        if low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
            # The one would cast weights, the other write those of convolutions in another order.
            left_out = ["ConstantFolding", "NchwcTransformer"]
        on_gpu = {"device_id": device.index or 0} if device.type == "cuda" else {}
        try:
            self._session: Any = onnxruntime.InferenceSession(
                path, options, providers=[(provider, on_gpu)], disabled_optimizers=left_out
            )
        except Exception as error:
            # The C++ side raises types that share no exported base class.
            raise BoostDiffError(f"ONNX Runtime can't load {path}: {one_line(error)}") from None
        if provider not in self._session.get_providers():
            # It continues by itself, slower, where a library of CUDA is missing.
            used = self._session.get_providers()[0]
            raise BoostDiffError(f"ONNX Runtime could not start {provider} and took {used}: is CUDA's cuDNN installed?")
        self.device = device
        self.input_types, self.output_types = (
            {item.name: GRAPH_TYPES[item.type.removeprefix("tensor(").removesuffix(")")] for item in described}
            for described in (self._session.get_inputs(), self._session.get_outputs())
        )
        self._binding: Any = self._session.io_binding()

    def close(self) -> None:
        self._binding = self._session = None

    def _bind(self, bind: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
        element_type = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
        bind(name, self.device.type, self.device.index or 0, element_type, tuple(tensor.shape), tensor.data_ptr())

    def _execute(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        if self._session is None:
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
