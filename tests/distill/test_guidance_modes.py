"""The guidance that a student was trained for, from training to a stock pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.distill.config import RANGE_UPDATES, DistillConfig, parse_guidance
from boostdiff.distill.distill import count_parameters, distill
from boostdiff.distill.loop import Observers
from boostdiff.distill.negatives import NegativePrompts
from boostdiff.distill.objective import NoiseSchedule, guidance_weight
from boostdiff.distill.order import Share
from boostdiff.distill.trajectories import Trajectories
from boostdiff.engine.adapters import ADAPTER_NAME
from boostdiff.engine.errors import InputError
from boostdiff.engine.guidance import SinglePassDenoiser, combine, guidance_embedding, smooth_columns
from boostdiff.engine.guidance_input import GUIDANCE_FILE
from boostdiff.engine.merge import merge_and_check, merged_copy
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.student import apply_student, read_student
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tiny import CPU, PROMPTS

SILENT = Observers(preview=False)


@pytest.fixture(scope="session")
def conditioned_student(tiny_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("range") / "student"
    config = DistillConfig(
        guidance=1.5, guidance_max=7.5, prompts=prompt_file, updates=15, batch_size=4, learning_rate=0.02
    )
    distill(locate(str(tiny_folder)), config, output=output, device="cpu", observers=SILENT)
    return output


def test_the_embedding_is_that_of_stock_pipelines() -> None:
    w = torch.tensor([1.0, 3.0, 7.5])
    stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w, 256), stock)


def test_a_scale_for_each_sample() -> None:
    unconditional, conditional = torch.randn(2, 2, 4, 8, 8)
    got = combine(unconditional, conditional, torch.tensor([2.0, 5.0])[:, None, None, None])
    for i, w in enumerate((2.0, 5.0)):
        torch.testing.assert_close(got[i], combine(unconditional[i], conditional[i], w))


def test_the_loss_is_normalised_by_the_excess_of_guidance() -> None:
    torch.testing.assert_close(guidance_weight(torch.tensor([1.0, 1.5, 3.0, 7.0])), torch.tensor([4, 4, 1 / 4, 1 / 36]))


def test_a_conditioned_student_follows_the_guidance_that_it_is_given(conditioned_student: Path, tiny: Model) -> None:
    """In a stock pipeline, from the merged UNet: `guidance_scale` changes the image and stays one pass a step."""
    info = read_student(conditioned_student, tiny.files)
    assert info.guidance_range == (1.5, 7.5)
    merged = merged_copy(tiny, conditioned_student, info)
    check = merge_and_check(tiny, conditioned_student, info)
    assert check.relative < 1e-5
    stock = load(tiny.files, device=CPU).pipeline
    stock.unet = merged
    passes = []
    merged.register_forward_pre_hook(lambda unet, args, kwargs: passes.append(len(args[0])), with_kwargs=True)

    def image(w: float) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return stock(PROMPTS[0], num_inference_steps=3, guidance_scale=w, generator=generator, output_type="np").images

    assert np.abs(image(2.0) - image(7.0)).max() > 1e-3
    assert passes == [1] * 6


def test_the_denoiser_feeds_what_the_stock_pipeline_feeds(conditioned_student: Path, tiny: Model) -> None:
    apply_student(tiny.denoiser, conditioned_student, read_student(conditioned_student))
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2])
    z_t = torch.randn(2, *tiny.latent_shape)
    with torch.no_grad():
        got = SinglePassDenoiser(TorchRunner(tiny.denoiser), 4.0)(z_t, torch.tensor(500), text)
        condition = tiny.pipeline.get_guidance_scale_embedding(torch.tensor([3.0, 3.0]), embedding_dim=256)
        expected = tiny.denoiser(
            z_t, 500, text.conditional.encoder_hidden_states, timestep_cond=condition, return_dict=False
        )[0]
    torch.testing.assert_close(got, expected)


def test_a_student_refuses_what_it_was_not_trained_for(
    conditioned_student: Path, students: dict[str, Path], tiny_files: ModelFiles
) -> None:
    fixed, ranged = (read_student(folder, tiny_files) for folder in (students["lora"], conditioned_student))
    assert fixed.choose_guidance(None) is None
    assert fixed.choose_guidance(3.0) is None
    assert ranged.choose_guidance(None) == 4.5
    assert ranged.choose_guidance(7.5) == 7.5
    with pytest.raises(InputError, match=r"distilled at guidance 3 and can't give 5"):
        fixed.choose_guidance(5.0)
    with pytest.raises(InputError, match=r"for guidance 1\.5 to 7\.5 and can't give 8"):
        ranged.choose_guidance(8.0)
    with pytest.raises(InputError, match="distilled with no negative prompt"):
        fixed.choose_negative_prompt("blurry")


def test_a_negative_prompt_is_what_the_teacher_leads_away_from(
    tiny: Model, tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    schedule = NoiseSchedule.of(tiny.pipeline.scheduler, CPU)
    negatives = NegativePrompts(tiny, "a red cat")
    source = Trajectories(
        tiny, list(PROMPTS), schedule, share=Share(batch_size=2), seed=0, guidance=(3, 3), negatives=negatives
    )
    negative = tiny.pipeline.encode_prompt("a red cat", CPU, 1, False)[0]
    unconditional = source.batch(0).text.unconditional
    assert unconditional is not None
    torch.testing.assert_close(unconditional.encoder_hidden_states, negative)
    config = DistillConfig(prompts=prompt_file, negative_prompt="a red cat", updates=2, batch_size=2)
    info = distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    info.choose_negative_prompt("a red cat")
    with pytest.raises(InputError, match="distilled with the negative prompt 'a red cat'"):
        info.choose_negative_prompt("")


def test_the_lora_scale_scales_the_adapters_effect(students: dict[str, Path], tiny: Model) -> None:
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return tiny.denoiser(**inputs).sample

    base = predict()
    apply_student(tiny.denoiser, students["lora"], read_student(students["lora"]))
    whole = (predict() - base).norm()
    tiny.denoiser.set_adapters(ADAPTER_NAME, 0.5)
    half = (predict() - base).norm()
    tiny.denoiser.set_adapters(ADAPTER_NAME, 0.0)
    torch.testing.assert_close(predict(), base, atol=1e-5, rtol=1e-4)
    assert 0.3 * whole < half < 0.7 * whole


@pytest.mark.parametrize(
    ("text", "expected"), [("3", (3.0, None)), ("1.5:7.5", (1.5, 7.5)), ("2:", None), ("x", None), ("1:2:3", None)]
)
def test_guidance_on_the_command_line(text: str, expected: tuple[float, float | None] | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match="neither a number nor a range"):
            parse_guidance(text)
    else:
        assert parse_guidance(text) == expected


@pytest.mark.parametrize(("preset", "times"), [(None, RANGE_UPDATES), ("paper", 1)])
def test_a_range_is_trained_longer_unless_told_otherwise(preset: str | None, times: int) -> None:
    def updates(**options: float | None) -> int:
        config = DistillConfig(preset=preset, guidance=1.5, **options)
        return config.resolved(in_bfloat16=False, embedded=True).updates

    assert updates(guidance_max=7.5) == times * updates(guidance_max=None)
    assert updates(guidance_max=7.5, updates=7) == 7


def test_a_reversed_range() -> None:
    with pytest.raises(InputError, match="is no range"):
        DistillConfig(guidance=7.5, guidance_max=1.5)


def test_only_columns_that_vary_smoothly_with_guidance_are_trained(
    conditioned_student: Path, students: dict[str, Path], tiny_files: ModelFiles
) -> None:
    weight = load_file(conditioned_student / GUIDANCE_FILE)["time_embedding.cond_proj.weight"]
    smooth = smooth_columns(weight.shape[1])
    assert 0 < smooth.sum() < len(smooth)
    assert (weight[:, smooth] != 0).any()
    assert (weight[:, ~smooth] == 0).all()
    ranged, fixed = (read_student(folder).trainable_parameters for folder in (conditioned_student, students["lora"]))
    assert ranged == fixed + weight[:, smooth].numel()
    config = DistillConfig(guidance=1.5, guidance_max=7.5)
    assert count_parameters(tiny_files, config)["trainable_parameters"] == ranged
    near, far = guidance_embedding(torch.tensor([3.0, 4.0]), weight.shape[1])
    assert (near - far)[smooth].abs().max() <= 1
