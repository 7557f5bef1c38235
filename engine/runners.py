"""Runners: one UNet, several ways to execute it, one call signature.

Each is a context manager and can be set as `pipe.unet` in a stock diffusers pipeline. To add one, subclass
`Runner` and give it a row in `available_runners`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from .errors import BoostDiffError, InputError
from .manifest import Manifest, verified_file

TENSORRT_FLAVOURS = ("tensorrt", "tensorrt_rtx")
"""Each is also the name of the Python module that carries it."""


class Runner(ABC):
    """Executes a UNet.

    Attributes:
        name: as the command line knows it.
        config: the UNet's configuration.
        dtype: of `sample`, `encoder_hidden_states` and the prediction.
        device: where they lie.
        input_names: what an exported graph takes.
    """

    name: str
    config: FrozenDict
    dtype: torch.dtype
    device: torch.device
    input_names: Set[str]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what the runner holds."""

    @abstractmethod
    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run once.

        Args:
            inputs: `sample` `(B, C, H, W)`, `timestep` `(B,)`, `encoder_hidden_states` `(B, L, D)`; for a student that
                takes its guidance as an input `timestep_cond` `(B, E)`; for SDXL `text_embeds` and `time_ids`.

        Returns:
            `(B, C, H, W)`.
        """

    def feeds(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs of an exported graph, contiguous and in its dtypes.

        Raises:
            InputError: the graph lacks one of them, or needs another.
        """
        if inputs.keys() != self.input_names:
            unknown, missing = sorted(inputs.keys() - self.input_names), sorted(self.input_names - inputs.keys())
            reason = f"can't take {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
            raise InputError(f"the {self.name} runner {reason}: its graph was exported from another kind of student")
        return {
            name: tensor.to(torch.int64 if name == "timestep" else self.dtype).contiguous()
            for name, tensor in inputs.items()
        }

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        *,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """As `UNet2DConditionModel.forward`.

        Raises:
            InputError: an argument that this runner can't honour was given.
        """
        given = [name for name, value in unsupported.items() if value is not None]
        if given:
            raise InputError(f"the {self.name} runner can't take {', '.join(given)}")
        t = torch.as_tensor(timestep, device=self.device)
        inputs = {
            "sample": sample,
            "timestep": t.expand(len(sample)),
            "encoder_hidden_states": encoder_hidden_states,
            **(added_cond_kwargs or {}),
        }
        if timestep_cond is not None:
            inputs["timestep_cond"] = timestep_cond
        prediction = self.predict(inputs)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def unet_forward(unet: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Call a diffusers UNet with a runner's inputs, see `Runner.predict`."""
    plain = ("sample", "timestep", "encoder_hidden_states", "timestep_cond")
    arguments: dict[str, Any] = {name: inputs[name] for name in plain if name in inputs}
    added = {name: tensor for name, tensor in inputs.items() if name not in plain}
    return unet(**arguments, added_cond_kwargs=added or None, return_dict=False)[0]


class TorchRunner(Runner):
    """PyTorch, eager."""

    name = "torch"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Runner.predict`."""
        return unet_forward(self.unet, inputs)


class OnnxRunner(Runner):
    """ONNX Runtime, on the CPU or through CUDA, with inputs and outputs bound to torch memory."""

    name = "onnx"

    def __init__(self, path: Path, *, unet_config: dict[str, Any], device: torch.device) -> None:
        """Open a graph.

        Args:
            path: `unet/model.onnx`, already verified.
            unet_config: the UNet's configuration.
            device: "cpu" or "cuda".

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
        try:
            self.session = onnxruntime.InferenceSession(
                path,
                options,
                providers=[(provider, {"device_id": device.index or 0} if device.type == "cuda" else {})],
            )
        except Exception as error:
            # The C++ side raises its own types, none of them exported under a common base.
            raise BoostDiffError(f"ONNX Runtime can't load {path}: {str(error).splitlines()[0]}") from None
        self.config, self.device = FrozenDict(unet_config), device
        types = {item.name: item.type for item in self.session.get_inputs()}
        self.dtype = torch.float16 if types["sample"] == "tensor(float16)" else torch.float32
        self.input_names = set(types)
        self._binding = self.session.io_binding()

    def close(self) -> None:
        """See `Runner.close`."""
        del self._binding, self.session

    def _bind(self, bind: Callable[..., None], name: str, tensor: torch.Tensor) -> None:
        element_type = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
        bind(name, self.device.type, self.device.index or 0, element_type, tuple(tensor.shape), tensor.data_ptr())

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Runner.predict`."""
        feeds = self.feeds(inputs)
        prediction = torch.empty_like(feeds["sample"])
        for name, tensor in feeds.items():
            self._bind(self._binding.bind_input, name, tensor)
        self._bind(self._binding.bind_output, "noise_pred", prediction)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(self._binding)
        return prediction


class TensorRTRunner(Runner):
    """A TensorRT plan of either flavour, through polygraphy, on CUDA tensors without host copies."""

    name = "tensorrt"

    def __init__(self, path: Path, *, artefact: dict[str, Any], unet_config: dict[str, Any]) -> None:
        """Deserialise a plan.

        Args:
            path: `unet/model.plan`, already verified against its manifest.
            artefact: the plan's entry in the manifest.
            unet_config: the UNet's configuration.

        Raises:
            BoostDiffError: no GPU, the flavour is not installed, or the plan is for other hardware.
        """
        check_plan(artefact)
        load_tensorrt(artefact["flavour"])
        from polygraphy.backend.common import bytes_from_path
        from polygraphy.backend.trt import TrtRunner, engine_from_bytes

        self.config, self.dtype = FrozenDict(unet_config), torch.float16
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._runner = TrtRunner(engine_from_bytes(bytes_from_path(str(path))))
        self._runner.activate()
        self.input_names = set(self._runner.get_input_metadata())

    def close(self) -> None:
        """See `Runner.close`."""
        self._runner.deactivate()

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Runner.predict`."""
        feeds = self.feeds(inputs)
        torch.cuda.current_stream(self.device).synchronize()
        outputs = self._runner.infer(feeds, copy_outputs_to_host=False, check_inputs=False)
        # polygraphy hands out its own buffer, which the next call overwrites.
        return outputs["noise_pred"].clone()


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
        BoostDiffError: no NVIDIA GPU, another TensorRT version, or another compute capability.
    """
    if not torch.cuda.is_available():
        raise BoostDiffError("a TensorRT engine needs an NVIDIA GPU, and there is none here")
    module = load_tensorrt(artefact["flavour"])
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    built = f"built by {artefact['flavour']} {artefact['version']} for {', '.join(artefact['compute_capabilities'])}"
    if module.__version__ != artefact["version"]:
        raise BoostDiffError(f"the plan was {built}; here is {module.__version__}: export again with --trt")
    if here not in artefact["compute_capabilities"]:
        raise BoostDiffError(f"the plan was {built}; this GPU has {here}: export again with --trt")


def open_exported(name: str, *, folder: Path, manifest: Manifest, device: torch.device) -> Runner:
    """Open a runner on an exported engine, after checking it against its manifest.

    Args:
        name: "onnx" or "tensorrt".
        folder: the engine folder.
        manifest: its manifest.
        device: for ONNX Runtime.

    Raises:
        InputError: a file is missing or was changed.
        BoostDiffError: this machine can't run it.
    """
    if name == "onnx":
        path = verified_file(folder, manifest, "unet/model.onnx")
        return OnnxRunner(path, unet_config=manifest.unet_config, device=device)
    path = verified_file(folder, manifest, "unet/model.plan")
    return TensorRTRunner(path, artefact=manifest.artefacts["unet/model.plan"], unet_config=manifest.unet_config)


def available_runners(manifest: Manifest, device: torch.device) -> dict[str, str | None]:
    """Which runners can execute an exported engine here: the reason against each, or None."""
    reasons: dict[str, str | None] = {"torch": None}
    if importlib.util.find_spec("onnxruntime") is None:
        reasons["onnx"] = "ONNX Runtime is not installed"
    else:
        import onnxruntime

        provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        listed = provider in onnxruntime.get_available_providers()
        reasons["onnx"] = None if listed else f"ONNX Runtime has no {provider}"
    if "unet/model.plan" not in manifest.files:
        reasons["tensorrt"] = "the engine was exported without --trt"
    else:
        try:
            check_plan(manifest.artefacts["unet/model.plan"])
            reasons["tensorrt"] = None
        except BoostDiffError as error:
            reasons["tensorrt"] = str(error)
    return reasons
