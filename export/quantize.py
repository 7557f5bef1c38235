"""8-bit UNets: the FP32 graph with Q/DQ nodes, by ONNX Runtime, but for layers that a measurement keeps.

Q/DQ nodes stand around layers, which stay as they are: runtimes fuse both to 8-bit kernels.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ..engine.errors import BoostDiffError, InputError, one_line
from ..engine.family import Family
from ..engine.files import is_full_disk
from ..engine.guidance_term import r2_of, scale_of
from ..engine.manifest import Manifest
from ..engine.memory import give_back_memory
from ..engine.runners import GraphRunner
from ..engine.sessions import OnnxSession
from ..engine.student import Distilled
from .calibration import Calibration
from .graph import LAYERS, graph_signature, quiet_exporter

BUDGET = 0.01
"""Layers are kept, the worst first, until the errors of the others add up to no more; see `Judge.error`."""
ERROR_LIMIT, R2_LIMIT = 0.02, 0.02
"""Largest error of the whole graph, and largest loss of R² of the guidance term."""

GROUPS = (
    (r"^(time_embedding|add_embedding)\..*|.*\.time_emb_proj$", "time embeddings"),
    (r"\.attn2\.to_[kv]$", ".attn2.to_k, to_v"),
    (r"\.(attn[12])\.to_\w+(\.0)?$", r".\1"),
    (r"\.ff\..*", ".ff"),
    (r"\.proj_(in|out)$", ".proj"),
)
"""Layers that are measured together: patterns of their names, and the group's name."""


def layers_of(graph: Path) -> dict[str, list[str]]:
    """Layers with weights: the nodes of each, by the module's path in the UNet."""
    model = onnx.load(graph, load_external_data=False).graph
    weights = {tensor.name for tensor in model.initializer}
    layers: dict[str, list[str]] = {}
    for node in model.node:
        if node.op_type in LAYERS and weights & set(node.input[:2]):
            layers.setdefault(node.name.split("/")[0].removeprefix("denoiser."), []).append(node.name)
    return layers


def groups_of(layers: Iterable[str], *, coarse: bool = False) -> dict[str, list[str]]:
    """Layers by the group that is measured as one; coarse, for large UNets, those of a kind in a block together."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        name = layer
        for pattern, replacement in GROUPS:
            name = re.sub(pattern, replacement, name)
        if coarse:
            name = re.sub(r"\.(resnets|attentions)\.\d+(\.transformer_blocks\.\d+)?", "", name)
        groups.setdefault(name, []).append(layer)
    return groups


def quantized(
    graph: Path, output: Path, nodes: Sequence[str], states: Sequence[dict[str, torch.Tensor]], *, ranges: Path
) -> Path:
    """Write `output` with these nodes in 8 bits: int8 weights per channel, uint8 activations.

    Weights have 7 bits: without VNNI, a CPU's 8-bit products of 8-bit weights saturate.

    Args:
        graph: FP32.
        output: the graph; its weights go beside it.
        nodes: names.
        states: inputs to calibrate on.
        ranges: file of the activations' ranges, made if it isn't there.

    Raises:
        BoostDiffError: ONNX Runtime can't.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.states = iter(states)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            state = next(self.states, None)
            return None if state is None else {name: tensor.contiguous().numpy() for name, tensor in state.items()}

    try:
        with quiet_exporter():
            quantize_static(
                graph,
                output,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(LAYERS),
                nodes_to_quantize=list(nodes),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                calibration_cache_path=ranges,
            )
        onnx.checker.check_model(output)
    except Exception as error:
        if is_full_disk(error):
            raise
        # ONNX Runtime's exceptions share no base class.
        raise BoostDiffError(f"can't quantize {graph.parent.name}/{graph.name}: {one_line(error)}") from error
    return output


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Measures graphs against the FP32 graph, on the scale of the guidance term.

    Attributes:
        calibration: the states.
        student: gives the denoiser.
        family: the model's family.
        denoiser_config: the UNet's configuration.
        expected: the FP32 graph's predictions.
        r2: the FP32 graph's R².
        lean: see `OnnxSession`.
    """

    calibration: Calibration
    student: Distilled
    family: Family
    denoiser_config: dict[str, Any]
    expected: list[torch.Tensor]
    r2: float
    lean: bool

    @classmethod
    def of(cls, graph: Path, calibration: Calibration, manifest: Manifest, *, lean: bool) -> Judge:
        """By the FP32 graph."""
        judge = cls(
            calibration=calibration,
            student=manifest.distilled,
            family=calibration.family,
            denoiser_config=manifest.denoiser_config,
            expected=[],
            r2=math.nan,
            lean=lean,
        )
        if not scale_of(calibration.checked):
            raise InputError("8 bits are judged by what guidance changes, and this student's guidance changes nothing")
        expected, r2 = judge._of(graph)
        return cls(**{**vars(judge), "expected": expected, "r2": r2})

    def _of(self, graph: Path) -> tuple[list[torch.Tensor], float]:
        with OnnxSession(graph, device=torch.device("cpu"), lean=self.lean) as session:
            denoiser = self.student.denoiser(
                GraphRunner(session, family=self.family, denoiser_config=self.denoiser_config)
            )
            predictions = iter(made := self.calibration.predictions(denoiser))
        # The states are in the order that they were predicted in.
        r2 = r2_of(lambda z_t, t, text: next(predictions).to(z_t), self.calibration.checked, self.calibration.text)
        return made, r2

    def measured(self, graph: Path) -> tuple[float, float]:
        """A graph's error, Σ‖ε̂_8 − ε̂_32‖² / Σ‖ε̂_1 − ε̂_w‖², and its R² of the guidance term."""
        predictions, r2 = self._of(graph)
        pairs = zip(predictions, self.expected, strict=True)
        error = sum((got.double() - expected.double()).square().sum().item() for got, expected in pairs)
        error /= scale_of(self.calibration.checked)
        return (error if math.isfinite(error) else math.inf), r2


def kept_groups(errors: dict[str, float], budget: float) -> list[str]:
    """Groups to keep in FP32, the worst first, so that the others' errors add up to at most the budget."""
    kept = sorted(errors, key=lambda name: -errors[name])
    rest = 0.0
    while kept and (rest := rest + errors[kept[-1]]) <= budget:
        kept.pop()
    return kept


def quantize_unet(folder: Path, manifest: Manifest, calibration: Calibration, *, large: bool) -> dict[str, Any]:
    """Make `unet/model.int8.onnx` of an engine that has `unet/model.onnx`, and judge it; gives the manifest's entry.

    Each group of layers is quantized alone and measured; those that cost most stay in FP32.

    Raises:
        BoostDiffError: it can't be made, or is outside of its limits.
    """
    graph = folder / "unet" / "model.onnx"
    layers = layers_of(graph)
    groups = groups_of(layers, coarse=large)
    judge = Judge.of(graph, calibration, manifest, lean=large)

    def nodes(names: Iterable[str]) -> list[str]:
        return [node for name in names for layer in groups[name] for node in layers[layer]]

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        trial, ranges = Path(scratch) / "trial.onnx", Path(scratch) / "ranges.json"

        def alone(name: str) -> float:
            quantized(graph, trial, nodes([name]), calibration.states, ranges=ranges)
            return judge.measured(trial)[0]

        errors = {name: alone(name) for name in groups}
        kept = kept_groups(errors, BUDGET)
        if len(kept) == len(groups):
            raise BoostDiffError("no layer of the UNet can be quantized within the limits: leave --quantize out")
        chosen = [name for name in groups if name not in kept]
        output = quantized(graph, graph.with_name("model.int8.onnx"), nodes(chosen), calibration.states, ranges=ranges)
    give_back_memory()
    error, r2 = judge.measured(output)
    check = {"error": error, "r2": r2, "r2_fp32": judge.r2, "r2_loss": judge.r2 - r2}
    allowed = {"error": ERROR_LIMIT, "r2_loss": R2_LIMIT}
    if wrong := [name for name, limit in allowed.items() if not check[name] <= limit]:
        beyond = " and ".join(f"{name} {check[name]:.3f} (allowed: {allowed[name]:g})" for name in wrong)
        raise BoostDiffError(f"the 8-bit UNet is outside of its limits, on the guidance term's scale: {beyond}")
    return {
        "precision": "int8",
        "weights": "int8, 7 bits, per channel",
        "activations": "uint8, per tensor",
        "kept": {name: errors[name] for name in kept},
        "quantized": {name: errors[name] for name in chosen},
        "calibration": calibration.described(),
        "check": check | {"allowed": allowed},
        **graph_signature(output),
    }
