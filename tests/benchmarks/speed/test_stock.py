from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.speed.device import gemm_peak
from boostdiff.benchmarks.speed.stock import StockVariant, stock_pipeline
from boostdiff.benchmarks.speed.throughput import RunnerMode, TimedVariant, measure
from boostdiff.engine.compiled import CompiledRunner
from boostdiff.engine.guidance import GuidedDenoiser
from boostdiff.engine.model import Model, load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import decode, initial_noise, sample
from boostdiff.engine.schedulers import make_scheduler
from tiny import CPU, PROMPTS, make_xl_pipeline


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl")
    make_xl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(params=["sd", "xl"])
def model(request: pytest.FixtureRequest, tiny: Model, xl_folder: Path) -> Model:
    return tiny if request.param == "sd" else load(locate(str(xl_folder)), device=CPU)


def test_the_stock_pipeline_draws_the_teachers_images(model: Model) -> None:
    """What is timed as stock diffusers does the same work: the same images come out."""
    noise = initial_noise(model.latent_shape, count=2, seed=0)
    pipeline = stock_pipeline(model)
    assert type(pipeline) is model.family.pipeline_class
    pipeline.scheduler = model.make_scheduler("ddim")
    stock = pipeline(
        list(PROMPTS[:2]), num_inference_steps=3, guidance_scale=4.0, latents=noise, output_type="pt"
    ).images
    latents = sample(
        GuidedDenoiser(TorchRunner(model.denoiser), 4.0),
        text=model.family.encode(model.pipeline, PROMPTS[:2]),
        noise=noise,
        scheduler=model.make_scheduler("ddim"),
        steps=3,
    )
    torch.testing.assert_close(stock, decode(model, latents), atol=1 / 255, rtol=0)


def test_the_stock_pipeline_of_a_half_precision_xl_upcasts_its_vae(xl_folder: Path) -> None:
    model = load(locate(str(xl_folder)), device=CPU, dtype=torch.float16)
    assert model.pipeline.vae.dtype == torch.float32
    noise = initial_noise(model.latent_shape, count=1, seed=0).half()
    pipeline = stock_pipeline(model)
    images = pipeline(["a red cat"], num_inference_steps=2, guidance_scale=4.0, latents=noise, output_type="pt").images
    assert images.isfinite().all()
    assert pipeline.vae.dtype == torch.float16
    assert model.pipeline.vae.dtype == torch.float32


def test_the_compiled_teacher_is_a_baseline(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boostdiff.engine.compiled._compile", lambda unet, **options: unet)
    eager, compiled = TorchRunner(tiny.denoiser), CompiledRunner(tiny.denoiser)
    stock = StockVariant(mode="teacher", runner=eager, pipeline=stock_pipeline(tiny))
    speed = measure(
        [*(TimedVariant(mode=mode, runner=compiled) for mode in ("teacher", "student")), stock],
        tiny,
        prompts=["a red cat"],
        guidance=3.0,
        make_scheduler=lambda: make_scheduler("ddim", tiny.pipeline.scheduler.config),
        steps=2,
        batch_sizes=(1,),
        runs=3,
    )
    assert speed.left_out == {}
    pairs = {(r.slower, r.faster): r.ceiling for r in speed.ratios if r.part == "images"}
    student, teacher, baseline = (
        RunnerMode(*key) for key in (("compiled", "student"), ("compiled", "teacher"), ("stock diffusers", "teacher"))
    )
    assert list(pairs) == [(teacher, student), (baseline, student)]
    assert pairs[teacher, student] is not None
    assert pairs[baseline, student] is None
    assert speed.ratio("images", speed.students[0], baseline="stock diffusers") is not None


def test_the_peak_is_above_what_small_matrices_reach() -> None:
    assert 1e-3 < gemm_peak(CPU, torch.float32) < 100
