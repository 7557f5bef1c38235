"""Students of live negative prompts: from training to a stock pipeline and an exported engine."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.distill.negatives import COMMON, NegativePrompts
from boostdiff.distill.objective import NoiseSchedule
from boostdiff.distill.order import Share
from boostdiff.distill.trajectories import Trajectories
from boostdiff.engine.compiled import CompiledRunner
from boostdiff.engine.conditions import TextEmbeddings
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance import guidance_embedding
from boostdiff.engine.guidance_input import make_adapter
from boostdiff.engine.live_negative import (
    INITIAL_SCALE,
    LIVE_FILE,
    LiveNegative,
    LiveNegativeAttention,
    attach,
    growth_at,
)
from boostdiff.engine.merge import merge_and_check, merged_copy
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import decode, initial_noise, sample
from boostdiff.engine.schedulers import make_scheduler
from boostdiff.engine.student import StudentInfo, read_student
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image
from tiny import CPU, PROMPTS, make_pipeline, make_xl_pipeline, save_images

SILENT = Observers(preview=False)
NEGATIVES = ["", "two green birds", "a red cat, a blue dog on a hill, two green birds, a white fish, a red cat"]
"""Empty, short, and longer than the text encoder takes."""


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    (make_xl_pipeline() if request.param == "sdxl" else make_pipeline()).save_pretrained(folder)
    return locate(str(folder))


def config_of(prompt_file: Path, **values: object) -> DistillConfig:
    settings = {"updates": 8, "batch_size": 4, "learning_rate": 0.02, "negative_prompt": "live"}
    return DistillConfig(prompts=prompt_file, **settings | values)


@pytest.fixture(scope="module")
def student(files: ModelFiles, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "student"
    distill(files, config_of(prompt_file), output=folder, device="cpu", observers=SILENT)
    return folder


def encoded(model: Model, negative_prompt: str | list[str], count: int = 1) -> TextEmbeddings:
    return model.family.encode(model.pipeline, [PROMPTS[0]] * count, negative_prompt=negative_prompt)


@torch.no_grad()
def image_of(model: Model, info: StudentInfo, negative_prompt: str) -> np.ndarray:
    latents = sample(
        info.denoiser(TorchRunner(model.denoiser)),
        text=encoded(model, negative_prompt),
        noise=initial_noise(model.latent_shape, count=1, seed=0),
        scheduler=make_scheduler("ddim", model.pipeline.scheduler.config),
        steps=3,
    )
    return decode(model, latents)[0].permute(1, 2, 0).numpy()


@torch.no_grad()
def test_without_training_only_the_scale_leads_away(tiny: Model) -> None:
    """At s = 1 the pass is the base's conditional pass, at s = 0 the unconditional one; switched off it is the base."""
    text, z_t = encoded(tiny, "two green birds", 2), torch.randn(2, *tiny.latent_shape)
    both = tiny.denoiser(torch.cat([z_t, z_t]), 500, **text.both().tensors(), return_dict=False)[0]
    unconditional, conditional = both.chunk(2)
    adapter = make_adapter("lora", tiny.denoiser, live_negative_prompt=True)
    assert isinstance(adapter, LiveNegative)

    def predict(scale: float) -> torch.Tensor:
        for processor in adapter.processors.values():
            processor.scale.fill_((scale - INITIAL_SCALE) / 10)
        return tiny.denoiser(z_t, 500, **text.joined().tensors(), return_dict=False)[0]

    torch.testing.assert_close(predict(1.0), conditional)
    torch.testing.assert_close(predict(0.0), unconditional)
    assert not torch.allclose(predict(1.5), conditional, atol=1e-4)
    with adapter.disabled():
        again = tiny.denoiser(torch.cat([z_t, z_t]), 500, **text.both().tensors(), return_dict=False)[0]
    assert torch.equal(again, both)
    with pytest.raises(ValueError, match=r"takes both texts as one: torch.cat\(\[negative, prompt\], dim=1\)"):
        tiny.denoiser(z_t, 500, encoder_hidden_states=torch.zeros(2, 7, 32))


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("w", [1.0, 1.5, 5.0])
def test_of_a_range_the_scale_grows_as_w_minus_1(tiny: Model, w: float, factor: float) -> None:
    """It predicts what a student of one scale does whose s − 1 is (w − 1) / 2 times what it is at w = 3.

    Scaled, it is the whole factor more at the largest w, and its power with the growth as exponent below.
    """
    text, z_t = encoded(tiny, "two green birds", 2), torch.randn(2, *tiny.latent_shape)
    fixed, ranged = (copy.deepcopy(tiny.denoiser) for _ in range(2))
    alone = make_adapter("lora", fixed, live_negative_prompt=True)
    assert isinstance(alone, LiveNegative)
    for processor in alone.processors.values():
        more = factor ** (growth_at(w) / growth_at(5.0))
        processor.scale.fill_((1 + 0.2 * more * (w - 1) / 2 - INITIAL_SCALE) / 10)
    make_adapter("lora", ranged, guidance_input=True, live_negative_prompt=True).scale(factor, 5.0)
    embedding = guidance_embedding(torch.tensor([w, w]), ranged.config.time_cond_proj_dim)
    joined = text.joined().tensors()
    got = ranged(z_t, 500, timestep_cond=embedding, **joined, return_dict=False)[0]
    expected = fixed(z_t, 500, **joined, return_dict=False)[0]
    plain = tiny.denoiser(z_t, 500, **text.conditional.tensors(), return_dict=False)[0]
    # The sine is below its angle, by 2.6% at w = 5.
    assert (got - expected).norm() <= 0.03 * (expected - plain).norm() + 1e-5
    assert torch.allclose(got, plain, atol=1e-5) == (w == 1)


@torch.no_grad()
def test_it_attends_as_the_stock_processor_does(tiny: Model) -> None:
    """Fused or as matrix products, with a mask of heads of its own: equal to the formula through `Attention` itself."""
    attention = next(m for m in tiny.denoiser.modules() if isinstance(m, Attention) and m.is_cross_attention)
    hidden, negative, prompt = torch.randn(2, 9, attention.to_q.in_features), *torch.randn(2, 2, 5, 32)
    expected_n, expected_p = attention(hidden, negative), attention(hidden, prompt)
    adapter = make_adapter("bitfit", tiny.denoiser, live_negative_prompt=True)
    assert isinstance(adapter, LiveNegative)
    adapter.processors[next(iter(adapter.processors))].shared.time_embedding = torch.zeros(2, 64)
    for stock in (attention.processor.stock, AttnProcessor()):
        attention.processor.stock = stock
        got = attention(hidden, torch.cat([negative, prompt], dim=1))
        torch.testing.assert_close(got, expected_n + INITIAL_SCALE * (expected_p - expected_n), atol=1e-5, rtol=1e-4)


def test_a_student_follows_its_negative_prompt_in_stock_pipelines_too(files: ModelFiles, student: Path) -> None:
    """Unmerged with `load_lora_weights` and our processors, and merged: `generate`'s image, one pass a step."""
    info = read_student(student, files)
    assert (info.live_negative_prompt, info.negative_prompt) == (True, "")
    assert LIVE_FILE in info.adapter_files
    base = load(files, device=CPU)
    merged_unet = merged_copy(base, student, info)
    assert merge_and_check(base, student, info).relative < 1e-5
    base.pipeline.unet = merged_unet
    ours = {negative: image_of(base, info, negative) for negative in NEGATIVES}
    assert np.abs(ours[""] - ours[NEGATIVES[1]]).max() > 1e-3
    stock = files.family.pipeline_class.from_pretrained(files.folder)
    stock.scheduler = make_scheduler("ddim", stock.scheduler.config)
    stock.load_lora_weights(student)
    LiveNegative.load(stock.unet, student)
    passes: list[int] = []
    stock.unet.register_forward_pre_hook(lambda unet, args, kwargs: passes.append(len(args[0])), with_kwargs=True)
    for negative, image in ours.items():
        text = encoded(base, negative).joined()
        tensors = text.tensors()
        pooled = {"pooled_prompt_embeds": tensors["text_embeds"]} if "text_embeds" in tensors else {}
        got = stock(
            prompt_embeds=text.encoder_hidden_states,
            **pooled,
            latents=initial_noise(base.latent_shape, count=1, seed=0),
            num_inference_steps=3,
            guidance_scale=1.0,
            output_type="np",
        ).images[0]
        assert np.abs(got - image).max() < 1 / 255
    assert passes == [1] * 9


@pytest.mark.parametrize("files", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)], indirect=True)
def test_an_engine_takes_any_negative_prompt_and_one_per_image(
    files: ModelFiles,
    student: Path,
    engines: dict[str, Path],
    reuse_graphs: Callable[..., None],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    info = read_student(student, files)
    if "sdxl" not in request.node.name:
        # Its other parts are those of the tiny model.
        reuse_graphs(engines["lora"], fresh=("unet",))
    manifest = export(files, ExportConfig(), student=student, output=tmp_path / "engine", device="cpu")
    assert manifest.distilled.live_negative_prompt
    base = load(files, device=CPU)
    base.pipeline.unet = merged_copy(base, student, info)
    options = {"steps": 3, "seed": 0}
    with Engine.load(tmp_path / "engine", device="cpu") as engine:
        for negative in NEGATIVES:
            (got,) = engine(PROMPTS[0], negative_prompt=negative, **options)
            assert np.abs(np.asarray(got) / 255 - image_of(base, info, negative)).max() <= 2 / 255
        together = engine([PROMPTS[0]] * 2, negative_prompt=NEGATIVES[1:], batch_size=2, **options)
        alone = engine([PROMPTS[0]] * 2, negative_prompt=NEGATIVES[1:], batch_size=1, **options)
        for one, other in zip(together, alone, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
        with pytest.raises(InputError, match="there are 3 negative prompts for 1 prompts"):
            engine(PROMPTS[0], negative_prompt=NEGATIVES)
        with pytest.raises(InputError, match="takes both texts"):
            engine.model.denoiser(torch.zeros(1, 4, 8, 8), 5, encoder_hidden_states=torch.zeros(1, 15, 32))


def test_generate_draws_by_it(files: ModelFiles, student: Path, tmp_path: Path) -> None:
    config = GenerateConfig(prompts=[PROMPTS[0]], student=student, steps=2)
    images = []
    for negative in (None, "", "two green birds"):
        (path,) = draw(files, replace(config, negative_prompt=negative), output=tmp_path, device="cpu")
        images.append(np.asarray(Image.open(path)))
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    with pytest.raises(InputError, match="not live negative prompt ones"):
        draw(files, replace(config, lora_scale=0.5), output=tmp_path, device="cpu")
    with pytest.raises(InputError, match="attention to a live negative prompt is no part of stock weights"):
        export(files, ExportConfig(diffusers=True), student=student, output=tmp_path / "engine", device="cpu")


@pytest.mark.parametrize("more", [{}, {"guidance": 1.5, "guidance_max": 5.0}, {"method": "bitfit"}])
def test_resumed_runs_give_the_same_bytes(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    config = config_of(prompt_file, updates=4, batch_size=3, **more)
    info = distill(tiny_files, config, output=tmp_path / "whole", device="cpu", observers=SILENT)

    class Stop(Exception):
        pass

    def stop(report: object) -> None:
        raise Stop

    execution = RunConfig(checkpoint_every=1)
    observers = Observers(on_update=stop, preview=False)
    with pytest.raises(Stop):
        distill(tiny_files, config, execution, output=tmp_path / "cut", device="cpu", observers=observers)
    resumed = replace(execution, resume=True)
    again = distill(tiny_files, config, resumed, output=tmp_path / "cut", device="cpu", observers=SILENT)
    assert again.adapter_files == info.adapter_files
    assert LIVE_FILE in info.adapter_files


@pytest.mark.slow
def test_a_conditioned_student_takes_both(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    config = config_of(prompt_file, guidance=1.5, guidance_max=5.0, updates=12, adapter_scale=2.0)
    info = distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=Observers())
    assert (tmp_path / "s" / "grid.png").exists()
    model = load(tiny_files, device=CPU)
    model.pipeline.unet = merged_copy(model, tmp_path / "s", info)
    text, z_t = encoded(model, "two green birds"), torch.randn(1, *model.latent_shape)
    with torch.no_grad():
        low, high = (info.denoiser(TorchRunner(model.denoiser), w)(z_t, torch.tensor(500), text) for w in (1.5, 5.0))
    assert (low - high).abs().max() > 1e-4
    export(tiny_files, ExportConfig(), student=tmp_path / "s", output=tmp_path / "engine", device="cpu")
    with Engine.load(tmp_path / "engine", device="cpu") as engine:
        for w, expected in ((1.5, low), (5.0, high)):
            got = engine.denoiser(w)(z_t, torch.tensor(500), text)
            assert (got - expected).abs().max() < (low - high).abs().max() / 100
    with pytest.raises(InputError, match=r"for guidance 1\.5 to 5"):
        info.denoiser(TorchRunner(model.denoiser), 7.0)


def test_it_trains_on_images_with_other_captions_as_negatives(
    tiny_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_images(tmp_path / "images")
    seen: list[str] = []
    plain = NegativePrompts.draw

    def recording(self: NegativePrompts, *arguments: object) -> str:
        seen.append(plain(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(NegativePrompts, "draw", recording)
    config = DistillConfig(images=str(tmp_path / "images"), negative_prompt="live", updates=8, batch_size=4)
    info = distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    assert np.isfinite(info.result["final_loss"])
    known = {"", *COMMON, *(f"picture {i}" for i in range(5)), "picture", *"01234"}
    assert set(seen) <= known
    assert any(text.startswith("picture") for text in seen)


def test_negative_prompts_are_drawn_from_their_shares_and_from_the_seed(tiny: Model) -> None:
    negatives = NegativePrompts(tiny, live=True)
    prompts = ["a blue dog on a hill", "fish"]
    drawn = [negatives.draw(np.random.default_rng([0, i]), prompts) for i in range(2000)]
    assert drawn == [negatives.draw(np.random.default_rng([0, i]), prompts) for i in range(2000)]
    counts = Counter(
        "empty" if not t else "common" if t in COMMON else "prompt" if t in prompts else "words" for t in drawn
    )
    for name, share in {"empty": 0.5, "common": 0.1, "prompt": 0.15 + 0.125, "words": 0.125}.items():
        assert counts[name] / 2000 == pytest.approx(share, abs=0.04)
    assert all(text in prompts[0] for text in drawn if text not in (*COMMON, *prompts))
    fixed = NegativePrompts(tiny, "a red cat")
    assert fixed.draw(np.random.default_rng(0), prompts) == ""
    assert len(fixed.embeddings(["", ""])) == 1


def test_each_member_of_a_pool_has_its_own_after_resuming_too(tiny: Model) -> None:
    schedule = NoiseSchedule.of(tiny.pipeline.scheduler, CPU)

    def pool() -> Trajectories:
        negatives = NegativePrompts(tiny, live=True)
        share = Share(batch_size=6)
        return Trajectories(tiny, list(PROMPTS), schedule, share=share, seed=0, guidance=(3, 3), negatives=negatives)

    source, other = pool(), pool()
    assert len(set(source.negative_texts)) > 1
    for update in range(12):
        source.batch(update)
        source.advance(torch.zeros_like(source.z_t))
    other.restore(source.state(), Counter())
    assert other.negative_texts == source.negative_texts
    batch = source.batch(12)
    assert batch.text.unconditional is not None
    for index, text in enumerate(source.negative_texts):
        expected = tiny.family.embed_negative(tiny.pipeline, text).encoder_hidden_states
        torch.testing.assert_close(batch[index : index + 1].text.unconditional.encoder_hidden_states, expected)


@pytest.mark.parametrize(
    ("values", "execution", "message"),
    [
        ({"method": "soft-prompt"}, RunConfig(), "does not go with --method soft-prompt"),
        ({}, RunConfig(format="kohya"), "--format is not used with --negative-prompt live"),
        ({"guidance": 1.5, "guidance_max": 40.0}, RunConfig(), "of a live negative prompt ends at 15"),
    ],
)
def test_wrong_uses(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, values: dict, execution: RunConfig, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        distill(tiny_files, config_of(prompt_file, **values), execution, output=tmp_path / "s", device="cpu")
    assert not (tmp_path / "s").exists()


def test_damaged_scales_are_refused(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    info = distill(tiny_files, config_of(prompt_file, updates=1), output=tmp_path / "s", device="cpu", observers=SILENT)
    path = tmp_path / "s" / LIVE_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="is damaged"):
        read_student(tmp_path / "s", tiny_files)
    with pytest.raises((InputError, BoostDiffError), match="does not fit"):
        merged_copy(load(tiny_files, device=CPU), tmp_path / "s", info)


def test_a_unet_is_given_processors_once(tiny: Model) -> None:
    make_adapter("lora", tiny.denoiser, live_negative_prompt=True)
    attentions = [m for m in tiny.denoiser.modules() if isinstance(m, Attention) and m.is_cross_attention]
    assert all(isinstance(m.processor, LiveNegativeAttention) for m in attentions)
    with pytest.raises(InputError, match="no plain cross-attention"):
        make_adapter("bitfit", tiny.denoiser, live_negative_prompt=True)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_unet_reads_the_newest_time_embedding(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU that has bfloat16 would compile in it.
    monkeypatch.setattr("boostdiff.engine.compiled.has_bfloat16", lambda device: False)
    adapter = make_adapter("lora", tiny.denoiser, live_negative_prompt=True)
    assert isinstance(adapter, LiveNegative)
    for processor in adapter.processors.values():
        processor.slope.normal_()
    text, compiled, eager = (
        encoded(tiny, "two green birds"),
        CompiledRunner(tiny.denoiser, backend="eager"),
        TorchRunner(tiny.denoiser),
    )
    z_t, arguments = torch.randn(1, *tiny.latent_shape), text.joined().tensors()
    for t in (900, 100):
        got, expected = (
            runner(z_t, torch.tensor(t), **arguments, return_dict=False)[0] for runner in (compiled, eager)
        )
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_a_unet_that_adds_its_text_to_the_timestep_is_refused(tiny: Model) -> None:
    config = dict(tiny.denoiser.config) | {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    unet = UNet2DConditionModel.from_config(config)
    with pytest.raises(InputError, match="this UNet adds its text to the timestep, too"):
        attach(unet)
    assert not unet.config.get("live_negative_prompt")
