from pathlib import Path

import pytest
import torch
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.counts import count_parameters
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.adapters import LORA_METHODS, METHODS, Lora
from boostdiff.engine.errors import InputError
from boostdiff.engine.guidance_input import make_adapter
from boostdiff.engine.merge import merge_and_check
from boostdiff.engine.model import Model, ModelFiles, load, locate
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from tiny import CPU, make_xl_pipeline

SD21 = Path(__file__).parents[2] / "benchmarks" / "configs" / "sd21-base"


@torch.no_grad()
def perturb(adapter) -> None:
    torch.manual_seed(3)
    for parameter in adapter.parameters().values():
        parameter.add_(torch.randn_like(parameter) * 0.1)


def predict(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.denoiser(**model.family.example_inputs(model.pipeline, 2)).sample


@pytest.mark.parametrize(("method", "expected"), [("lora", 1_659_904), ("bitfit", 343_684)])
def test_parameter_counts_at_stable_diffusion_21_size(method: str, expected: int) -> None:
    counts = count_parameters(locate(str(SD21)), DistillConfig(method=method))
    assert counts == {"trainable_parameters": expected, "total_parameters": 865_910_724}


@pytest.mark.parametrize("method", METHODS)
def test_disabled_is_the_teacher_bit_for_bit(tiny: Model, method: str) -> None:
    teacher = predict(tiny)
    adapter = make_adapter(method, tiny.denoiser, rank=4)
    if method in {"lora", "bitfit"}:
        assert torch.equal(predict(tiny), teacher)
    perturb(adapter)
    student = predict(tiny)
    assert (student - teacher).abs().max() > 1e-3
    with adapter.disabled():
        assert torch.equal(predict(tiny), teacher)
    assert torch.equal(predict(tiny), student)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_gets_gradients(tiny: Model, method: str) -> None:
    adapter = make_adapter(method, tiny.denoiser, rank=4)
    tiny.denoiser(**tiny.family.example_inputs(tiny.pipeline, 2)).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters().values())
    own = set(map(id, adapter.parameters().values()))
    assert not any(p.grad is not None for p in tiny.denoiser.parameters() if id(p) not in own)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_in_float32_on_a_half_precision_unet(tiny: Model, method: str) -> None:
    tiny.denoiser.to(torch.bfloat16)
    adapter = make_adapter(method, tiny.denoiser, rank=4)
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), adapter.disabled():
            teacher = tiny.denoiser(**inputs).sample
        (tiny.denoiser(**inputs).sample - teacher - 1).square().mean().backward()
    for parameter in adapter.parameters().values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert any(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters().values())
    assert tiny.denoiser.conv_in.weight.dtype == torch.bfloat16


def test_a_lora_file_loads_in_stock_diffusers(tiny: Model, tiny_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter("lora", tiny.denoiser, rank=4)
    perturb(adapter)
    (path,) = adapter.save(tmp_path, tiny.pipeline)
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    with torch.no_grad():
        got = stock.unet(**tiny.family.example_inputs(tiny.pipeline, 2)).sample
    torch.testing.assert_close(got, predict(tiny))


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_another_adapter_are_refused(tiny: Model, tiny_files: ModelFiles, method: str) -> None:
    adapter = make_adapter(method, tiny.denoiser, rank=4)
    with pytest.raises(ValueError, match="another adapter"):
        adapter.load_state_dict({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        adapter.load_state_dict({name: torch.zeros(1, 1) for name in adapter.parameters()})
    other = make_adapter(method, load(tiny_files, device=CPU).denoiser, rank=4)
    perturb(other)
    adapter.load_state_dict(dict(other.parameters()))
    for name, parameter in adapter.parameters().items():
        assert torch.equal(parameter, other.parameters()[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["attention", "transformer"])
def test_a_saved_student_is_the_trained_one_and_merges(
    tiny: Model, tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, method: str, targets: str
) -> None:
    """From the loop's own UNet to the file, onto a fresh model, and folded into plain weights."""
    if targets == "transformer" and method not in LORA_METHODS:
        pytest.skip("has no targets")
    lora = {"targets": targets, "rank": 4, "alpha": 2.0} if method in LORA_METHODS else {}
    config = DistillConfig(
        method=method,
        **lora,
        prompts=prompt_file,
        updates=4,
        batch_size=4,
        learning_rate=0.02,
    )
    info = distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=Observers(preview=False))
    assert info.trainable_parameters == count_parameters(tiny_files, config)["trainable_parameters"]
    base = predict(tiny)
    check = merge_and_check(tiny, tmp_path / "s", info)
    merged = tiny.denoiser
    assert check.relative < 1e-5
    assert (predict(tiny) - base).abs().max() > 1e-4
    assert {type(module) for module in merged.modules()} <= {
        type(m) for m in load(tiny_files, device=CPU).denoiser.modules()
    }


def test_a_kohya_file_is_the_same_lora(tiny: Model, tiny_folder: Path, tmp_path: Path) -> None:
    """ComfyUI's and A1111's key names, read back by diffusers' own converter."""
    adapter = make_adapter("lora", tiny.denoiser, rank=4, alpha=2.0)
    assert isinstance(adapter, Lora)
    perturb(adapter)
    path = adapter.save_kohya(tmp_path)
    names = load_file(path)
    assert all(name.startswith("lora_unet_") for name in names)
    assert {name.split(".", 1)[1] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    with torch.no_grad():
        got = stock.unet(**tiny.family.example_inputs(tiny.pipeline, 2)).sample
    torch.testing.assert_close(got, predict(tiny))


def test_a_target_that_no_layer_has(tiny: Model) -> None:
    with pytest.raises(InputError, match="no layer's name in the denoiser ends in 'to_nowhere': check --targets"):
        make_adapter("lora", tiny.denoiser, targets="to_nowhere")


def test_a_kohya_file_of_every_layer_of_sdxl_is_the_same_lora(tmp_path: Path) -> None:
    """By the names of `add_embedding` that diffusers' converter gives, its reader takes two layers for one."""
    folder = tmp_path / "model"
    make_xl_pipeline().save_pretrained(folder)
    xl = load(locate(str(folder)), device=CPU)
    adapter = make_adapter("lora", xl.denoiser, rank=4, targets="all")
    assert isinstance(adapter, Lora)
    perturb(adapter)
    path = adapter.save_kohya(tmp_path)
    assert {"lora_unet_label_emb_0_0.alpha", "lora_unet_label_emb_0_2.alpha"} <= load_file(path).keys()
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.load_lora_weights(tmp_path, weight_name=path.name)
    inputs = xl.family.example_inputs(xl.pipeline, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            xl.family.forward(stock.unet, inputs), xl.family.forward(xl.denoiser, inputs), atol=1e-5, rtol=1e-4
        )
