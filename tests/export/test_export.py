import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.families import PromptEmbeds
from boostdiff.engine.files import sha256_of
from boostdiff.engine.manifest import read_manifest, verified_file
from boostdiff.engine.model import Model, ModelFiles
from boostdiff.engine.runners import (
    OnnxRunner,
    TorchRunner,
    available_runners,
    check_plan,
    load_tensorrt,
    open_exported,
)
from boostdiff.engine.student import apply_student, read_student
from boostdiff.export.export import export
from boostdiff.export.graph import compare
from boostdiff.export.merge import merge
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny import CPU, PROMPTS


@pytest.fixture(scope="module")
def engine(tiny_folder: Path, students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from boostdiff.engine.model import locate

    folder = tmp_path_factory.mktemp("engines") / "engine"
    export(locate(str(tiny_folder)), student=students["lora"], output=folder, trt=True, device="cpu")
    return folder


@pytest.fixture
def copied(engine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(engine, tmp_path / "engine")


def test_the_manifest_lists_and_hashes_everything(engine: Path) -> None:
    manifest = read_manifest(engine)
    written = {p.relative_to(engine).as_posix() for p in engine.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest.files) == written
    assert {"unet/model.onnx", "unet/model.fp16.onnx", "unet/model.plan"} <= written
    assert all(sha256_of(engine / name) == digest for name, digest in manifest.files.items())
    assert manifest.merge["relative"] < 1e-4


def test_graphs_were_compared_within_tolerance(engine: Path) -> None:
    artefacts = read_manifest(engine).artefacts
    assert artefacts["unet/model.onnx"]["check"]["relative"] <= 1e-4
    assert artefacts["unet/model.onnx"]["check"]["batches"] == [1, 2, 8]
    assert artefacts["unet/model.fp16.onnx"]["check"]["relative"] <= 3e-2
    assert artefacts["unet/model.fp16.onnx"]["inputs"]["sample"] == {
        "type": "float16",
        "shape": ["batch", 4, 8, 8],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_the_plan_is_built_but_not_claimed_to_have_run(engine: Path) -> None:
    plan = read_manifest(engine).artefacts["unet/model.plan"]
    assert (engine / "unet/model.plan").stat().st_size > 1000
    assert plan["flavour"] == "tensorrt_rtx"
    assert plan["check"].startswith("built, not run")
    assert plan["profile"]["sample"] == [[1, 4, 8, 8], [4, 4, 8, 8], [16, 4, 8, 8]]
    assert set(plan["inputs"]) == {"sample", "timestep", "encoder_hidden_states"}
    assert set(plan["outputs"]) == {"noise_pred"}
    with pytest.raises(BoostDiffError, match="needs an NVIDIA GPU"):
        check_plan(plan)
    with pytest.raises(BoostDiffError, match="needs a process of its own"):
        load_tensorrt("tensorrt")


def test_graphs_are_valid_and_take_any_batch(engine: Path, tiny: Model, students: dict[str, Path]) -> None:
    path = engine / "unet/model.onnx"
    onnx.checker.check_model(path)
    merged = merge(tiny, students["lora"], read_student(students["lora"]))
    with (
        OnnxRunner(path, unet_config=read_manifest(engine).unet_config, device=CPU) as runner,
        torch.no_grad(),
    ):
        for batch in (1, 3, 17):
            inputs = tiny.family.example_inputs(tiny.pipeline, batch)
            torch.testing.assert_close(runner(**inputs).sample, merged(**inputs).sample, atol=1e-4, rtol=1e-3)


def test_compare_refuses_another_network(engine: Path, tiny: Model) -> None:
    """The base is not the merged student: the gate must see that."""
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    text = PromptEmbeds(encoder_hidden_states=inputs["encoder_hidden_states"])
    with OnnxRunner(engine / "unet/model.onnx", unet_config=dict(tiny.unet.config), device=CPU) as runner:
        with pytest.raises(BoostDiffError, match=r"differs from torch by .* at batch 1, timestep 500"):
            compare(
                runner, reference=tiny.unet, inputs=inputs, text=text, batches=(1,), timesteps=(500,), tolerance=1e-4
            )


def test_compare_refuses_nan(tiny: Model) -> None:
    class Broken(TorchRunner):
        def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().predict(inputs) * float("nan")

    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    text = PromptEmbeds(encoder_hidden_states=inputs["encoder_hidden_states"])
    with pytest.raises(BoostDiffError, match="NaN or Inf"):
        compare(
            Broken(tiny.unet),
            reference=tiny.unet,
            inputs=inputs,
            text=text,
            batches=(2,),
            timesteps=(9,),
            tolerance=1.0,
        )


def test_the_onnx_runner_drives_a_stock_pipeline(
    engine: Path, tiny_folder: Path, tiny: Model, students: dict[str, Path]
) -> None:
    def images(unet: object) -> np.ndarray:
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.unet = unet
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            PROMPTS[0], num_inference_steps=4, guidance_scale=1, generator=generator, output_type="np"
        ).images

    merged = merge(tiny, students["lora"], read_student(students["lora"]))
    with open_exported("onnx", folder=engine, manifest=read_manifest(engine), device=CPU) as runner:
        got = images(runner)
        with pytest.raises(InputError, match="can't take timestep_cond"):
            runner(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 16, 32), timestep_cond=torch.zeros(1))
    assert np.abs(got - images(merged)).max() <= 2 / 255
    assert np.abs(got - images(tiny.unet)).max() > 2 / 255


@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/model.onnx.data"])
def test_a_flipped_byte_is_refused(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(InputError, match="does not match its manifest"):
        open_exported("onnx", folder=copied, manifest=read_manifest(copied), device=CPU)


def test_missing_files_are_refused(copied: Path) -> None:
    manifest = read_manifest(copied)
    (copied / "unet/model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"model\.onnx\.data is missing"):
        verified_file(copied, manifest, "unet/model.onnx")
    with pytest.raises(InputError, match="export it first"):
        verified_file(copied, manifest, "vae/model.onnx")
    (copied / "manifest.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(InputError, match="export again"):
        read_manifest(copied)
    (copied / "manifest.json").unlink()
    with pytest.raises(InputError, match="run `boostdiff export` first"):
        read_manifest(copied)


def test_a_failed_export_leaves_the_earlier_engine(
    copied: Path, tiny_files: ModelFiles, students: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: sha256_of(path) for path in copied.rglob("*") if path.is_file()}
    monkeypatch.setattr("boostdiff.export.export.FP32_TOLERANCE", 0.0)
    with pytest.raises(BoostDiffError, match="differs from torch"):
        export(tiny_files, student=students["bitfit"], output=copied, device="cpu")
    assert {path: sha256_of(path) for path in copied.rglob("*") if path.is_file()} == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_runners_that_can_not_run_say_why(engine: Path) -> None:
    reasons = available_runners(read_manifest(engine), CPU)
    assert reasons["torch"] is None
    assert reasons["onnx"] is None
    if not torch.cuda.is_available():
        assert "GPU" in (reasons["tensorrt"] or "")


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_merged_unet_for_stock_diffusers(
    tiny: Model, tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path, method: str
) -> None:
    manifest = export(tiny_files, student=students[method], output=tmp_path / "engine", diffusers=True, device="cpu")
    assert "unet/diffusion_pytorch_model.safetensors" in manifest.files
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "engine", subfolder="unet")
    apply_student(tiny, students[method])
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).sample, tiny.unet(**inputs).sample, atol=1e-5, rtol=1e-4)
