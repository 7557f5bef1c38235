"""Guiders against diffusers' own, and stock pipelines with guidance rescale; what is refused."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import InputError
from boostdiff.engine.families import FAMILIES
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance import GuidedDenoiser, SinglePassDenoiser, combine
from boostdiff.engine.guiders import GUIDERS, Guider, GuiderOptions
from boostdiff.engine.model import Model, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.schedulers import make_scheduler
from boostdiff.engine.student import Distilled
from diffusers import DDIMScheduler, DiffusionPipeline, guiders
from PIL import Image
from tiny import PROMPTS, make_pipeline, make_xl_pipeline

NOTHING: Any = SimpleNamespace(family=FAMILIES["StableDiffusionPipeline"])
"""In place of a runner that isn't run."""
INTERVAL = {"guidance_interval": "0.2:0.6"}
APG = {"apg_eta": 0.3, "apg_norm_threshold": 5.0}


def of_diffusers(name: str, w: float) -> guiders.BaseGuidance:
    match name:
        case "cfg":
            return guiders.ClassifierFreeGuidance(guidance_scale=w)
        case "rescale":
            return guiders.ClassifierFreeGuidance(guidance_scale=w, guidance_rescale=0.7)
        case "interval":
            return guiders.ClassifierFreeGuidance(guidance_scale=w, start=0.2, stop=0.6)
        case "apg":
            return guiders.AdaptiveProjectedGuidance(
                guidance_scale=w - 1,
                eta=0.3,
                adaptive_projected_guidance_rescale=5.0,
                use_original_formulation=True,
            )
        case _:
            return guiders.ClassifierFreeZeroStarGuidance(guidance_scale=w, zero_init_steps=0)


def ours(name: str) -> Guider:
    settings = {"rescale": {"guidance_rescale": 0.7}, "interval": INTERVAL, "apg": APG}.get(name, {})
    return GuiderOptions(guider=name, **settings).chosen_guider  # type: ignore[arg-type]


def expected(name: str, unconditional: torch.Tensor, conditional: torch.Tensor, w: float, t: int) -> torch.Tensor:
    guider = of_diffusers(name, w)
    guider.set_state(step=999 - t, num_inference_steps=1000, timestep=torch.tensor(t))
    return guider.forward(conditional, unconditional).pred


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_is_diffusers_own(name: str) -> None:
    unconditional, conditional = torch.randn(2, 4, 4, 8, 8)
    timesteps, scales = torch.tensor([990, 700, 500, 100]), torch.tensor([1.0, 2.0, 5.0, 7.5])
    by = partial(GuidedDenoiser, NOTHING, guider=ours(name))
    for t in timesteps.tolist():
        got = by(3.0).combined(unconditional, conditional, torch.tensor(t))
        torch.testing.assert_close(got, expected(name, unconditional, conditional, 3.0, t), atol=0, rtol=0)
    for scale in (3.0, scales):
        got = by(scale).combined(unconditional, conditional, timesteps)
        for i, (t, w) in enumerate(zip(timesteps.tolist(), torch.as_tensor(scale).expand(4).tolist(), strict=True)):
            one = slice(i, i + 1)
            alone = expected(name, unconditional[one], conditional[one], w, t)
            torch.testing.assert_close(got[one], alone, atol=1e-6, rtol=1e-6)
    plain = combine(unconditional, conditional, 3.0)
    assert torch.equal(by(3.0).combined(unconditional, conditional, torch.tensor(500)), plain) == (
        name in ("cfg", "interval")
    )


def test_without_a_guider_it_is_equation_3_to_the_bit() -> None:
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8)
    t, scales = torch.tensor([1, 500, 999]), torch.tensor([1.5, 3.0, 7.5])
    for scale, factor in ((3.0, 3.0), (scales, scales[:, None, None, None])):
        got = GuidedDenoiser(NOTHING, scale).combined(unconditional, conditional, t)
        assert torch.equal(got, unconditional + factor * (conditional - unconditional))


@pytest.mark.parametrize(
    ("sampler", "spacing"), [("ddim", "leading"), ("ddim", "trailing"), ("dpm++", "trailing"), ("unipc", "trailing")]
)
def test_an_interval_of_timesteps_is_diffusers_interval_of_steps(sampler: str, spacing: str) -> None:
    own = dict(make_pipeline().scheduler.config) | {"timestep_spacing": spacing, "_use_default_values": []}
    scheduler = make_scheduler(sampler, own)
    scheduler.set_timesteps(20)
    guider = GuiderOptions(guider="interval", guidance_interval="0.25:0.8").chosen_guider
    stepped = guiders.ClassifierFreeGuidance(start=0.25, stop=0.8)
    for step, t in enumerate(scheduler.timesteps):
        stepped.set_state(step, 20, t)
        assert guider.guides(t) == (stepped.num_conditions == 2), step
    assert guider.passes(scheduler.timesteps.tolist()) == 20 + 11


@pytest.mark.parametrize(
    ("t", "interval", "guided"), [(1000, "0:1", True), (1000, "0:0.5", True), (1000, "0.2:1", False)]
)
def test_an_interval_from_0_has_the_first_step_of_flow_matching(t: int, interval: str, guided: bool) -> None:
    guider = Guider(name="interval", settings={"guidance_interval": interval})
    assert guider.guides(t) is guided
    assert guider.guides(t - 1) is guided


def test_an_interval_does_not_depend_on_the_scale_before() -> None:
    guider = ours("interval")
    inside = torch.tensor(600)
    assert guider.guides(inside)
    latents = torch.randn(2, 1, 4, 8, 8)
    for scale in (1.0, 3.0, 1.0):
        guider(*latents, scale, inside)
        assert guider.guides(inside), scale


def test_outside_of_the_interval_the_teacher_makes_one_pass(tiny: Model) -> None:
    runner, sizes = TorchRunner(tiny.denoiser), []

    class Counting(TorchRunner):
        def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            sizes.append(len(inputs["sample"]))
            return super().predict(inputs)

    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2])
    z_t = torch.randn(2, *tiny.latent_shape)
    teacher = GuidedDenoiser(Counting(tiny.denoiser), 3.0, ours("interval"))
    with torch.no_grad():
        outside, inside = (teacher(z_t, torch.tensor(t), text) for t in (900, 600))
        assert sizes == [2, 4]
        assert torch.equal(outside, SinglePassDenoiser(runner)(z_t, torch.tensor(900), text))
        assert torch.equal(inside, GuidedDenoiser(runner, 3.0)(z_t, torch.tensor(600), text))


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """v-prediction with zero terminal SNR, as guidance rescale was made for."""
    root, folders = tmp_path_factory.mktemp("zero-snr"), {}
    for kind, make in (("sd", make_pipeline), ("sdxl", make_xl_pipeline)):
        pipeline = make()
        with torch.no_grad():
            # Else pictures are so pale that nothing shows.
            pipeline.vae.decoder.conv_out.weight *= 4
            pipeline.unet.conv_out.weight *= 3
        pipeline.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
        pipeline.save_pretrained(root / kind)
        folders[kind] = root / kind
    return folders


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_rescale_is_the_stock_pipelines_guidance_rescale(zero_snr: dict[str, Path], kind: str, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(zero_snr[kind], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def stock(rescale: float) -> np.ndarray:
        generator = torch.Generator().manual_seed(9)
        image = pipeline(
            PROMPTS[1], guidance_scale=7.5, guidance_rescale=rescale, num_inference_steps=5, generator=generator
        ).images[0]
        return np.asarray(image).astype(int)

    def drawn(**options: Any) -> np.ndarray:
        config = GenerateConfig(prompts=[PROMPTS[1]], teacher=True, guidance=7.5, steps=5, seed=9, **options)
        (path,) = draw(locate(str(zero_snr[kind])), config, output=tmp_path / "images", device="cpu")
        return np.asarray(Image.open(path)).astype(int)

    for rescale in (0.7, 1.0):
        assert np.abs(drawn(guider="rescale", guidance_rescale=rescale) - stock(rescale)).max() <= 1
    assert np.abs(drawn() - stock(0.0)).max() <= 1
    assert np.abs(stock(0.7) - stock(0.0)).max() > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_rescale": 0.7}, "--guidance-rescale is not used without --guider rescale"),
        ({"guider": "apg", "guidance_interval": "0:1"}, "--guidance-interval is not used without --guider interval"),
        ({"guider": "cfg-zero", "apg_eta": 0.0}, "--apg-eta is not used without --guider apg"),
        ({"guider": "rescale", "apg_norm_threshold": 15.0}, "--apg-norm-threshold is not used without --guider apg"),
        ({"guider": "magic"}, "unknown guider 'magic': choose one of cfg, rescale, interval, apg, cfg-zero"),
        ({"guider": "rescale", "guidance_rescale": 0.0}, "--guidance-rescale must lie above 0"),
        ({"guider": "rescale", "guidance_rescale": 1.1}, "--guidance-rescale must lie above 0"),
        ({"guider": "rescale", "guidance_rescale": float("nan")}, "--guidance-rescale must lie above 0"),
        ({"guider": "interval", "guidance_interval": "0.5"}, "is no interval START:STOP"),
        ({"guider": "interval", "guidance_interval": "0:0.5:1"}, "is no interval START:STOP"),
        ({"guider": "interval", "guidance_interval": "low:high"}, "is no interval START:STOP"),
        ({"guider": "interval", "guidance_interval": "0.5:0.5"}, "STOP 0.01 or more above"),
        ({"guider": "interval", "guidance_interval": "0.8:0.2"}, "STOP 0.01 or more above"),
        ({"guider": "interval", "guidance_interval": "-0.1:0.2"}, "between 0 and 1"),
        ({"guider": "interval", "guidance_interval": "0.1:1.2"}, "between 0 and 1"),
        ({"guider": "interval", "guidance_interval": "nan:1"}, "between 0 and 1"),
        ({"guider": "apg", "apg_eta": 1.5}, "--apg-eta must lie between 0 and 1"),
        ({"guider": "apg", "apg_norm_threshold": -1.0}, "--apg-norm-threshold must be a number"),
        ({"guider": "apg", "apg_norm_threshold": float("inf")}, "--apg-norm-threshold must be a number"),
        ({"guider": "apg", "teacher": True, "guidance": 1.0}, "--guider is not used with --guidance 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        GenerateConfig(prompts=["a cat"], **options)
    assert "\n" not in str(error.value)


def test_a_student_follows_its_own_guider_alone() -> None:
    plain = Distilled(method="lora", guidance=3.0)
    rescaled = Distilled(method="lora", guidance=3.0, guider="rescale", guider_settings={"guidance_rescale": 0.5})
    for options in (GuiderOptions(), GuiderOptions(guider="cfg")):
        plain.check_guider(options)
    for options in (
        GuiderOptions(),
        GuiderOptions(guider="rescale"),
        GuiderOptions(guider="rescale", guidance_rescale=0.5),
    ):
        rescaled.check_guider(options)
    for student, options in (
        (plain, GuiderOptions(guider="apg")),
        (rescaled, GuiderOptions(guider="cfg")),
        (rescaled, GuiderOptions(guider="rescale", guidance_rescale=0.7)),
    ):
        with pytest.raises(InputError, match=r"distilled with the guider (cfg|rescale \(guidance_rescale 0\.5\)), and"):
            student.check_guider(options)


def test_defaults_are_usable() -> None:
    assert GuiderOptions(guider="interval", guidance_interval="0.20:1.0") == GuiderOptions(
        guider="interval", guidance_interval="0.2:1"
    )
    for name, settings in GUIDERS.items():
        options = GuiderOptions(guider=name, **settings)  # type: ignore[arg-type]
        assert options.guider_settings == GuiderOptions(guider=name).guider_settings == settings  # type: ignore[arg-type]
