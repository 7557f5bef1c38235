from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.sampling import fastest_runner, remembered
from boostdiff.engine.errors import InputError
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner


def test_a_result_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    measured = []

    def measure() -> int:
        measured.append(1)
        return len(measured)

    assert [remembered(path, key, measure) for key in ("a", "b", "a")] == [1, 2, 1]
    path.write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        remembered(path, "a", measure)


def test_the_fastest_runner_is_the_same_network(tiny: Model) -> None:
    inputs = tiny.family.example_inputs(tiny.pipeline, 3)
    with torch.no_grad():
        expected = TorchRunner(tiny.unet).predict(inputs)
    with fastest_runner(tiny) as runner:
        assert runner.name == "onnx"
        torch.testing.assert_close(runner.predict(inputs), expected, atol=1e-4, rtol=1e-4)
