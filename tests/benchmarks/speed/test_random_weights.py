import re
import shutil
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.bench import bench_random
from boostdiff.benchmarks.config import BenchConfig
from boostdiff.benchmarks.speed import random_weights
from boostdiff.benchmarks.speed.random_weights import CONFIGS, PUBLIC, locate_configs, random_model
from boostdiff.benchmarks.studies.__main__ import app
from boostdiff.engine.errors import InputError
from boostdiff.engine.model import load, locate
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import CPU, make_xl_pipeline
from transformers import CLIPTextConfig, CLIPTextModel
from typer.main import get_command


@pytest.fixture
def configs(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model's configuration alone."""
    for path in tiny_folder.rglob("*.json"):
        if path.parent.name != "tokenizer" or path.name == "tokenizer_config.json":
            target = tmp_path / "tiny" / path.relative_to(tiny_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    ("name", "unet", "text_encoder"), [("sd15", 859_520_964, 123_060_480), ("sd21-base", 865_910_724, 340_387_840)]
)
def test_shipped_configurations_have_the_models_parameters(name: str, unet: int, text_encoder: int) -> None:
    files = locate_configs(name)
    assert files.name == name
    with torch.device("meta"):
        modules = (
            files.empty_denoiser(),
            CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / name / "text_encoder")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / name / "vae")),
        )
    counts = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert counts == [unet, text_encoder, 83_653_863]


def test_page_and_help_have_the_name_of_every_configuration() -> None:
    docs = Path(random_weights.__file__).parents[2] / "docs/benchmark.md"
    (text,) = (part for part in docs.read_text(encoding="utf-8").split("\n\n") if "From a configuration alone" in part)
    assert re.findall(r"`([\w-]+)`", text) == PUBLIC == sorted(path.name for path in CONFIGS.iterdir())
    for study in ("profile", "layouts", "random-folder", "full-size"):
        parameters = get_command(app).commands[study].params
        assert any(", ".join(PUBLIC) in str(getattr(each, "help", "")) for each in parameters), study


def test_speed_from_configurations_alone(configs: Path) -> None:
    config = BenchConfig(steps=2, runs=3, samples=0, batch_sizes=(1, 2), compile=False)
    result = bench_random(locate_configs(str(configs)), config, device="cpu")
    assert {row.runner for row in result.speed.rows} == {"torch", "stock diffusers"}
    assert len(result.speed.rows) == 8
    assert result.quality is None
    assert result.provenance["weights"] == "random"


def test_random_weights_are_the_seeds(configs: Path) -> None:
    files = locate_configs(str(configs))
    one, same, other = (random_model(files, device=torch.device("cpu"), seed=seed) for seed in (0, 0, 1))
    assert isinstance(one.denoiser, UNet2DConditionModel)
    assert torch.equal(one.denoiser.conv_in.weight, same.denoiser.conv_in.weight)
    assert not torch.equal(one.denoiser.conv_in.weight, other.denoiser.conv_in.weight)
    assert one.family.encode(one.pipeline, ["x"]).conditional.encoder_hidden_states.shape == (1, 16, 32)


def test_what_overflows_in_half_precision_stays_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_xl_pipeline().save_pretrained(tmp_path)
    monkeypatch.setattr(random_weights, "default_dtype", lambda device, family: torch.float16)
    made = random_model(locate(str(tmp_path)), device=CPU)
    loaded = load(locate(str(tmp_path)), device=CPU, dtype=torch.float16)
    for model in (made, loaded):
        assert (model.denoiser.dtype, model.pipeline.vae.dtype) == (torch.float16, torch.float32)
        assert not any(p.requires_grad for p in model.denoiser.parameters())


def test_no_such_configuration(configs: Path) -> None:
    with pytest.raises(InputError, match="for random weights also chroma1-hd, "):
        locate_configs("sd16")
    (configs / "vae/config.json").unlink()
    with pytest.raises(InputError, match=r"vae/config\.json is missing"):
        locate_configs(str(configs))
