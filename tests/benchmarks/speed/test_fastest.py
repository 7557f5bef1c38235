import copy

import pytest
import torch
from boostdiff.benchmarks.speed import fastest
from boostdiff.benchmarks.speed.fastest import MANY_PASSES, FastestRunners
from boostdiff.engine.compiled import CompiledRunner
from boostdiff.engine.guidance_input import add_guidance_embedding
from boostdiff.engine.model import Model
from boostdiff.engine.runners import GraphRunner, TorchRunner


@pytest.mark.parametrize(
    ("passes", "bfloat16", "compiles", "expected"),
    [
        (MANY_PASSES, True, True, "compiled"),
        (MANY_PASSES, True, False, "onnx"),
        (MANY_PASSES, False, True, "onnx"),
        (MANY_PASSES - 1, True, True, "torch"),
    ],
)
def test_the_fastest_runner_depends_on_work_and_machine(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, passes: int, bfloat16: bool, compiles: bool, expected: str
) -> None:
    monkeypatch.setattr(fastest, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(fastest, "missing_compiler", lambda device: None)
    assert FastestRunners(tiny, passes=passes, compiles=compiles).name == expected
    assert FastestRunners(tiny, passes=passes, name="torch").name == "torch"


@pytest.mark.parametrize(
    ("passes", "compiles", "expected"),
    [(MANY_PASSES, True, CompiledRunner), (1, True, TorchRunner)],
)
def test_the_fastest_runner_is_opened_once_and_predicts_the_same(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, passes: int, compiles: bool, expected: type
) -> None:
    monkeypatch.setattr(fastest, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(fastest, "missing_compiler", lambda device: None)
    inputs = tiny.family.example_inputs(tiny.pipeline, batch=2)
    with FastestRunners(tiny, passes=passes, compiles=compiles) as runners:
        runner = runners(tiny.denoiser)
        assert type(runner) is expected
        assert runners.name == runner.name
        assert runners(tiny.denoiser) is runner
        # Compiling takes half a minute.
        if expected is not CompiledRunner:
            with torch.inference_mode():
                torch.testing.assert_close(
                    runner.predict(inputs), TorchRunner(tiny.denoiser).predict(inputs), atol=1e-3, rtol=1e-3
                )


def test_a_guidance_conditioned_students_graph_takes_the_scale(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bfloat16, many passes run on ONNX Runtime; the base has no such input."""
    monkeypatch.setattr(fastest, "has_bfloat16", lambda device: False)
    student = copy.deepcopy(tiny.denoiser)
    torch.nn.init.normal_(add_guidance_embedding(student).weight)
    inputs = tiny.family.example_inputs(tiny.pipeline, 2, student)
    with FastestRunners(tiny, passes=MANY_PASSES) as runners, torch.inference_mode():
        got, expected = runners(student).predict(inputs), TorchRunner(student).predict(inputs)
        assert type(runners(student)) is GraphRunner
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    with torch.inference_mode():
        other = TorchRunner(student).predict(inputs | {"timestep_cond": -inputs["timestep_cond"]})
    assert not torch.allclose(other, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["captured", "compiled"])
def test_on_a_gpu_the_models_own_denoiser_keeps_its_memory_order(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stock diffusers is timed with it."""

    class Reordering(TorchRunner):
        def __init__(self, denoiser: torch.nn.Module, **options: object) -> None:
            super().__init__(denoiser.to(memory_format=torch.channels_last))

    class OnGpu:
        device, denoiser = torch.device("cuda"), tiny.denoiser

    monkeypatch.setattr(fastest, "CapturedRunner", Reordering)
    with FastestRunners(OnGpu(), passes=1, name=name) as runners:  # type: ignore[arg-type]
        monkeypatch.setattr(runners, "compiled", Reordering)
        assert not runners(tiny.denoiser).denoiser.conv_in.weight.is_contiguous()
    assert tiny.denoiser.conv_in.weight.is_contiguous()
