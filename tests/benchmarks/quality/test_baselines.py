"""What needs no training, against stock diffusers whose callback does the same."""

import copy
import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from boostdiff.benchmarks.config import BenchConfig
from boostdiff.benchmarks.quality.baselines import CUT_OFF, FEWER, INTERVAL, SPACINGS, Baseline, candidates
from boostdiff.benchmarks.session import Session
from boostdiff.benchmarks.speed.stock import stock_pipeline
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import decode, initial_noise, sample
from boostdiff.engine.schedulers import make_scheduler
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import PROMPTS

W = 6.0


def stock_images(model: Model, setting: Baseline, sampler: str, noise: torch.Tensor) -> torch.Tensor:
    """Guidance switched on and off between the steps, as diffusers documents it for `callback_on_step_end`."""
    pipeline = stock_pipeline(model)
    pipeline.scheduler = make_scheduler(sampler, model.pipeline.scheduler.config)
    with torch.inference_mode():
        positive, negative = pipeline.encode_prompt(list(PROMPTS), pipeline.device, 1, True, [""] * len(PROMPTS))

    def switch(pipe: Any, index: int, t: Any, kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        guided = setting.first <= index + 1 < setting.last
        pipe._guidance_scale = setting.guidance if guided else 1.0
        kwargs["prompt_embeds"] = torch.cat([negative, positive]) if guided else positive
        return kwargs

    return pipeline(
        list(PROMPTS),
        num_inference_steps=setting.steps,
        guidance_scale=setting.guidance if setting.first == 0 else 1.0,
        latents=noise,
        output_type="pt",
        callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (2, 4), (0, 6)], ids=["cut off", "interval", "throughout"])
def test_images_are_stock_diffusers(tiny: Model, sampler: str, first: int, last: int) -> None:
    setting = Baseline(method="any", guidance=W, steps=6, first=first, last=last)
    passes = []

    class Counting(TorchRunner):
        def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            passes.append(len(inputs["sample"]))
            return super().predict(inputs)

    def schedulers() -> Any:
        return make_scheduler(sampler, tiny.pipeline.scheduler.config)

    noise = initial_noise(tiny.latent_shape, count=len(PROMPTS), seed=0)
    text = tiny.family.encode(tiny.pipeline, PROMPTS)
    denoiser = setting.denoiser(Counting(tiny.denoiser), schedulers)
    images = decode(tiny, sample(denoiser, text=text, noise=noise, scheduler=schedulers(), steps=6))
    expected = stock_images(tiny, setting, sampler, noise)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    # The cost that is reported is what was run.
    assert sum(passes) == setting.cost * len(PROMPTS)
    # The switch shows: guidance throughout, or nowhere, gives other images.
    for other in (0, 6):
        if (first, last) != (0, other):
            unswitched = Baseline(method="any", guidance=W, steps=6, first=0, last=other)
            assert (stock_images(tiny, unswitched, sampler, noise) - expected).abs().max() > 2e-3


def test_half_of_twenty_guided_steps_cost_thirty_passes() -> None:
    assert Baseline(method=CUT_OFF, guidance=3.0, steps=20, first=0, last=10).cost == 30


def test_sweeps_are_of_equal_cost() -> None:
    swept = candidates(steps=20, guidance=3.0)
    assert {(one.method, one.cost) for one in swept} == {
        (method, cost) for method in (CUT_OFF, INTERVAL, FEWER) for cost in (20, 30)
    }
    assert {one.guidance for one in swept} == {3.0, 4.5}
    assert all(0 <= one.first < one.last <= one.steps for one in swept)
    assert all((one.first > 0) == (one.method == INTERVAL) for one in swept)
    assert len({one.name for one in swept}) == len(swept) == 20
    spaced = candidates(steps=20, guidance=3.0, spacings=SPACINGS)
    assert len({one.name for one in spaced}) == len(spaced) == 40
    assert {one.name for one in spaced} - {one.name for one in swept} == {f"{one.name}, trailing" for one in swept}
    assert all(one.cost <= 3 for one in candidates(steps=2, guidance=3.0))


@pytest.mark.parametrize(
    ("own", "asked", "swept"),
    [
        ("leading", None, {"leading", "trailing"}),
        ("trailing", None, {"trailing"}),
        ("leading", "trailing", {"trailing"}),
        ("leading", "leading", {"leading"}),
    ],
)
def test_the_timestep_spacing_is_swept_too(tiny: Model, own: str, asked: str | None, swept: set[str]) -> None:
    pipeline = copy.copy(tiny.pipeline)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing=own)
    config = BenchConfig(timestep_spacing=asked, alternatives=True, steps=4)
    session = Session(model=replace(tiny, pipeline=pipeline), config=config, steps=4)
    variants = session.baselines()
    assert {each.make_scheduler().config.timestep_spacing for each in variants} == swept
    assert len({each.name for each in variants}) == len(variants)
    # What the progress counts is what is sampled.
    plain = BenchConfig(timestep_spacing=asked, steps=4).image_steps(1)
    assert config.image_steps(1) - plain >= config.samples * sum(each.steps for each in variants)
    # Guidance is switched on and off at the timesteps that are sampled.
    for each in variants:
        scheduler, denoiser = each.make_scheduler(), each.open()
        scheduler.set_timesteps(each.steps)
        guided_at = inspect.getclosurevars(denoiser).nonlocals["guided_at"]
        assert len(guided_at & set(scheduler.timesteps.tolist())) == each.cost - each.steps


def test_flow_matching_has_no_timestep_spacing_to_sweep(tiny: Model) -> None:
    pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(), unet=tiny.denoiser)
    session = Session(model=replace(tiny, pipeline=pipeline), sampler="dpm++", steps=4)
    assert {each.name.count("trailing") for each in session.baselines()} == {0}
