"""Tiny models, made by the tests, and students trained on them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from tiny import CPU, PROMPTS, make_pipeline


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny_files(tiny_folder: Path) -> ModelFiles:
    return locate(str(tiny_folder))


@pytest.fixture
def tiny(tiny_files: ModelFiles) -> Model:
    return load(tiny_files, device=CPU)


@pytest.fixture(scope="session")
def students(tiny_folder: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of the tiny model by each method, trained far enough to differ from the base."""
    folder = tmp_path_factory.mktemp("students")
    for method in ("lora", "bitfit"):
        config = DistillConfig(method=method, prompts=prompt_file, updates=8, batch_size=4, learning_rate=0.02)
        distill(locate(str(tiny_folder)), config, output=folder / method, device="cpu")
    return {method: folder / method for method in ("lora", "bitfit")}


@pytest.fixture(scope="session")
def engines(tiny_folder: Path, students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of both students, never changed by a test: LoRA in every form, BitFit in FP32 and as a merged UNet."""
    folder = tmp_path_factory.mktemp("engines")
    configs = {"lora": ExportConfig(trt=True), "bitfit": ExportConfig(diffusers=True)}
    for method, config in configs.items():
        export(locate(str(tiny_folder)), config, student=students[method], output=folder / method, device="cpu")
    return {method: folder / method for method in configs}
