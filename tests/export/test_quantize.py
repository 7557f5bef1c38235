"""The UNet in 8 bits: what is written, what it is judged by, and what is refused."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine import embedded
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.families import FAMILIES
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance import SinglePassDenoiser
from boostdiff.engine.manifest import Manifest, read_manifest
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.runners import GraphRunner, chosen_graph
from boostdiff.engine.sessions import OnnxSession
from boostdiff.engine.student import read_student
from boostdiff.export import quantize
from boostdiff.export.calibration import Calibration, calibration_prompts
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from boostdiff.export.plan import Backend, choose_backend
from boostdiff.export.quantize import excluded_layers, layers_of, quantize_unet
from tiny import CPU, PROMPTS, graphs_of, shared

Quantize = Callable[..., Manifest]

SD = FAMILIES["StableDiffusionPipeline"]


@pytest.fixture(scope="module")
def quantized(
    engines: dict[str, Path],
    tiny_folder: Path,
    students: dict[str, Path],
    prompt_file: Path,
) -> Quantize:
    """An export of the LoRA in 8 bits, from the graphs that are there; a random model's guidance term is minute."""

    def run(
        output: Path,
        *,
        budget: float = 1e9,
        limit: float = 1e9,
        precision: str = "int8",
        student: Path = students["lora"],
        **options: Any,
    ) -> Manifest:
        config = ExportConfig(quantize=precision, trt=precision == "fp8", calibration_prompts=prompt_file, **options)
        with pytest.MonkeyPatch.context() as patch:
            if student == students["lora"] and not options:
                patch.setattr("boostdiff.export.export.onnx_from_part", graphs_of(engines["lora"]))
            patch.setattr(quantize, "BUDGET", budget)
            for name in ("ERROR_LIMIT", "R2_LIMIT"):
                patch.setattr(quantize, name, limit)
            tolerances = {"fp32": 1e-3, "fp16": 3e-2, "int8": 0.2, "fp8": 0.2}
            patch.setattr("boostdiff.export.whole.LATENT_TOLERANCE", tolerances)
            return export(locate(str(tiny_folder)), config, student=student, output=output, device="cpu")

    return run


@pytest.fixture(scope="module")
def engine(quantized: Quantize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "int8", lambda folder: quantized(folder / "engine")) / "engine"


@pytest.fixture(scope="module")
def fp8_engine(quantized: Quantize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "fp8", lambda folder: quantized(folder / "engine", precision="fp8")) / "engine"


def test_the_manifest_says_what_was_kept_and_on_what_it_was_calibrated(engine: Path) -> None:
    manifest = read_manifest(engine)
    entry, files = manifest.artefacts["unet/model.int8.onnx"], manifest.files
    assert {"unet/model.onnx", "unet/model.int8.onnx", "unet/model.int8.onnx.data"} <= files.keys()
    assert entry["precision"] == "int8"
    assert not entry["kept"]
    assert all(error >= 0 for error in entry["quantized"].values())
    # Two prompts of four are left to calibrate on, at 16 steps.
    assert entry["calibration"]["states"] >= 16
    assert entry["check"]["error"] > 0
    assert entry["check"]["r2_before"] - entry["check"]["r2"] == pytest.approx(entry["check"]["r2_loss"])
    assert entry["inputs"] == manifest.artefacts["unet/model.onnx"]["inputs"]
    assert "calibration_prompts" in manifest.inputs
    assert "calibration_prompts" not in manifest.options
    assert manifest.pipeline["onnx int8"]["latents"] > manifest.pipeline["onnx fp32"]["latents"]


@pytest.mark.slow
def test_a_live_student_at_another_size_than_the_models(
    quantized: Quantize, tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    """Its slopes over the timestep are parameters of no layer; the teacher is judged at the size of the graph."""
    config = DistillConfig(negative_prompt="live", prompts=prompt_file, updates=2, batch_size=2)
    student, silent = tmp_path / "student", Observers(preview=False)
    distill(tiny_files, config, output=student, device="cpu", observers=silent)
    manifest = quantized(tmp_path / "engine", student=student, size=(32, 32, 32))
    entry = manifest.artefacts["unet/model.int8.onnx"]
    assert entry["quantized"]
    assert not any("processor" in name for name in entry["quantized"])
    assert entry["check"]["error"] > 0
    with Engine.load(tmp_path / "engine", precision="int8") as engine:
        assert engine(PROMPTS[0], negative_prompt="blurry", steps=2)[0].size == (32, 32)


def test_weights_are_8_bit_numbers_per_channel(engine: Path) -> None:
    graph = onnx.load(engine / "unet/model.int8.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    conv = next(node for node in graph.node if node.op_type == "Conv" and "conv_in" in node.name)
    source = next(node for node in graph.node if conv.input[1] in node.output)
    weight, scale = (onnx.numpy_helper.to_array(weights[name]) for name in source.input[:2])
    assert source.op_type == "DequantizeLinear"
    assert weight.dtype == np.int8
    assert scale.shape == (len(weight),)
    assert 32 < np.abs(weight).max() <= 64
    assert (engine / "unet/model.int8.onnx.data").stat().st_size < (engine / "unet/model.onnx.data").stat().st_size / 2


def test_fp8_graphs_hold_fp8_numbers_on_the_scale_of_the_fp16_weights(fp8_engine: Path) -> None:
    folder = fp8_engine / "unet"
    graph, before = (onnx.load(folder / f"model.{name}.onnx").graph for name in ("fp8", "fp16"))
    made_by = {output: node for node in graph.node for output in node.output}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in (*before.initializer, *graph.initializer)}
    layers = {node.name: node for node in before.node if node.op_type in ("Conv", "MatMul", "Gemm")}
    seen = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or made_by[node.input[1]].op_type != "DequantizeLinear":
            continue
        dequantize = made_by[node.input[1]]
        numbers, scale, zero = (values[name] for name in dequantize.input)
        assert numbers.dtype == zero.dtype == ml_dtypes.float8_e4m3fn
        assert made_by[node.input[0]].op_type == "DequantizeLinear"
        axis = next(attribute.i for attribute in dequantize.attribute if attribute.name == "axis") % numbers.ndim
        along = [-1 if each == axis else 1 for each in range(numbers.ndim)]
        got = numbers.astype(np.float32) * scale.astype(np.float32).reshape(along)
        weight = values[layers[node.name].input[1]].astype(np.float32)
        # Three bits of mantissa round by a sixteenth at most; below the smallest normal number, by half of its step.
        assert (np.abs(got - weight) <= np.abs(weight) / 16 + scale.astype(np.float32).reshape(along) * 2**-9).all()
        assert np.abs(numbers.astype(np.float32)).max() > 400
        seen += 1
    assert seen > 20
    sizes = {name: (folder / f"model.{name}.onnx.data").stat().st_size for name in ("fp8", "fp16")}
    assert sizes["fp8"] < 0.75 * sizes["fp16"]


def test_fp8_plans_are_for_gpus_that_have_it(fp8_engine: Path) -> None:
    manifest = read_manifest(fp8_engine)
    plans = {name: entry for name, entry in manifest.artefacts.items() if name.endswith(".plan")}
    assert plans["unet/model.plan"]["precision"] == "fp8"
    assert plans["unet/model.plan"]["compute_capabilities"] == ["8.9", "12.0"]
    others = {entry["precision"] for name, entry in plans.items() if name != "unet/model.plan"}
    assert others == {"fp16"}
    assert manifest.pipeline["onnx fp8"]["latents"] > manifest.pipeline["onnx fp16"]["latents"]
    with Engine.load(fp8_engine, precision="fp8", runner="onnx", device="cpu") as opened:
        assert opened.model.denoiser.precision == torch.float8_e4m3fn
        opened(PROMPTS[0], steps=2)


def test_fp8_is_refused_on_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boostdiff.export.plan._choose_backend", lambda forced: Backend(name="tensorrt", reason=""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(BoostDiffError, match=r"FP8 needs a GPU of compute capability 8\.9 or newer; this one has 8\.6"):
        choose_backend(fp8=True)
    assert choose_backend().name == "tensorrt"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_backend(fp8=True).name == "tensorrt"


def test_it_takes_batches_of_any_size(engine: Path, tiny: Model) -> None:
    inputs = tiny.family.example_inputs(tiny.pipeline, 3)
    config = read_manifest(engine).denoiser_config
    session = partial(OnnxSession, device=CPU)
    with (
        GraphRunner(session(engine / "unet/model.onnx"), family=SD, denoiser_config=config) as full,
        GraphRunner(session(engine / "unet/model.int8.onnx"), family=SD, denoiser_config=config) as small,
    ):
        whole = small.predict(inputs)
        rows = [small.predict({name: tensor[i : i + 1] for name, tensor in inputs.items()}) for i in range(3)]
        expected = full.predict(inputs)
    assert (whole - torch.cat(rows)).norm() < 0.05 * whole.norm()
    # All layers are in 8 bits here, the first and the last, too.
    assert 0 < (whole - expected).norm() < 0.4 * expected.norm()


def test_images_are_drawn_in_8_bits(engine: Path, tmp_path: Path) -> None:
    with Engine.load(engine, precision="int8", device="cpu") as opened:
        assert opened.model.denoiser.precision == torch.int8
        assert opened.model.denoiser.dtype == torch.float32
        (image,) = opened(PROMPTS[0], steps=2)
    (path,) = draw(
        None,
        GenerateConfig(prompts=[PROMPTS[0]], runner="onnx", precision="int8", engine=engine, steps=2),
        output=tmp_path / "images",
        device="cpu",
    )
    assert path.exists()
    assert image.size == (16, 16)


def test_an_engine_without_8_bits_says_how_to_make_them(engines: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"the unet in fp16, fp32 alone: `boostdiff export --quantize int8` makes"):
        Engine.load(engines["lora"], runner="onnx", precision="int8", device="cpu")


def test_layers_are_named_after_their_modules(engine: Path, tiny: Model) -> None:
    layers = layers_of(engine / "unet/model.onnx")
    modules = {name for name, module in tiny.denoiser.named_modules() if getattr(module, "weight", None) is not None}
    assert layers.keys() <= modules
    assert {"conv_in", "conv_out", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"} <= layers.keys()
    # Attention's products have no weights, and norms are no layers here.
    assert not any("norm" in name or name.endswith(("attn1", "attn2")) for name in layers)


def test_the_worst_are_kept_until_the_rest_is_within_the_budget() -> None:
    def kept(budget: float, **errors: list[float]) -> list[str]:
        return excluded_layers({name: torch.tensor(error) for name, error in errors.items()}, budget)

    # Apart from each other, as squares: 0.25, 0.0004, 0.04, 0.01, 0.
    alone = {"a": [0.5, 0, 0], "b": [0, 0.02, 0], "c": [0, 0, 0.2], "d": [0, 0.1, 0], "e": [0.0, 0, 0]}
    assert kept(0.05, **alone) == ["a", "c"]
    assert kept(0.0005, **alone) == ["a", "c", "d"]
    assert kept(1.0, **alone) == []
    assert kept(0.0, a=[0.5, 0], b=[0.5, 0.1]) == ["b", "a"]
    # Errors that go the same way add up; those that go opposite ways cancel.
    assert kept(0.03, a=[0.1, 0.0], b=[0.11, 0.0]) == ["b"]
    assert kept(0.03, a=[0.1, 0.0], b=[-0.11, 0.0]) == []
    assert kept(1.0, a=[math.inf, 0.0], b=[0.0, 0.0]) == ["a"]
    assert kept(1.0, a=[math.nan, 0.0], b=[0.0, 0.0]) == ["a"]


def test_beyond_the_limits_nothing_is_replaced(quantized: Quantize, engines: dict[str, Path], tmp_path: Path) -> None:
    standing = shutil.copytree(engines["lora"], tmp_path / "engine")
    before = (standing / "manifest.json").read_bytes()
    with pytest.raises(BoostDiffError, match=r"outside of its limits.*error [\d.]+ \(allowed: 1e-06\)") as failed:
        quantized(standing, limit=1e-6)
    assert failed.value.exit_code == 1
    assert (standing / "manifest.json").read_bytes() == before
    assert not (standing / "unet/model.int8.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_where_no_layer_can_be_quantized(engine: Path, tiny: Model, students: dict[str, Path]) -> None:
    calibration = Calibration.of_teacher(tiny, PROMPTS, read_student(students["lora"]))
    errors = {name: torch.ones(3) for name in layers_of(engine / "unet/model.onnx")}
    with pytest.raises(BoostDiffError, match="no layer of the UNet can be quantized within the limits"):
        quantize_unet(engine / "unet/model.onnx", read_manifest(engine), calibration, errors, large=False)


@pytest.mark.parametrize(
    ("few_steps", "spacing", "expected"), [(None, "leading", 16 + 4), (3, "leading", 16 + 3), (None, "trailing", 16)]
)
def test_eight_bits_are_calibrated_and_judged_at_the_last_timestep_too(
    tiny_folder: Path, tmp_path: Path, students: dict[str, Path], few_steps: int | None, spacing: str, expected: int
) -> None:
    """Sampling of trailing timesteps begins there, and few-step students have their own steps alone."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": spacing}))
    model = load(locate(str(folder)), device=torch.device("cpu"))
    info = replace(read_student(students["lora"]), steps=few_steps)
    calibration = Calibration.of_teacher(model, PROMPTS, info)
    calibration.add_states(model, SinglePassDenoiser, None, few_steps)
    seen = [int(state["timestep"][0]) for state in calibration.states]
    assert len(seen) == expected
    assert max(seen) == 999
    judged = {int(state.t) for state in calibration.checked}
    if spacing == "leading":
        assert max(judged) == 999
    if few_steps:
        assert {999, 666, 332} <= set(seen)
        assert {999, 332} <= judged


def test_without_guidance_there_is_nothing_to_measure_by(tiny: Model, students: dict[str, Path]) -> None:
    # An interval between two of the steps: every prediction is the unguided one to the last bit.
    never = {"guidance_interval": "0.01:0.02"}
    info = replace(read_student(students["lora"]), guider="interval", guider_settings=never)
    with pytest.raises(BoostDiffError, match="guidance changes nothing in this model"):
        Calibration.of_teacher(tiny, PROMPTS, info)


def test_other_models_need_calibration_prompts(
    tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*args: object, **options: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("boostdiff.export.export.load", loads)
    with pytest.raises(InputError, match="pass --calibration-prompts FILE"):
        export(
            tiny_files,
            ExportConfig(quantize="int8"),
            student=students["lora"],
            output=tmp_path / "engine",
            device="cpu",
        )
    with pytest.raises(InputError, match=r"missing\.txt"):
        export(
            tiny_files,
            ExportConfig(quantize="int8", calibration_prompts=tmp_path / "missing.txt"),
            student=students["lora"],
            output=tmp_path / "engine",
            device="cpu",
        )
    assert len(calibration_prompts(ExportConfig(quantize="int8"), locate(embedded.MODEL_NAME))) > 100


def test_a_range_of_guidance_is_refused(
    tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = replace(read_student(students["lora"]), guidance_range=(1.5, 5.0))
    monkeypatch.setattr("boostdiff.export.export.read_student", lambda *arguments: info)
    with pytest.raises(InputError, match="8 bits are judged at one guidance scale"):
        export(
            tiny_files,
            ExportConfig(quantize="int8"),
            student=students["lora"],
            output=tmp_path / "engine",
            device="cpu",
        )


def test_int8_is_for_cpus(engine: Path) -> None:
    with pytest.raises(InputError, match="precision int8 is for CPUs"):
        chosen_graph(
            "unet", folder=engine, manifest=read_manifest(engine), device=torch.device("cuda"), precision="int8"
        )


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="starts from the FP32 graph"):
        ExportConfig(quantize="int8", precision="fp16")
    with pytest.raises(InputError, match="calibration-prompts is not used without --quantize"):
        ExportConfig(calibration_prompts=Path("prompts.txt"))
    with pytest.raises(InputError, match="starts from the FP16 graph"):
        ExportConfig(quantize="fp8")
    with pytest.raises(InputError, match="starts from the FP16 graph"):
        ExportConfig(quantize="fp8", precision="fp32")
    assert ExportConfig(quantize="fp8", trt=True).precisions(10**9) == ("fp16",)
    with pytest.raises(InputError, match="unknown quantize"):
        ExportConfig(quantize="int4")
    assert ExportConfig(quantize="int8", trt=True).precisions(10**9) == ("fp32", "fp16")
