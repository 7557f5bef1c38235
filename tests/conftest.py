"""Tiny models, made by the tests, and students trained on them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from tiny import CPU, ONNX_FROM_PART, PROMPTS, graphs_of, make_pipeline, shared


@pytest.fixture(scope="session", autouse=True)
def short_previews() -> Iterator[None]:
    """Two steps: of a random model's picture twenty show no more, and they would be most of a short training's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("boostdiff.distill.preview.PREVIEW_STEPS", 2)
        yield


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
            distill(
                locate(str(tiny_folder)),
                config,
                output=folder / method,
                device="cpu",
                observers=Observers(preview=False),
            )

    folder = shared(tmp_path_factory, "students", make)
    return {method: folder / method for method in ("lora", "bitfit")}


@pytest.fixture(scope="session")
def engines(tiny_folder: Path, students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of both students, never changed by a test: LoRA in every form, BitFit in FP32 and as a merged UNet."""
    configs = {"lora": ExportConfig(trt=True), "bitfit": ExportConfig(diffusers=True)}

    def make(folder: Path) -> None:
        for method, config in configs.items():
            with pytest.MonkeyPatch.context() as patch:
                if method == "bitfit":
                    # The other parts are the same.
                    patch.setattr(ONNX_FROM_PART, graphs_of(folder / "lora", fresh=("unet",)))
                export(locate(str(tiny_folder)), config, student=students[method], output=folder / method, device="cpu")

    folder = shared(tmp_path_factory, "engines", make)
    return {method: folder / method for method in configs}


@pytest.fixture
def reuse_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`reuse_graphs(engine, fresh=("unet",))`: exports take an engine's graphs, but for those parts."""

    def reuse(engine: Path, *, fresh: Sequence[str] = ()) -> None:
        monkeypatch.setattr(ONNX_FROM_PART, graphs_of(engine, fresh=fresh))

    return reuse
