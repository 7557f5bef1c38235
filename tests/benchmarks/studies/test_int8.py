import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from boostdiff.benchmarks.bench import bench
from boostdiff.benchmarks.config import BenchConfig, Metrics
from boostdiff.benchmarks.studies.int8 import int8, seconds_by_operator, speed, student_graphs
from boostdiff.engine.errors import InputError
from boostdiff.engine.manifest import read_manifest
from boostdiff.engine.model import Model, ModelFiles
from boostdiff.export.eight_bits import INT8
from boostdiff.export.quantize import layers_of, quantized
from tiny import PROMPTS


def test_an_engine_without_8_bits_is_refused(
    engines: dict[str, Path],
    students: dict[str, Path],
    tiny_files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*args: object, **options: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("boostdiff.benchmarks.session.load", loads)
    engine, student = engines["lora"], students["lora"]
    with pytest.raises(InputError, match="`boostdiff export --quantize int8` makes it"):
        int8(student, tmp_path, engine=engine)
    with pytest.raises(InputError, match="has no fp8 UNet: `boostdiff export --trt --quantize fp8` makes it"):
        int8(student, tmp_path, engine=engine, precision="fp8")
    with pytest.raises(InputError, match="`boostdiff export --quantize int8` makes int8, too"):
        bench(
            tiny_files,
            BenchConfig(precision="int8", samples=0),
            students=[student],
            engine=engine,
            prompts=list(PROMPTS),
            metrics=Metrics(),
            device="cpu",
        )


def test_the_students_graphs_are_those_whose_layers_were_measured(
    engines: dict[str, Path], tiny: Model, tmp_path: Path
) -> None:
    folder = shutil.copytree(engines["lora"], tmp_path / "engine")
    layers = dict(list(layers_of(folder / "unet/model.onnx").items())[:3])
    nodes = [node for names in layers.values() for node in names]
    state = tiny.family.example_inputs(tiny.pipeline, 1)
    quantized(folder / "unet/model.onnx", folder / "unet/model.int8.onnx", nodes, [state])
    manifest = read_manifest(folder)
    entry = manifest.artefacts["unet/model.int8.onnx"] = {"precision": "int8", "quantized": dict.fromkeys(layers, 0.0)}
    assert student_graphs(manifest, folder, INT8) == {
        "fp32": folder / "unet/model.onnx",
        "int8": folder / "unet/model.int8.onnx",
    }
    entry["quantized"] = {"time embeddings": 0.0}
    with pytest.raises(InputError, match="of a version that measured groups of layers: export it again"):
        student_graphs(manifest, folder, INT8)


def test_an_interval_of_a_speed_has_its_coverage(engines: dict[str, Path], tiny: Model) -> None:
    graph = engines["lora"] / "unet/model.onnx"
    session = SimpleNamespace(model=tiny, students=[SimpleNamespace(denoiser=tiny.denoiser)])
    table, _ = speed(session, {"fp32": graph, "int8": graph}, 3)  # type: ignore[arg-type]
    assert table.headings[1] == "FP32's time over INT8's [75%]"


def test_time_is_split_by_operator(engines: dict[str, Path], tiny: Model) -> None:
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    feeds = {name: tensor.float().numpy() for name, tensor in inputs.items()}
    seconds = seconds_by_operator(engines["lora"] / "unet/model.onnx", feeds, 2)
    assert {"Conv", "MatMul", "Softmax"} <= seconds.keys()
    assert all(spent > 0 for spent in seconds.values())
