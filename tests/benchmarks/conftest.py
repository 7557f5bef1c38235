"""One benchmark of the tiny model, shared by the tests that look at it."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.benchmarks.bench import BenchResult, bench
from boostdiff.benchmarks.config import BenchConfig, Metrics
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features, features_of
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.benchmarks.report.report import write_report
from boostdiff.engine.model import locate
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from tiny import ONNX_FROM_PART, PROMPTS, graphs_of, make_words, shared
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
)

MANY = [f"{prompt} on a red background" for prompt in PROMPTS] * 6


@pytest.fixture(scope="session")
def engine(
    tiny_folder: Path, students: dict[str, Path], engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of the LoRA, in FP32 alone."""
    folder = tmp_path_factory.mktemp("engines") / "lora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNX_FROM_PART, graphs_of(engines["lora"]))
        export(locate(str(tiny_folder)), ExportConfig(), student=students["lora"], output=folder, device="cpu")
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=generator)
    features = features_of(EfficientNetLite0Features(), images)
    path = tmp_path_factory.mktemp("reference") / "r.safetensors"
    Reference.of(features[:20], features[20:]).save(path)
    return path


@pytest.fixture(scope="session")
def result(
    tiny_folder: Path,
    students: dict[str, Path],
    engine: Path,
    clip_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> BenchResult:
    """Made by one process of several, as it takes long."""

    def make(folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (26, 3, 16, 16), dtype=torch.uint8, generator=generator)
        features = features_of(EfficientNetLite0Features(), images)
        reference = folder / "r.safetensors"
        Reference.of(features[:16], features[16:]).save(reference)
        measured = bench(
            locate(str(tiny_folder)),
            BenchConfig(steps=3, batch_sizes=(2, 1), runs=3, samples=8, alternatives=True, compile=False),
            students=[students["lora"], students["bitfit"]],
            engine=engine,
            prompts=MANY,
            metrics=Metrics(reference=reference, clip=str(clip_folder)),
            device="cpu",
        )
        (folder / "result.pickle").write_bytes(pickle.dumps(measured))

    return pickle.loads((shared(tmp_path_factory, "bench", make) / "result.pickle").read_bytes())  # noqa: S301


@pytest.fixture(scope="session")
def report_folder(result: BenchResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(result, folder)
    return folder


@pytest.fixture(scope="session")
def written_report(report_folder: Path) -> dict[str, Any]:
    return json.loads((report_folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model, tiny and random."""
    torch.manual_seed(0)
    tokenizer, text = make_words()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder
