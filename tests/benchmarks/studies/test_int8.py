from pathlib import Path

import pytest
from boostdiff.benchmarks.bench import bench
from boostdiff.benchmarks.config import BenchConfig, Metrics
from boostdiff.benchmarks.studies.int8 import int8, seconds_by_operator
from boostdiff.engine.errors import InputError
from boostdiff.engine.model import Model, ModelFiles
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


def test_time_is_split_by_operator(engines: dict[str, Path], tiny: Model) -> None:
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    feeds = {name: tensor.float().numpy() for name, tensor in inputs.items()}
    seconds = seconds_by_operator(engines["lora"] / "unet/model.onnx", feeds, 2)
    assert {"Conv", "MatMul", "Softmax"} <= seconds.keys()
    assert all(spent > 0 for spent in seconds.values())
