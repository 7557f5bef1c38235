"""Base weights in 8 bits while an adapter is trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill, dry_run
from boostdiff.distill.loop import Observers
from boostdiff.engine.adapters import BITFIT_FILE, LORA_FILE
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.generate import draw
from boostdiff.engine.guidance_input import make_adapter
from boostdiff.engine.int8_weights import freeze_int8
from boostdiff.engine.model import ModelFiles, load, locate
from boostdiff.engine.student import read_student
from PIL import Image
from safetensors.torch import load_file
from tiny import CPU, PROMPTS, make_pipeline, make_sd3_pipeline

SILENT = Observers(preview=False)


@pytest.fixture(scope="module", params=["sd", "sd3"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("base") / request.param
    (make_sd3_pipeline() if request.param == "sd3" else make_pipeline()).save_pretrained(folder)
    return locate(str(folder))


def config_of(prompt_file: Path, **options: object) -> DistillConfig:
    settings = {"base_precision": "int8", "updates": 12, "batch_size": 2, "learning_rate": 0.02}
    return DistillConfig(prompts=prompt_file, **settings | options)


def trained(files: ModelFiles, config: DistillConfig, folder: Path) -> dict[str, torch.Tensor]:
    distill(files, config, output=folder, device="cpu", observers=SILENT)
    return load_file(folder / (BITFIT_FILE if config.method == "bitfit" else LORA_FILE))


def test_the_denoisers_linear_layers_alone_are_in_8_bits(files: ModelFiles) -> None:
    from torchao.quantization import Int8Tensor

    model, full = load(files, device=CPU, int8=True), load(files, device=CPU)
    weights = {name: m.weight for name, m in model.denoiser.named_modules() if isinstance(m, torch.nn.Linear)}
    assert weights
    assert all(isinstance(weight, Int8Tensor) for weight in weights.values())
    for name, weight in weights.items():
        own = full.denoiser.get_submodule(name).weight
        assert (weight.dequantize() - own).abs().max() <= own.abs().max() / 127
    others = [p for part in ("vae", *files.family.text_encoders) for p in getattr(model.pipeline, part).parameters()]
    assert not any(isinstance(parameter, Int8Tensor) for parameter in others)


def test_no_weight_is_kept_in_full_for_the_backward_pass(files: ModelFiles) -> None:
    def kept(int8: bool) -> tuple[int, torch.Tensor]:
        model, storages = load(files, device=CPU, int8=int8), dict[int, int]()
        model.denoiser.requires_grad_(False)
        adapter = make_adapter("bitfit", model.denoiser)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 2 and tuple(tensor.shape) in shapes:
                storages[id(tensor)] = tensor.numel()
            return tensor

        linear = [m.weight for m in model.denoiser.modules() if isinstance(m, torch.nn.Linear)]
        shapes = {tuple(w.shape) for w in linear} | {tuple(w.shape)[::-1] for w in linear}
        inputs = model.family.example_inputs(model.pipeline, 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.family.forward(model.denoiser, inputs)
            output.sum().backward()
        gradient = next(p.grad for name, p in adapter.parameters().items() if p.grad is not None and p.grad.any())
        return sum(storages.values()), gradient

    (full, expected), (int8, got) = kept(False), kept(True)
    assert int8 <= full
    torch.testing.assert_close(got, expected, atol=0.05 * expected.abs().max().item(), rtol=0.1)


def test_products_in_fp16_do_not_overflow() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(1280, 64, bias=False)).half()
    torch.nn.init.constant_(layer[0].weight, 0.03)
    quantize_(layer, Int8WeightOnlyConfig())
    freeze_int8(layer)
    x = torch.full((2, 1280), 5.0, dtype=torch.float16)
    # 1280 products of 5 and 127, which are scaled in the end, would be 812,800.
    assert layer(x).isfinite().all()
    assert layer(x)[0, 0].item() == pytest.approx(192, rel=0.02)


@pytest.mark.parametrize("method", ["lora", pytest.param("bitfit", marks=pytest.mark.slow)])
def test_the_student_belongs_to_the_model_in_full(
    files: ModelFiles, prompt_file: Path, tmp_path: Path, method: str
) -> None:
    got = trained(files, config_of(prompt_file, method=method), tmp_path / "int8")
    full = trained(files, config_of(prompt_file, method=method, base_precision=None), tmp_path / "full")
    assert got.keys() == full.keys()
    one, other = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in (got, full))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9
    assert not torch.equal(one, other)
    info = read_student(tmp_path / "int8", files)
    assert info.settings["base_precision"] == "int8"
    images = [
        np.asarray(Image.open(path)).astype(int)
        for student in ("int8", "full")
        for path in draw(
            files,
            GenerateConfig(prompts=[PROMPTS[0]], student=tmp_path / student, steps=3),
            output=tmp_path / f"images-{student}",
            device="cpu",
        )
    ]
    assert images[0].std() > 1
    assert np.abs(images[0] - images[1]).mean() < 4


def test_a_resumed_run_gives_the_same_bytes(files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    trained(files, config_of(prompt_file), tmp_path / "whole")

    def stop(report: object) -> None:
        if report.update == 7:
            raise KeyboardInterrupt

    observers = Observers(preview=False, on_update=stop)
    with pytest.raises((KeyboardInterrupt, BoostDiffError)):
        distill(
            files,
            config_of(prompt_file),
            RunConfig(checkpoint_every=5),
            output=tmp_path / "resumed",
            device="cpu",
            observers=observers,
        )
    execution = RunConfig(resume=True)
    info = distill(
        files, config_of(prompt_file), execution, output=tmp_path / "resumed", device="cpu", observers=SILENT
    )
    assert info.result["resumed_at"] == 5
    assert (tmp_path / "resumed" / LORA_FILE).read_bytes() == (tmp_path / "whole" / LORA_FILE).read_bytes()


def test_memory_is_counted(files: ModelFiles, prompt_file: Path) -> None:
    """What a dry run counts is what the weights take."""

    def held(int8: bool) -> int:
        weights = load(files, device=CPU, int8=int8).denoiser.parameters()
        # An 8-bit tensor is made of two: its numbers and its scales.
        made_of = ([getattr(p, name) for name in getattr(p, "tensor_data_names", ())] or [p] for p in weights)
        return sum(tensor.nbytes for tensors in made_of for tensor in tensors)

    for int8 in (False, True):
        config = config_of(prompt_file, base_precision="int8" if int8 else None)
        config = config.resolved(in_bfloat16=False, embedded=False)
        counted = dry_run(files, config, RunConfig(), CPU)["memory_bytes"][files.family.denoiser]
        assert counted == held(int8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "dora"}, "--base-precision int8 does not go with --method dora"),
        ({"method": "soft-prompt"}, "--base-precision int8 does not go with --method soft-prompt"),
        ({"few_steps": "8:4"}, "--base-precision int8 does not go with --few-steps"),
    ],
)
def test_what_does_not_go_with_it(prompt_file: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config_of(prompt_file, **options)


def test_torchao_is_not_there(
    files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boostdiff.distill.distill.is_installed", lambda name: name != "torchao")
    with pytest.raises(InputError, match=r"pip install -e '\.\[quantize\]'"):
        distill(files, config_of(prompt_file), output=tmp_path / "student", device="cpu", observers=SILENT)
    assert not (tmp_path / "student").exists()
