"""What layers in 8 bits cost, estimated: against layers that are rounded indeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import Observers, distill
from boostdiff.engine.guidance_term import total_sum_of_squares
from boostdiff.engine.merge import merge_and_check
from boostdiff.engine.model import Model, load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.student import read_student
from boostdiff.export import sensitivity
from boostdiff.export.calibration import Calibration
from boostdiff.export.eight_bits import FP8, INT8, Scheme
from boostdiff.export.sensitivity import Ranges, layer_errors, recorded_ranges
from tiny import PROMPTS


@contextmanager
def rounding(unet: torch.nn.Module, names: list[str], ranges: Ranges, scheme: Scheme) -> Iterator[None]:
    """These layers in 8 bits."""
    hooks = []
    for name in names:

        def after(module: Any, inputs: Any, output: Any, name: str) -> Any:
            return output + sensitivity._quantization_error(module, inputs[0], output, ranges[name], scheme)

        hooks.append(unet.get_submodule(name).register_forward_hook(partial(after, name=name)))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("live", "scheme"), [(False, INT8), pytest.param(True, FP8, marks=pytest.mark.slow)], ids=["int8", "live, fp8"]
)
def test_the_estimate_is_what_rounding_changes(
    tiny_folder: Path,
    students: dict[str, Path],
    prompt_file: Path,
    live: bool,
    scheme: Scheme,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = students["lora"]
    if live:
        # Its layers read both texts.
        config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2, negative_prompt="live", learning_rate=0.02)
        student = tmp_path / "live"
        distill(locate(str(tiny_folder)), config, output=student, device="cpu", observers=Observers(preview=False))
    model, info = load(locate(str(tiny_folder)), device="cpu", dtype=torch.float32), read_student(student)
    calibration = Calibration.of_teacher(model, PROMPTS, info)
    merge_and_check(model, student, info)
    with recorded_ranges(model.denoiser) as ranges:
        calibration.add_states(model, info.denoiser, info.choose_negative_prompt(None))
    calibration.checked[1:] = []
    denoiser = info.denoiser(TorchRunner(model.denoiser))
    monkeypatch.setattr(sensitivity, "DIRECTIONS", 50)
    vectors = layer_errors(model.denoiser, denoiser, calibration, ranges, scheme)
    assert vectors.keys() == {
        name for name, module in model.denoiser.named_modules() if getattr(module, "weight", torch.empty(0)).ndim >= 2
    }
    (before,), block = calibration.predictions(denoiser), "mid_block.attentions.0.transformer_blocks.0"
    # At the beginning, at the end, where only conditions go in, and some together that read the same numbers.
    for names in (
        ["conv_in"],
        ["conv_out"],
        ["time_embedding.linear_1"],
        [f"{block}.attn2.to_k"],
        [f"{block}.attn1.to_{name}" for name in "qkv"],
    ):
        with rounding(model.denoiser, names, ranges, scheme):
            (after,) = calibration.predictions(denoiser)
        exact = (after.double() - before.double()).square().sum().item() / total_sum_of_squares(calibration.checked)
        estimate = sum(vectors[name] for name in names).square().sum().item()  # type: ignore[union-attr]
        assert estimate == pytest.approx(exact, rel=0.35), names
        assert exact > 0
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())


def test_layers_are_left_as_they_were(tiny: Model) -> None:
    before = len(tiny.denoiser.conv_in._forward_hooks)
    with pytest.raises(RuntimeError), recorded_ranges(tiny.denoiser):
        raise RuntimeError
    assert len(tiny.denoiser.conv_in._forward_hooks) == before


def test_numbers_of_8_bits() -> None:
    values = torch.tensor([-1.0, -0.2, 0.0, 0.1, 3.0, 9.0])
    # 256 steps from -1 to 4; what lies beyond is cut off.
    step = 5 / 255
    assert INT8.fake_quantized(values, -1.0, 4.0).sub(values)[:5].abs().max() <= step / 2 + 1e-6
    assert INT8.fake_quantized(values, -1.0, 4.0)[5] == pytest.approx(4.0, abs=step)
    assert FP8.fake_quantized(values, -1.0, 4.0)[5] == 4.0
    assert torch.allclose(FP8.fake_quantized(values, -1.0, 4.0)[:5], values[:5], rtol=1 / 16)
    for scheme in (INT8, FP8):
        assert torch.equal(scheme.fake_quantized(values, 0.0, 0.0), values)
        assert scheme.fake_quantized(torch.zeros(1), 2.0, 3.0) == 0


@pytest.mark.parametrize(("scheme", "error"), [(INT8, 1 / 128), (FP8, 1 / 16)])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 3, 3)])
def test_weights_are_rounded_per_channel(scheme: Scheme, error: float, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[1] *= 1000
    weight[2] = 0
    rounded = scheme.fake_quantized_weight(weight)
    largest = weight.abs().flatten(1).amax(1).view(-1, *(1,) * (len(shape) - 1))
    assert ((rounded - weight).abs() <= largest * error + 1e-12).all()
    assert not torch.equal(rounded, weight)
    assert not rounded[2].any()
