"""Normalizations trained beside another adapter."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.counts import count_parameters
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.adapters import BITFIT_FILE, LORA_FILE, BitFit
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import InputError
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance_input import make_adapter
from boostdiff.engine.merge import merge_and_check, merged_copy
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.norms import NORMS_FILE, Norms
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.sampling import generate
from boostdiff.engine.schedulers import make_scheduler
from boostdiff.engine.student import apply_student, read_student
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import CPU, PROMPTS, make_sd3_pipeline

SILENT = Observers(preview=False)
SD21 = Path(__file__).parents[2] / "benchmarks" / "configs" / "sd21-base"


def predict(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.denoiser(**model.family.example_inputs(model.pipeline, 2)).sample


@torch.no_grad()
def perturb(parameters: dict[str, torch.nn.Parameter]) -> None:
    torch.manual_seed(3)
    for parameter in parameters.values():
        parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="module")
def norm_students(tiny_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("norm-students")
    for method in ("lora", "bitfit"):
        config = DistillConfig(
            method=method, norms=True, prompts=prompt_file, updates=8, batch_size=4, learning_rate=0.02
        )
        distill(locate(str(tiny_folder)), config, output=root / method, device="cpu", observers=SILENT)
    return {method: root / method for method in ("lora", "bitfit")}


@pytest.mark.parametrize(("method", "expected"), [("lora", 1_860_224), ("bitfit", 443_844)])
def test_parameter_counts_at_stable_diffusion_21_size(method: str, expected: int) -> None:
    counts = count_parameters(locate(str(SD21)), DistillConfig(method=method, norms=True))
    assert counts == {"trainable_parameters": expected, "total_parameters": 865_910_724}


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_normalization_is_trained_and_disabled_is_the_teacher(
    tiny: Model, method: str, dtype: torch.dtype
) -> None:
    tiny.denoiser.to(dtype)
    norms = [m for m in tiny.denoiser.modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        adapter = make_adapter(method, tiny.denoiser, rank=4, norms=True)
        with adapter.disabled():
            teacher = predict(tiny)
        inputs = tiny.family.example_inputs(tiny.pipeline, 2)
        (tiny.denoiser(**inputs).sample - teacher - 1).square().mean().backward()
        trained = list(adapter.parameters().values())
        for norm in norms:
            for own in (norm.weight, norm.bias):
                assert any(own is each for each in trained)
                assert own.grad.abs().sum() > 0
        assert {parameter.dtype for parameter in trained} == {torch.float32}
        assert adapter.count() == sum(p.numel() for p in tiny.denoiser.parameters() if p.requires_grad)
        perturb({"x": norms[0].weight})
        student = predict(tiny)
        assert (student - teacher).abs().max() > 1e-3
        with adapter.disabled():
            assert torch.equal(predict(tiny), teacher)
        assert torch.equal(predict(tiny), student)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
@pytest.mark.parametrize("more", [{}, {"guidance_input": True}, {"live_negative_prompt": True}])
def test_it_is_read_from_what_it_saved(
    tiny: Model, tiny_files: ModelFiles, tmp_path: Path, method: str, more: dict[str, bool]
) -> None:
    options: dict[str, Any] = {"rank": 4, "norms": True, **more}
    adapter = make_adapter(method, tiny.denoiser, **options)
    perturb(adapter.parameters())
    files = {path.name for path in adapter.save(tmp_path, tiny.pipeline)}
    assert files >= {NORMS_FILE, BITFIT_FILE if method == "bitfit" else LORA_FILE}
    endings = {name.rpartition(".")[2] for name in load_file(tmp_path / NORMS_FILE)}
    assert endings == ({"weight"} if method == "bitfit" else {"weight", "bias"})
    other = make_adapter(method, load(tiny_files, device=CPU).denoiser, **options)
    other.load_for_training(tmp_path)
    got = other.parameters()
    for name, parameter in adapter.parameters().items():
        assert torch.equal(got[name], parameter)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_scaled_adapter_is_scaled_in_its_normalizations_too(tiny: Model, tiny_files: ModelFiles, method: str) -> None:
    adapter = make_adapter(method, tiny.denoiser, norms=True)
    name = next(name for name in adapter.parameters() if name.endswith("norm1.weight"))
    base = load(tiny_files, device=CPU).denoiser.get_parameter(name).detach()
    with torch.no_grad():
        adapter.parameters()[name].add_(0.5)
    adapter.scale(1.5)
    torch.testing.assert_close(adapter.parameters()[name].detach(), base + 0.75)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_student_is_merged_and_draws_the_same_in_the_stock_pipeline(
    tiny: Model, tiny_folder: Path, norm_students: dict[str, Path], method: str
) -> None:
    folder = norm_students[method]
    info = read_student(folder, tiny.files)
    assert NORMS_FILE in info.adapter_files
    drawing: dict[str, Any] = {
        "text": tiny.family.encode(tiny.pipeline, list(PROMPTS[:2])),
        "make_scheduler": lambda: tiny.make_scheduler("ddim"),
        "steps": 3,
        "seed": 0,
    }
    merged = merged_copy(tiny, folder, info)
    assert merge_and_check(load(tiny.files, device=CPU), folder, info).relative < 1e-5
    expected = generate(tiny, info.denoiser(TorchRunner(merged)), **drawing)
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    stock.scheduler = make_scheduler("ddim", stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    if method == "bitfit":
        BitFit.load(stock.unet, folder)
    else:
        stock.load_lora_weights(folder)

    def images() -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        made = stock(
            list(PROMPTS[:2]), num_inference_steps=3, guidance_scale=1.0, generator=generators, output_type="np"
        )
        return np.asarray(made.images.transpose(0, 3, 1, 2))

    assert np.abs(images() - expected.numpy()).max() > 1e-3
    Norms.load(stock.unet, folder)
    np.testing.assert_allclose(images(), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_it_is_trained_on_for_few_steps_and_resumed(
    tiny_files: ModelFiles, norm_students: dict[str, Path], prompt_file: Path, tmp_path: Path, method: str
) -> None:
    config = DistillConfig(
        prompts=prompt_file, start_from=norm_students[method], few_steps="8:4", stage_updates=3, batch_size=4
    )
    whole = distill(tiny_files, config, output=tmp_path / "a", device="cpu", observers=SILENT)
    assert whole.settings["norms"] is True
    assert NORMS_FILE in whole.adapter_files

    def stop(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observers = Observers(preview=False, on_update=stop)
        distill(
            tiny_files, config, RunConfig(checkpoint_every=1), output=tmp_path / "b", device="cpu", observers=observers
        )
    resumed = distill(tiny_files, config, RunConfig(resume=True), output=tmp_path / "b", device="cpu", observers=SILENT)
    assert resumed.adapter_files == whole.adapter_files


@pytest.mark.parametrize(
    "more",
    [
        {"base_precision": "int8"},
        {"base_precision": "int8", "method": "bitfit"},
        {"negative_prompt": "live"},
        {"guidance": 1.5, "guidance_max": 5.0, "method": "bitfit"},
    ],
)
def test_it_goes_with_other_kinds_of_students(
    tiny: Model, prompt_file: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    if "base_precision" in more:
        pytest.importorskip("torchao")
    config = DistillConfig(norms=True, prompts=prompt_file, updates=3, batch_size=4, learning_rate=0.02, **more)
    info = distill(tiny.files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    base = {name: p.clone() for name, p in tiny.denoiser.state_dict().items()}
    assert merge_and_check(tiny, tmp_path / "s", info).relative < 1e-4
    trained = load_file(tmp_path / "s" / NORMS_FILE)
    assert any((tensor - base[name]).abs().max() > 0.01 for name, tensor in trained.items())


@pytest.mark.parametrize("change", ["x.weight", "a shape"])
def test_parameters_that_do_not_fit_are_refused(
    tiny: Model, norm_students: dict[str, Path], tmp_path: Path, change: str
) -> None:
    folder = shutil.copytree(norm_students["lora"], tmp_path / "s")
    tensors = load_file(folder / NORMS_FILE)
    name = next(iter(tensors))
    tensors |= {change: torch.zeros(1)} if change == "x.weight" else {name: torch.zeros(1)}
    save_file(tensors, folder / NORMS_FILE)
    info = replace(read_student(norm_students["lora"]), model="m")
    with pytest.raises(InputError, match=r"does not fit m: .*(another adapter|has shape)"):
        apply_student(tiny.denoiser, folder, info)


@pytest.mark.parametrize(
    ("settings", "execution", "message"),
    [
        ({"method": "soft-prompt", "norms": True}, {}, "--norms is not used with --method soft-prompt"),
        ({"norms": True}, {"format": "kohya"}, "--format is not used with --norms"),
    ],
)
def test_what_does_not_go_with_it(
    tiny_files: ModelFiles,
    prompt_file: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    execution: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        distill(
            tiny_files,
            DistillConfig(prompts=prompt_file, updates=1, **settings),
            RunConfig(**execution),
            output=tmp_path / "s",
            device="cpu",
            observers=SILENT,
        )
    assert not (tmp_path / "s").exists()


def test_a_lora_scale_would_scale_half_of_it(
    tiny_files: ModelFiles, norm_students: dict[str, Path], tmp_path: Path
) -> None:
    config = GenerateConfig(prompts=["x"], student=norm_students["lora"], lora_scale=0.5, steps=2)
    with pytest.raises(InputError, match="not normalization-tuned ones"):
        draw(tiny_files, config, output=tmp_path, device="cpu")


def test_transformers_have_other_normalizations() -> None:
    with pytest.raises(InputError, match="--norms is for UNets, not for a stable-diffusion-3 model"):
        make_adapter("lora", make_sd3_pipeline(t5=False).transformer.requires_grad_(False), norms=True)
