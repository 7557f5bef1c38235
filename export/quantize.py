"""8-bit UNets: a graph with Q/DQ nodes, by ONNX Runtime, but for layers that a measurement excludes.

Q/DQ nodes stand around layers, which stay as they are: runtimes fuse both to 8-bit kernels. INT8 is for ONNX Runtime on
CPUs and starts from the FP32 graph; FP8 is for TensorRT and starts from the FP16 graph.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ..engine.errors import BoostDiffError, one_line
from ..engine.files import is_full_disk
from ..engine.guidance_term import r2_of, total_sum_of_squares
from ..engine.manifest import Manifest
from ..engine.memory import give_back_memory
from ..engine.runners import GraphRunner
from ..engine.sessions import OnnxSession
from .calibration import Calibration
from .eight_bits import FP8, INT8, MAX_VALUE, Scheme
from .graph import LAYERS, graph_signature, quiet_exporter

BUDGET = 0.01
"""Layers are excluded, the worst first, until the errors of the others add up to no more; see `_error`."""
ERROR_LIMIT, R2_LIMIT = 0.02, 0.02
"""Largest error of the whole graph, and largest loss of R² of the guidance term."""


def layers_of(graph: Path) -> dict[str, list[str]]:
    """Layers with weights: the nodes of each, by the module's path in the UNet."""
    model = onnx.load(graph, load_external_data=False).graph
    weights = {tensor.name for tensor in model.initializer}
    layers: dict[str, list[str]] = {}
    for node in model.node:
        if node.op_type in LAYERS and weights & set(node.input[:2]):
            layers.setdefault(node.name.split("/")[0].removeprefix("denoiser."), []).append(node.name)
    return layers


def quantized(
    graph: Path,
    output: Path,
    nodes: Sequence[str],
    states: Sequence[dict[str, torch.Tensor]],
    *,
    scheme: Scheme = INT8,
) -> Path:
    """Write `output`, and its weights beside it, with these nodes of a graph of the scheme's `source` in 8 bits.

    The ranges are calibrated on `states`, inputs of the graph.

    Raises:
        BoostDiffError: ONNX Runtime can't.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    types = {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in onnx.load(graph, load_external_data=False).graph.input
    }
    activations = QuantType.QUInt8 if scheme is INT8 else QuantType.QInt8

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.states = iter(states)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            state = next(self.states, None)
            if state is None:
                return None
            return {name: tensor.contiguous().numpy().astype(types[name]) for name, tensor in state.items()}

    try:
        # As `quantize_static`, which holds the weights three times over while it calibrates.
        with quiet_exporter(), tempfile.TemporaryDirectory(dir=output.parent) as folder:
            augmented = f"{folder}/model.onnx"
            calibrator = create_calibrator(graph, list(LAYERS), augmented, use_external_data_format=True)
            calibrator.model = None
            calibrator.infer_session = _calibrating_session(augmented)
            give_back_memory()
            calibrator.collect_data(Reader())
            ranges = calibrator.compute_data()
            del calibrator
            give_back_memory()
            quantizer = QDQQuantizer(
                load_model_with_shape_infer(graph),
                per_channel=True,
                reduce_range=scheme.reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=activations,
                tensors_range=ranges,
                nodes_to_quantize=list(nodes),
                nodes_to_exclude=[],
                op_types_to_quantize=list(LAYERS),
                extra_options=scheme.options,
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(output, use_external_data_format=True)
            del quantizer
        if scheme is FP8:
            _as_fp8(output)
        onnx.checker.check_model(output)
    except Exception as error:
        if is_full_disk(error):
            raise
        # ONNX Runtime's exceptions share no base class.
        raise BoostDiffError(f"can't quantize {graph.parent.name}/{graph.name}: {one_line(error)}") from error
    return output


def _calibrating_session(graph: str) -> Any:
    """A session that lets go of activations once their ranges are known, in place of the calibrator's own.

    That one computes the ranges last, and so holds all activations of a state (docs/export.md has what it took).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _as_fp8(path: Path) -> None:
    """Turn a graph's symmetric int8 Q/DQ nodes into FP8 of the same ranges, which ONNX Runtime's quantizer can't make.

    Weights become FP8 numbers, in place of the node that would make them.
    """
    model = onnx.load(path)
    graph, fp8 = model.graph, onnx.TensorProto.FLOAT8E4M3FN
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, onnx.TensorProto] = {}
    weights: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        source, scale, _ = node.input
        if scale not in made:
            of_int8 = onnx.numpy_helper.to_array(constants[scale])
            converted = of_int8.astype(np.float32) * (MAX_VALUE["int8"] / MAX_VALUE["fp8"])
            # What is always zero has the smallest scale there is.
            converted = np.maximum(converted, np.finfo(of_int8.dtype).smallest_subnormal).astype(of_int8.dtype)
            made[scale] = onnx.numpy_helper.from_array(converted, scale)
        shape = list(made[scale].dims)
        node.input[2] = zero = f"fp8_zero_{'x'.join(map(str, shape))}"
        made[zero] = onnx.helper.make_tensor(zero, fp8, shape, bytes(math.prod(shape)), raw=True)
        if node.op_type == "QuantizeLinear" and source in constants:
            weight = torch.tensor(onnx.numpy_helper.to_array(constants[source])).float()
            scales = torch.tensor(onnx.numpy_helper.to_array(made[scale])).float()
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            numbers = (weight.movedim(axis, -1) / scales).movedim(-1, axis).clamp(-MAX_VALUE["fp8"], MAX_VALUE["fp8"])
            content = numbers.to(torch.float8_e4m3fn).contiguous().view(torch.uint8).numpy().tobytes()
            weights[node.output[0]] = name = f"{node.output[0]}_fp8"
            made[name] = onnx.helper.make_tensor(name, fp8, list(weight.shape), content, raw=True)
    nodes = [node for node in graph.node if node.output[0] not in weights]
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = weights.get(name, name)
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for name, tensor in (constants | made).items() if name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data.name)


def _judged(
    graph: Path, calibration: Calibration, manifest: Manifest, *, low_memory: bool
) -> tuple[list[torch.Tensor], float]:
    """A graph's predictions at the checked states, and its R² of the guidance term; see `OnnxSession`."""
    with OnnxSession(graph, device=torch.device("cpu"), low_memory=low_memory) as session:
        runner = GraphRunner(session, family=calibration.family, denoiser_config=manifest.denoiser_config)
        made = calibration.predictions(manifest.distilled.denoiser(runner))
    # The states are in the order that they were predicted in.
    predictions = iter(made)
    r2 = r2_of(lambda z_t, t, text: next(predictions).to(z_t), calibration.checked, calibration.text)
    return made, r2


def _error(made: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], total: float) -> float:
    """Σ‖ε̂_8 − ε̂‖² / Σ‖ε̂_1 − ε̂_w‖², of which the denominator is `total`."""
    pairs = zip(made, expected, strict=True)
    error = sum((got.double() - before.double()).square().sum().item() for got, before in pairs) / total
    return error if math.isfinite(error) else math.inf


def excluded_layers(errors: Mapping[str, torch.Tensor], budget: float) -> list[str]:
    """Layers to leave as they are, the worst first, so that the others cost at most the budget together.

    The cost is the square of the length of the sum of their `errors`, see `layer_errors`.
    """
    order = sorted(errors, key=lambda name: -_cost(errors[name]))
    best_first = torch.stack([errors[name].double() for name in reversed(order)])
    within = (best_first.cumsum(0).square().sum(1) <= budget).nonzero()
    return order[: len(order) - (int(within[-1]) + 1 if len(within) else 0)]


def _cost(error: torch.Tensor) -> float:
    """Of one layer alone; infinite where a number overflowed."""
    cost = error.double().square().sum().item()
    return cost if math.isfinite(cost) else math.inf


def quantize_unet(
    graph: Path,
    manifest: Manifest,
    calibration: Calibration,
    errors: Mapping[str, torch.Tensor],
    *,
    large: bool,
    scheme: Scheme = INT8,
) -> dict[str, Any]:
    """Make `model.int8.onnx` or `model.fp8.onnx` beside the UNet's graph, and judge it; gives the manifest's entry.

    Args:
        graph: the UNet's, in the scheme's `source`.
        errors: what each layer costs in 8 bits, see `layer_errors`; those that cost most stay as they are.
        large: whether memory is short, see `OnnxSession`.

    Raises:
        BoostDiffError: it can't be made, or is outside of its limits.
    """
    # What is multiplied by a parameter of no layer, as by a live student's slopes, has not been measured.
    layers = {name: nodes for name, nodes in layers_of(graph).items() if name in errors}
    errors = {name: errors[name] for name in layers}
    excluded = excluded_layers(errors, BUDGET)
    if len(excluded) == len(layers):
        raise BoostDiffError("no layer of the UNet can be quantized within the limits: leave --quantize out")
    expected, r2_before = _judged(graph, calibration, manifest, low_memory=large)
    give_back_memory()
    chosen = [name for name in layers if name not in excluded]
    nodes = [node for name in chosen for node in layers[name]]
    output = graph.with_name(f"model.{scheme.precision}.onnx")
    quantized(graph, output, nodes, calibration.states, scheme=scheme)
    give_back_memory()
    made, r2 = _judged(output, calibration, manifest, low_memory=large)
    error = _error(made, expected, total_sum_of_squares(calibration.checked))
    check = {"error": error, "r2": r2, "r2_before": r2_before, "r2_loss": r2_before - r2}
    allowed = {"error": ERROR_LIMIT, "r2_loss": R2_LIMIT}
    if wrong := [name for name, limit in allowed.items() if not check[name] <= limit]:
        beyond = " and ".join(f"{name} {check[name]:.3f} (allowed: {allowed[name]:g})" for name in wrong)
        raise BoostDiffError(f"the 8-bit UNet is outside of its limits, on the guidance term's scale: {beyond}")
    return {
        "precision": scheme.precision,
        "weights": scheme.weights,
        "activations": scheme.activations,
        "kept": {name: _cost(errors[name]) for name in excluded},
        "quantized": {name: _cost(errors[name]) for name in chosen},
        "calibration": calibration.described(),
        "check": check | {"allowed": allowed},
        **graph_signature(output),
    }
