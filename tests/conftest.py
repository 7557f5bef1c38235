"""Tiny models, made by the tests, and students trained on them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from boostdiff.export.graph import onnx_from_part
from boostdiff.export.parts import Part
from filelock import FileLock
from tiny import CPU, PROMPTS, make_pipeline


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of pytest-xdist's processes that needs it makes, for all of them."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory, "tiny", make_pipeline().save_pretrained)


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

    def make(folder: Path) -> None:
        for method in ("lora", "bitfit"):
            config = DistillConfig(method=method, prompts=prompt_file, updates=8, batch_size=4, learning_rate=0.02)
            distill(locate(str(tiny_folder)), config, output=folder / method, device="cpu")

    folder = shared(tmp_path_factory, "students", make)
    return {method: folder / method for method in ("lora", "bitfit")}


@pytest.fixture(scope="session")
def engines(tiny_folder: Path, students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of both students, never changed by a test: LoRA in every form, BitFit in FP32 and as a merged UNet."""
    configs = {"lora": ExportConfig(trt=True), "bitfit": ExportConfig(diffusers=True)}

    def make(folder: Path) -> None:
        for method, config in configs.items():
            export(locate(str(tiny_folder)), config, student=students[method], output=folder / method, device="cpu")

    folder = shared(tmp_path_factory, "engines", make)
    return {method: folder / method for method in configs}


@pytest.fixture
def reuse_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`reuse_graphs(engine, fresh=("unet",))`: exports take an engine's graphs, but for those parts."""

    def reuse(engine: Path, *, fresh: Sequence[str] = ()) -> None:
        def taken(part: Part, path: Path) -> None:
            if part.name in fresh:
                onnx_from_part(part, path)
                return
            half = next(part.module.parameters()).dtype == torch.float16
            name = "model.fp16.onnx" if half else "model.onnx"
            shutil.copy(engine / part.name / name, path)
            # The graph names the file of its weights.
            shutil.copy(engine / part.name / f"{name}.data", path.parent)

        monkeypatch.setattr("boostdiff.export.export.onnx_from_part", taken)

    return reuse
