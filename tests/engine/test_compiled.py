from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.engine import compiled
from boostdiff.engine.compiled import (
    CompiledRunner,
    has_bfloat16,
    missing_compiler,
    use_plain_attention,
    with_bfloat16_vae,
)
from boostdiff.engine.model import Model, keep_attention_in_fp32, load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import decode
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from tiny import CPU
from tiny_qwen_image import make_qwen_image_pipeline
from torch._inductor import config


def test_compiled_predictions_are_those_of_the_unet(tiny: Model) -> None:
    # Inductor's own code takes 40 seconds; `boostdiff bench` runs it.
    runner, eager = CompiledRunner(tiny.denoiser, backend="aot_eager"), TorchRunner(tiny.denoiser)
    assert runner.precision == (torch.bfloat16 if has_bfloat16(CPU) else torch.float32)
    inputs = tiny.family.example_inputs(tiny.pipeline, batch=2)
    with torch.inference_mode():
        got, expected = runner.predict(inputs), eager.predict(inputs)
    assert got.dtype == tiny.denoiser.dtype == torch.float32
    tolerance = 2e-2 if runner.precision == torch.bfloat16 else 1e-4
    assert (got - expected).norm() < tolerance * expected.norm()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the runner does around the UNet: tracing takes seconds a batch size."""
    monkeypatch.setattr(compiled, "_compile", lambda unet, **options: unet)


@pytest.mark.usefixtures("uncompiled")
def test_small_batches_are_filled_up_and_large_ones_are_not(tiny: Model) -> None:
    runner = CompiledRunner(tiny.denoiser, batches=(4, 2))
    exact = CompiledRunner(tiny.denoiser)
    with torch.inference_mode():
        for batch in (1, 2, 3, 5):
            seen: list[int] = []
            hook = runner.denoiser.register_forward_pre_hook(
                lambda module, given, options, seen=seen: seen.append(len(options["sample"])), with_kwargs=True
            )
            inputs = tiny.family.example_inputs(tiny.pipeline, batch)
            got = runner.predict(inputs)
            hook.remove()
            assert seen == [{1: 2, 2: 2, 3: 4, 5: 5}[batch]]
            torch.testing.assert_close(got, exact.predict(inputs), atol=1e-2, rtol=1e-2)


@pytest.mark.usefixtures("uncompiled")
def test_in_bfloat16_the_unet_itself_stays(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_bfloat16", lambda device: True)
    before = tiny.denoiser.attn_processors
    runner = CompiledRunner(tiny.denoiser)
    inputs = tiny.family.example_inputs(tiny.pipeline, batch=3)
    with torch.inference_mode():
        got, expected = runner.predict(inputs), TorchRunner(tiny.denoiser).predict(inputs)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).norm() < 2e-2 * expected.norm()
    assert tiny.denoiser.dtype == torch.float32
    assert tiny.denoiser.attn_processors == before


@pytest.mark.parametrize(("max_autotune", "mode"), [(False, None), (True, "max-autotune-no-cudagraphs")])
def test_forms_of_products_are_timed_if_asked(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, max_autotune: bool, mode: str | None
) -> None:
    modes = []
    monkeypatch.setattr(torch, "compile", lambda unet, *, mode, **options: modes.append(mode) or unet)
    CompiledRunner(tiny.denoiser, max_autotune=max_autotune)
    assert modes == [mode]


@pytest.mark.usefixtures("uncompiled")
def test_what_inductor_times_is_not_printed(tiny: Model) -> None:
    seen = []
    runner = CompiledRunner(tiny.denoiser)
    hook = runner.denoiser.register_forward_pre_hook(
        lambda *given: seen.append((config.autotune_num_choices_displayed, config.max_autotune_report_choices_stats))
    )
    before = config.get_config_copy()
    runner.predict(tiny.family.example_inputs(tiny.pipeline, batch=1))
    hook.remove()
    assert seen == [(0, False)]
    assert config.get_config_copy() == before


def test_the_vae_in_bfloat16_is_a_copy(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    exact = decode(tiny, latents)
    monkeypatch.setattr(compiled, "has_bfloat16", lambda device: False)
    assert with_bfloat16_vae(tiny) is tiny
    monkeypatch.setattr(compiled, "has_bfloat16", lambda device: True)
    faster = with_bfloat16_vae(tiny)
    assert faster.pipeline.vae.dtype == torch.bfloat16
    assert faster.denoiser is tiny.denoiser
    images = decode(faster, latents)
    assert 0 < (images - exact).abs().max() < 8 / 255
    assert tiny.pipeline.vae.dtype == torch.float32
    torch.testing.assert_close(decode(tiny, latents), exact)


def test_a_vae_of_videos_keeps_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "has_bfloat16", lambda device: True)
    make_qwen_image_pipeline().save_pretrained(tmp_path)
    model = load(locate(str(tmp_path)), device=CPU)
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    faster = with_bfloat16_vae(model)
    assert faster.pipeline.vae.dtype == torch.bfloat16
    assert 0 < (decode(faster, latents) - decode(model, latents)).abs().max() < 16 / 255


def test_plain_attention_is_for_small_latents_alone(tiny: Model) -> None:
    fused = tiny.denoiser.attn_processors
    tiny.denoiser.register_to_config(sample_size=64)
    use_plain_attention(tiny.denoiser)
    assert tiny.denoiser.attn_processors == fused
    tiny.denoiser.register_to_config(sample_size=8)
    use_plain_attention(tiny.denoiser)
    assert all(isinstance(processor, AttnProcessor) for processor in tiny.denoiser.attn_processors.values())


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler(CPU) == "torch.compile needs a C++ compiler"


@pytest.mark.parametrize("replace", [use_plain_attention, keep_attention_in_fp32])
def test_attention_with_keys_of_its_own_for_the_text_is_left_alone(replace: Callable[[Any], object]) -> None:
    """Plain processors would leave its `add_k_proj` and `add_v_proj` out, without an error."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        cross_attention_dim=32,
        upcast_attention=True,
    )
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = unet(*inputs).sample
        replace(unet)
        torch.testing.assert_close(unet(*inputs).sample, expected, atol=1e-4, rtol=1e-4)
    kinds = {type(module.processor).__name__ for module in unet.modules() if isinstance(module, Attention)}
    assert len(kinds) == 2
