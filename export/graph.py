"""ONNX graphs of a UNet, straight from torch, and their comparison with the network that they came from."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import UNet2DConditionModel

from ..engine.errors import BoostDiffError
from ..engine.families import PromptEmbeds
from ..engine.runners import Runner, unet_forward

FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 3e-2
"""Largest absolute difference allowed, relative to the reference's largest value."""

OUTPUT_NAME = "noise_pred"
TRACE_BATCH = 2
"""A batch of one would be frozen into the graph."""


class _TensorOutput(torch.nn.Module):
    """The UNet with positional inputs and a plain tensor as its output."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inputs = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "text_embeds": text_embeds,
            "time_ids": time_ids,
            "timestep_cond": timestep_cond,
        }
        return unet_forward(self.unet, {name: tensor for name, tensor in inputs.items() if tensor is not None})


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's progress lines and its warnings about decompositions; errors still raise."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def onnx_from_unet(unet: UNet2DConditionModel, inputs: dict[str, torch.Tensor], path: Path) -> None:
    """Write `path` (and `path.data` beside it): dynamic batch, FP32 or FP16 as the UNet is.

    Args:
        unet: merged, in eval mode, on any device.
        inputs: example inputs with a batch of `TRACE_BATCH`, in the UNet's dtype.
        path: "…/model.onnx".

    Raises:
        BoostDiffError: the graph can't be exported, or the ONNX checker refuses it.
    """
    batch = torch.export.Dim("batch", min=1, max=256)
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                _TensorOutput(unet).eval(),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=[OUTPUT_NAME],
                dynamic_shapes={name: {0: batch} for name in inputs},
                dynamo=True,
                external_data=True,
                optimize=True,
            )
            assert program is not None
            program.save(path, external_data=True)
        onnx.checker.check_model(path)
    except Exception as error:
        # The exporter's and the checker's exceptions share no base class.
        reason = str(error).strip().splitlines()[0]
        raise BoostDiffError(f"can't export the UNet to ONNX: {type(error).__name__}: {reason}") from error


def graph_signature(path: Path) -> dict[str, dict[str, Any]]:
    """Inputs and outputs of an ONNX file: their types and shapes, without reading the weights."""
    model = onnx.load(path, load_external_data=False)

    def describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = value.type.tensor_type
        return {
            "type": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
            "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
        }

    return {
        "inputs": {value.name: describe(value) for value in model.graph.input},
        "outputs": {value.name: describe(value) for value in model.graph.output},
    }


@torch.inference_mode()
def compare(
    runner: Runner,
    *,
    reference: UNet2DConditionModel,
    inputs: dict[str, torch.Tensor],
    text: PromptEmbeds,
    batches: tuple[int, ...],
    timesteps: tuple[int, ...],
    tolerance: float,
) -> dict[str, Any]:
    """Compare an exported UNet with the merged torch UNet.

    Args:
        runner: executes the exported graph.
        reference: the merged UNet in float32.
        inputs: example inputs, cycled to each batch size.
        text: real embeddings of N prompts, cycled likewise.
        batches: batch sizes to run.
        timesteps: timesteps to run each batch at.
        tolerance: on the largest difference relative to the reference's largest value.

    Returns:
        max_abs, mean_abs, relative and cosine, the worst over all runs, and what was run.

    Raises:
        BoostDiffError: a value is not finite or beyond the tolerance; says at which batch and timestep.
    """
    worst = {"max_abs": 0.0, "mean_abs": 0.0, "relative": 0.0, "cosine": 1.0}
    for batch in batches:
        cycled = {
            name: tensor[torch.arange(batch, device=tensor.device) % len(tensor)]
            for name, tensor in (inputs | text.tensors()).items()
        }
        for t in timesteps:
            cycled["timestep"] = torch.full((batch,), t, device=cycled["sample"].device)
            expected = unet_forward(reference, cycled).double().cpu()
            got = runner.predict({name: tensor.to(runner.device) for name, tensor in cycled.items()})
            got = got.double().cpu()
            where = f"batch {batch}, timestep {t}"
            if not torch.isfinite(got).all():
                raise BoostDiffError(f"the {runner.name} engine gives NaN or Inf at {where}")
            difference = (got - expected).abs()
            relative = (difference.max() / expected.abs().max()).item()
            if relative > tolerance:
                raise BoostDiffError(
                    f"the {runner.name} engine differs from torch by {relative:.2e} of its scale at {where} "
                    f"(allowed: {tolerance:.0e})"
                )
            worst["max_abs"] = max(worst["max_abs"], difference.max().item())
            worst["mean_abs"] = max(worst["mean_abs"], difference.mean().item())
            worst["relative"] = max(worst["relative"], relative)
            cosine = torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0).item()
            worst["cosine"] = min(worst["cosine"], cosine)
    return {**worst, "tolerance": tolerance, "batches": list(batches), "timesteps": list(timesteps)}
