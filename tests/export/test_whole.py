"""The comparison of the whole engine with the whole torch pipeline: what it finds where each part is right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.errors import BoostDiffError
from boostdiff.engine.exported import Engine
from boostdiff.engine.exported_parts import ExportedTextEncoder
from boostdiff.engine.manifest import read_manifest
from boostdiff.engine.model import ModelFiles, locate
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export, write_configs_and_tokenizers
from boostdiff.export.whole import IMAGE_TOLERANCE, LATENT_TOLERANCE
from diffusers import StableDiffusionPipeline
from tiny import PROMPTS


@pytest.fixture
def exported(
    engines: dict[str, Path], tiny_files: ModelFiles, students: dict[str, Path], reuse_graphs: Callable[..., None]
) -> Callable[..., list[str]]:
    """An export of the LoRA with the graphs of the engine that is there already; gives what it reports."""
    reuse_graphs(engines["lora"])

    def run(output: Path, precision: str | None = None) -> list[str]:
        lines: list[str] = []
        config = ExportConfig(precision=precision)
        export(tiny_files, config, student=students["lora"], output=output, device="cpu", report=lines.append)
        return lines

    return run


def test_images_are_compared_in_every_precision(exported: Callable[..., list[str]], tmp_path: Path) -> None:
    lines = exported(tmp_path / "engine", precision="both")
    checks = read_manifest(tmp_path / "engine").pipeline
    assert checks.keys() == {"onnx fp32", "onnx fp16"}
    for name, check in checks.items():
        precision = name.split()[1]
        assert 0 <= check["latents"] <= LATENT_TOLERANCE[precision]
        assert 0 <= check["image"] <= IMAGE_TOLERANCE[precision]
    # Another precision is another image: the comparison is of two things.
    assert 0 < checks["onnx fp32"]["latents"] < checks["onnx fp16"]["latents"]
    assert sum(line.startswith("pipeline: ") for line in lines) == 2


def edited(name: str, key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {key: value}))

    return edit


@pytest.mark.parametrize(
    ("damage", "difference"),
    [
        (edited("vae_decoder/config.json", "scaling_factor", 0.2), "image by"),
        (edited("tokenizer/tokenizer_config.json", "pad_token", "a"), "latents by"),
        pytest.param(edited("scheduler/scheduler_config.json", "beta_end", 0.02), "latents by", marks=pytest.mark.slow),
    ],
)
def test_what_is_lost_between_parts_is_found(
    exported: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    difference: str,
) -> None:
    """A scaling factor, the padding of the text, the scheduler: every graph equals torch's all the same."""

    def damaged(model: object, manifest: object, folder: Path, **options: bool) -> None:
        write_configs_and_tokenizers(model, manifest, folder, **options)
        damage(folder)

    monkeypatch.setattr("boostdiff.export.export.write_configs_and_tokenizers", damaged)
    with pytest.raises(BoostDiffError, match=rf"engine as a whole \(onnx fp32\) differs .* {difference}") as failed:
        exported(tmp_path / "engine")
    assert failed.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_vaes_scaling_factor_is_the_folders(
    tiny_folder: Path,
    students: dict[str, Path],
    engines: dict[str, Path],
    reuse_graphs: Callable[..., None],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    edited("vae/config.json", "scaling_factor", 0.7)(folder)
    reuse_graphs(engines["lora"])
    export(locate(str(folder)), student=students["lora"], output=tmp_path / "engine", device="cpu")
    reference = StableDiffusionPipeline.from_pretrained(folder)
    reference.load_lora_weights(students["lora"], weight_name=LORA_FILE)
    expected = reference(
        PROMPTS[0], num_inference_steps=3, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    with Engine.load(tmp_path / "engine", device="cpu") as engine:
        (image,) = engine(PROMPTS[0], steps=3)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


def test_a_text_encoder_that_loses_tokens_is_found(
    exported: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is right, and what hands it the tokens is not."""
    forward = ExportedTextEncoder.forward

    def shortened(self: ExportedTextEncoder, input_ids: torch.Tensor, *args: object, **options: object) -> object:
        return forward(self, torch.cat([input_ids[:, :4], input_ids[:, -1:].expand(-1, 12)], dim=1))

    monkeypatch.setattr(ExportedTextEncoder, "forward", shortened)
    with pytest.raises(BoostDiffError, match="latents by"):
        exported(tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []
