"""Runners: one denoiser, several modes of execution, one call signature.

Each is a context manager; that of a UNet can be set as `pipe.unet` in a stock diffusers pipeline. To add one, subclass
`Runner` and name it in `generate.IN_TORCH`; or, for exported graphs, `sessions.Session`, and name it in
`config.EXPORTED`, `open_session` and `unavailable`.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from .conditions import BOTH_TEXTS, PromptEmbeds, is_live
from .errors import BoostDiffError, InputError
from .families import family_of_denoiser
from .family import Family
from .manifest import Manifest, verified_file
from .sessions import OnnxSession, Session, execution_provider
from .trt import TensorRTSession, check_plan

DENOISER_OUTPUT = "out_sample"
"""Name of the prediction in an exported denoiser, as Optimum's pipelines look for a UNet's."""

MADE_BY = {
    "fp32": "--precision both",
    "fp16": "--precision both",
    "int8": "--quantize int8",
    "fp8": "--trt --quantize fp8",
}
"""Precisions of ONNX graphs, and the option of `boostdiff export` that makes them."""

QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What 8-bit graphs compute in."""


class Runner(AbstractContextManager["Runner"]):
    """Executes a denoiser.

    Attributes:
        name: name on the command line.
        family: the denoiser's family, or one that shares its class.
        config: the denoiser's configuration.
        dtype: dtype of `sample`, `encoder_hidden_states` and the prediction.
        precision: dtype that the denoiser computes in.
        device: their device.
        add_embedding: SDXL's, as far as the stock pipeline reads it.
    """

    name: str
    family: Family
    config: FrozenDict
    dtype: torch.dtype
    precision: torch.dtype
    device: torch.device
    add_embedding: Any

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what is held."""

    @abstractmethod
    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The prediction `(B, C, H, W)` for the inputs of `Family.forward`."""

    def denoise(
        self,
        z_t: torch.Tensor,
        t: torch.Tensor,
        embeds: PromptEmbeds,
        *,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict for latents `(B, C, H, W)` at a timestep, a scalar or `(B,)`, and B prompts."""
        inputs = {"sample": z_t, "timestep": t.to(self.device).expand(len(z_t)), **embeds.tensors()}
        return self.predict(inputs if timestep_cond is None else inputs | {"timestep_cond": timestep_cond})

    def __call__(
        self,
        sample: torch.Tensor | None = None,
        timestep: torch.Tensor | float = 0,
        encoder_hidden_states: torch.Tensor | None = None,
        *,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """As `UNet2DConditionModel.forward`.

        Raises:
            InputError: an argument that this runner can't honor was given.
        """
        if sample is None or encoder_hidden_states is None:
            raise InputError(
                "stock pipelines draw with UNets on a runner, not with transformers: use the Engine's call"
            )
        refused = [name for name, value in unsupported.items() if value is not None]
        if refused:
            raise InputError(f"the {self.name} runner can't take {', '.join(refused)}")
        embeds = PromptEmbeds(encoder_hidden_states=encoder_hidden_states, **(added_cond_kwargs or {}))
        prediction = self.denoise(sample, torch.as_tensor(timestep), embeds, timestep_cond=timestep_cond)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


class TorchRunner(Runner):
    """PyTorch, eager."""

    name = "torch"

    def __init__(self, denoiser: Any) -> None:
        """Wrap a denoiser of diffusers."""
        self.denoiser, self.family = denoiser, family_of_denoiser(denoiser)
        self.config, self.dtype, self.device = denoiser.config, denoiser.dtype, denoiser.device
        if hasattr(denoiser, "add_embedding"):
            self.add_embedding = denoiser.add_embedding
        self.precision = self.dtype

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.family.forward(self.denoiser, inputs)


class GraphRunner(Runner):
    """An exported graph, executed by a session."""

    def __init__(
        self, session: Session, *, family: Family, denoiser_config: dict[str, Any], precision: str | None = None
    ) -> None:
        """Take over the session of a denoiser's graph; it is closed with the runner.

        `precision` "int8" or "fp8" is for a graph that computes in another dtype than its inputs'.
        """
        self.session, self.family = session, family
        self.name, self.device = session.name, session.device
        if width := denoiser_config.get("projection_class_embeddings_input_dim"):
            # Where the stock SDXL pipeline looks for the width of its added conditions.
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self.config, self.dtype = FrozenDict(denoiser_config), session.input_types["sample"]
        self.precision = QUANTIZED.get(precision or "", self.dtype)

    def close(self) -> None:
        self.session.close()

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Runner.predict`; in the dtype of `sample`, whatever the graph's is."""
        sample = inputs["sample"]
        if is_live(self.config) and inputs["encoder_hidden_states"].shape[1] % 2:
            raise InputError(BOTH_TEXTS)
        prediction = torch.empty(sample.shape, dtype=self.dtype, device=self.device)
        self.session.run(inputs, {DENOISER_OUTPUT: prediction})
        return prediction.to(sample.dtype)


def open_session(
    name: str,
    part: str,
    *,
    folder: Path,
    manifest: Manifest,
    device: torch.device,
    precision: str | None = None,
    low_memory: bool = False,
) -> Session:
    """Open one part of an exported engine, after checking it against its manifest.

    Args:
        name: a name in `config.EXPORTED`; TensorRT needs a GPU.
        part: "unet", "transformer", "text_encoder", "text_encoder_2" or "vae_decoder".
        precision: "fp32", "fp16" or, if it was quantized, "int8" or "fp8", of an ONNX graph; None takes which of the
            first two the device is faster at, if it is there. A part other than the denoiser that has no such graph
            runs in what it has.
        low_memory: see `OnnxSession`.

    Raises:
        InputError: a file is missing or was changed, or the engine has no such precision.
        BoostDiffError: this machine can't run it.
    """
    if name == "tensorrt":
        if precision:
            raise InputError("a plan has one precision: choose it with the runner onnx alone")
        plan = f"{part}/model.plan"
        path = verified_file(folder, manifest, plan)
        return TensorRTSession(path, artefact=manifest.artefacts[plan], device=device)
    graph = chosen_graph(part, folder=folder, manifest=manifest, device=device, precision=precision)
    return OnnxSession(verified_file(folder, manifest, graph), device=device, low_memory=low_memory)


def chosen_graph(
    part: str, *, folder: Path, manifest: Manifest, device: torch.device, precision: str | None = None
) -> str:
    """The ONNX graph that `open_session` takes, as the manifest names it; an InputError where there is none."""
    if precision not in (None, *MADE_BY):
        raise InputError(f"unknown precision {precision!r}: choose {', '.join(MADE_BY)}")
    if precision == "int8" and device.type != "cpu":
        # There ONNX Runtime computes in floats between the nodes that round.
        raise InputError("precision int8 is for CPUs: choose fp16, or a TensorRT engine of `--quantize fp8`")
    graphs = {
        artefact["precision"]: path
        for path, artefact in manifest.artefacts.items()
        if path.startswith(f"{part}/") and path.endswith(".onnx")
    }
    wanted = ["fp32", "fp16"] if device.type == "cpu" else ["fp16", "fp32"]
    if precision:
        # Parts that overflow in FP16 are in FP32 alone, whatever the denoiser is in.
        wanted = [precision] if part == manifest.denoiser else [precision, *wanted]
    graph = next((graphs[each] for each in wanted if each in graphs), None)
    if graph is None:
        if not precision or not graphs:
            raise InputError(f"the engine in {folder} has no ONNX graph of the {part}: export again")
        raise InputError(
            f"the engine in {folder} has the {part} in {', '.join(sorted(graphs))} alone: "
            f"`boostdiff export {MADE_BY[precision]}` makes {precision}, too"
        )
    return graph


def unavailable(name: str, manifest: Manifest, device: torch.device) -> str | None:
    """Why a runner can't execute an exported engine on a device, or None.

    Other runners are not loaded: TensorRT takes long to import, and keeps its other flavour out of the process.
    """
    try:
        if name == "tensorrt":
            if manifest.plan not in manifest.files:
                return "the engine was exported without --trt"
            check_plan(manifest.artefacts[manifest.plan], device)
        elif name == "onnx":
            execution_provider(device)
    except BoostDiffError as error:
        return str(error)
    return None
