"""ONNX graphs, straight from torch, and their comparison with the modules that they came from."""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnxscript import rewriter

from ..engine.errors import BoostDiffError, one_line
from ..engine.files import is_full_disk
from ..engine.sessions import Session
from .parts import Case, Part

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators of layers with weights."""

FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 3e-2
FP8_TOLERANCE = 0.3
"""Largest absolute difference allowed, relative to the reference's largest value; FP8 is judged elsewhere."""


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 in float32 on a GPU, too: with TF32, cuDNN's default, a reference is off by ten tolerances."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings of decompositions; errors still raise."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _keep_small_terms() -> None:
    """Let onnxscript drop `x + 0` alone: it takes 1e-8 for 0, and so the ε of `x / (y + ε)`, which then is NaN."""
    # Private names: where another version has others, a graph of tiny ε shows it at its comparison.
    for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()):
        for node in getattr(rule, "_target_pattern", ()):
            for value in node.inputs:
                if value is not None and hasattr(value, "_abs_tol"):
                    value._abs_tol = 0.0


def _strip_traces(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes of which source line made each node: they hold paths, and are most of the file.

    What is kept is each layer's path in the module, before its node's name.
    """
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            if node.op_type in LAYERS and (scopes := node.metadata_props.get("pkg.torch.onnx.name_scopes")):
                # The node's own is the last.
                node.name = f"{ast.literal_eval(scopes)[-2]}/{node.name}"
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
    model.metadata_props.clear()


def onnx_from_part(part: Part, path: Path) -> None:
    """Write `path` (and `path.data` beside it) with dynamic shapes, FP32 or FP16 as the part's module is.

    Raises:
        BoostDiffError: the graph can't be exported, or the ONNX checker refuses it.
    """
    try:
        with quiet_exporter():
            _keep_small_terms()
            program = torch.onnx.export(
                part.module.eval(),
                kwargs=part.inputs,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamic_shapes=part.dynamic,
                dynamo=True,
                external_data=True,
                optimize=True,
                verbose=False,
            )
            assert program is not None
            _strip_traces(program.model)
            program.save(path, external_data=True)
        onnx.checker.check_model(path)
    except Exception as error:
        if is_full_disk(error):
            raise
        # The exporter's and the checker's exceptions share no base class.
        raise BoostDiffError(
            f"can't export the {part.name} to ONNX: {type(error).__name__}: {one_line(error)}"
        ) from error


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
def compare(session: Session, cases: Sequence[Case], *, what: str, tolerance: float) -> dict[str, Any]:
    """Compare the graph of the part `what` with what torch gives in float32.

    Returns:
        max_abs, mean_abs, relative and cosine, the worst over all cases, and the cases.

    Raises:
        BoostDiffError: a value is not finite, or the largest difference over the output's largest value is beyond the
            tolerance; says where. Or there is no case.
    """
    if not cases:
        raise BoostDiffError(f"the {what}'s {session.name} graph can't be compared with torch: no case suits it")
    worst = {"max_abs": 0.0, "mean_abs": 0.0, "relative": 0.0, "cosine": 1.0}
    for case in cases:
        results = {
            name: torch.empty(x.shape, dtype=session.output_types[name], device=session.device)
            for name, x in case.expected.items()
        }
        session.run(case.inputs, results)
        for name, expected in case.expected.items():
            got = results[name].cpu().double()
            where = f"the {what}'s {session.name} graph, {name} at {case.where},"
            if not torch.isfinite(got).all():
                raise BoostDiffError(f"{where} gives NaN or Inf")
            difference = (got - expected.double()).abs()
            relative = (difference.max() / expected.abs().max()).item()
            if not relative <= tolerance:
                raise BoostDiffError(
                    f"{where} differs from torch by {relative:.2e} of its scale (allowed: {tolerance:.0e})"
                )
            worst["max_abs"] = max(worst["max_abs"], difference.max().item())
            worst["mean_abs"] = max(worst["mean_abs"], difference.mean().item())
            worst["relative"] = max(worst["relative"], relative)
            cosine = torch.cosine_similarity(got.flatten(), expected.double().flatten(), dim=0).item()
            worst["cosine"] = min(worst["cosine"], cosine)
    return {**worst, "tolerance": tolerance, "cases": [case.where for case in cases]}
