from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.benchmarks.session import RESEED
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.conditions import PromptEmbeds, TextEmbeddings
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.guidance import GuidedDenoiser, SinglePassDenoiser
from boostdiff.engine.model import Model, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import decode, default_batch_size, generate, initial_noise, sample, sampling, to_uint8
from boostdiff.engine.schedulers import SAMPLERS, check_steps, make_scheduler
from boostdiff.engine.student import apply_student, read_student
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionPipeline
from tiny import PROMPTS, make_pipeline


def stock(pipeline: StableDiffusionPipeline, *, guidance: float, sampler: str = "ddim", seed: int = 5) -> torch.Tensor:
    """What diffusers' own pipeline draws for `PROMPTS[:2]`, uint8 `(2, 3, H, W)`."""
    pipeline.scheduler = make_scheduler(sampler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    images = pipeline(
        list(PROMPTS[:2]),
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    ).images
    return to_uint8(torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2))


def ours(model: Model, denoiser, *, sampler: str = "ddim", seed: int = 5, batch_size: int = 2) -> torch.Tensor:
    return to_uint8(
        generate(
            model,
            denoiser,
            text=model.family.encode(model.pipeline, PROMPTS[:2]),
            make_scheduler=partial(make_scheduler, sampler, model.pipeline.scheduler.config),
            steps=6,
            seed=seed,
            batch_size=batch_size,
        )
    )


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> int:
    return (a.int() - b.int()).abs().max().item()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_teacher_draws_what_stock_diffusers_draws(tiny: Model, tiny_folder: Path, sampler: str) -> None:
    expected = stock(StableDiffusionPipeline.from_pretrained(tiny_folder), guidance=3.0, sampler=sampler)
    got = ours(tiny, GuidedDenoiser(TorchRunner(tiny.denoiser), 3.0), sampler=sampler)
    assert largest_difference(got, expected) <= 1
    assert largest_difference(ours(tiny, SinglePassDenoiser(TorchRunner(tiny.denoiser)), sampler=sampler), got) > 1


def test_v_prediction_teacher_draws_what_stock_diffusers_draws(tmp_path: Path) -> None:
    from boostdiff.engine.model import load

    make_pipeline(prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    model = load(locate(str(tmp_path / "v")), device=torch.device("cpu"))
    expected = stock(StableDiffusionPipeline.from_pretrained(tmp_path / "v"), guidance=4.0)
    assert largest_difference(ours(model, GuidedDenoiser(TorchRunner(model.denoiser), 4.0)), expected) <= 1


def test_lora_student_draws_what_stock_diffusers_draws(
    tiny: Model, tiny_folder: Path, students: dict[str, Path]
) -> None:
    base = ours(tiny, SinglePassDenoiser(TorchRunner(tiny.denoiser)))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(students["lora"], weight_name=LORA_FILE)
    apply_student(tiny.denoiser, students["lora"], read_student(students["lora"]))
    got = ours(tiny, SinglePassDenoiser(TorchRunner(tiny.denoiser)))
    assert largest_difference(got, stock(pipeline, guidance=1.0)) <= 2
    assert largest_difference(got, base) > 2


def test_an_image_does_not_depend_on_its_batch(tiny: Model) -> None:
    denoiser = SinglePassDenoiser(TorchRunner(tiny.denoiser))
    assert largest_difference(ours(tiny, denoiser), ours(tiny, denoiser, batch_size=1)) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_schedulers_do_not_wait_for_the_device(tiny: Model, sampler: str) -> None:
    """Reading a number from the meta device is an error, from a GPU a wait. The denoiser's timestep lies there."""
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2])
    told = []

    def denoiser(z_t: torch.Tensor, t: torch.Tensor, _: TextEmbeddings) -> torch.Tensor:
        told.append(t.device.type)
        return torch.zeros_like(z_t)

    scheduler = make_scheduler(sampler, tiny.pipeline.scheduler.config)
    noise = torch.zeros(2, 4, 8, 8, device="meta")
    assert sample(denoiser, text=text, noise=noise, scheduler=scheduler, steps=3).device.type == "meta"
    assert told == ["meta"] * 3


def test_large_images_are_drawn_and_decoded_a_few_at_a_time(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(3, *tiny.latent_shape)
    expected = decode(tiny, latents)
    assert default_batch_size(tiny) == 8
    sizes = []
    stock = tiny.pipeline.vae.decode

    def decoded(some: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(some))
        return stock(some, **options)

    monkeypatch.setattr(tiny.pipeline.vae, "decode", decoded)
    decode(tiny, latents)
    monkeypatch.setattr("boostdiff.engine.sampling.PIXELS_512", 16 * 16 // 2)
    assert default_batch_size(tiny) == 4
    torch.testing.assert_close(decode(tiny, latents), expected, atol=1e-5, rtol=1e-4)
    assert sizes == [3, 2, 1]


@pytest.mark.parametrize(
    ("latents", "factor", "batch"), [(64, 8, 8), (128, 8, 2), (16, 32, 8), (32, 32, 2), (128, 32, 1)]
)
def test_a_batch_is_as_large_as_its_images_allow(tiny: Model, latents: int, factor: int, batch: int) -> None:
    """Sana has 32 pixels per latent."""
    tiny.denoiser.register_to_config(sample_size=latents)
    tiny.pipeline.vae_scale_factor = factor
    assert default_batch_size(tiny) == batch


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config", [dict(EulerDiscreteScheduler().config), {"clip_sample": True, "thresholding": True}])
def test_no_sampler_clips_latents(sampler: str, config: dict[str, Any]) -> None:
    """Latents lie beyond [-1, 1]; a configuration that does not say so would make DDIM clip them."""
    scheduler = make_scheduler(sampler, config)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[-1]
    z = torch.full((1, 4, 8, 8), 3.0)
    scheduler.scale_model_input(z, t)
    z_0 = scheduler.step(torch.zeros_like(z), t, z, return_dict=False)[0]
    assert z_0.min() > 2


@pytest.mark.parametrize(("bad", "step"), [(float("nan"), 3), (float("inf"), 1)])
def test_latents_that_are_not_finite_are_an_error_that_names_the_step(tiny: Model, bad: float, step: int) -> None:
    calls = []

    def denoiser(z_t: torch.Tensor, t: torch.Tensor, _: TextEmbeddings) -> torch.Tensor:
        calls.append(t)
        return torch.full_like(z_t, bad) if len(calls) == step else torch.zeros_like(z_t)

    with pytest.raises(BoostDiffError, match=rf"not finite \(NaN or Inf\) after step {step} of 6") as error:
        ours(tiny, denoiser)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_an_error(tiny: Model, bad: float) -> None:
    latents = torch.zeros(2, *tiny.latent_shape)
    decode(tiny, latents)
    tiny.pipeline.vae.decoder.conv_out.bias.data[1] = bad
    with pytest.raises(BoostDiffError, match="the VAE's images are not finite"):
        decode(tiny, latents)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**64, None, 1.5, True, "7"])
def test_seeds_of_images_have_64_bits(seed: Any) -> None:
    for largest in (2**63 - 1, 2**63 + RESEED, 2**64 - 2):
        initial_noise((4, 8, 8), count=2, seed=largest)
    with pytest.raises(InputError, match="the seed"):
        initial_noise((4, 8, 8), count=2, seed=seed)


def test_normalized_latents_are_encoded_and_decoded_by_the_same_numbers(tiny: Model) -> None:
    vae = tiny.pipeline.vae
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mode()
        mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([2.0, 0.5, 1.0, 1.5])
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        latents = tiny.family.encode_latents(vae, images)
    expected = (raw - mean[:, None, None]) / std[:, None, None] * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(tiny.family.denormalized(latents, vae), raw)


def test_a_small_vae_encodes(tiny: Model) -> None:
    """It has no distribution of latents."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    assert tiny.family.encode_latents(vae, torch.zeros(2, 3, 16, 16)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(("sampler", "steps"), [("unipc", 400), ("dpm++", 1000), ("euler", 1000)])
def test_steps_of_flow_matching_that_share_a_timestep_are_drawn(sampler: str, steps: int) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    check_steps(config, [sampler], [steps])
    text = TextEmbeddings(conditional=PromptEmbeds(encoder_hidden_states=torch.zeros(1, 1, 1)), unconditional=None)
    drawn = list(
        sampling(
            lambda z_t, t, text: torch.ones_like(z_t),
            text=text,
            noise=torch.zeros(1, 1, 2, 2),
            scheduler=make_scheduler(sampler, config),
            steps=steps,
        )
    )
    assert len(drawn) == steps
    # The velocity is 1 from σ = 1 to 0.
    torch.testing.assert_close(drawn[-1], torch.full((1, 1, 2, 2), -1.0), atol=1e-3, rtol=0)


def test_noise_is_that_of_a_generator_per_image() -> None:
    noise = initial_noise((4, 8, 8), count=3, seed=7)
    torch.testing.assert_close(noise[2], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))[0])
    torch.testing.assert_close(noise[1:], initial_noise((4, 8, 8), count=2, seed=8))
