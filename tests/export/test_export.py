import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.families import FAMILIES
from boostdiff.engine.files import sha256_of
from boostdiff.engine.generate import draw
from boostdiff.engine.manifest import read_manifest, verified_file
from boostdiff.engine.merge import CHECK_TIMESTEPS, merge_and_check, merged_copy
from boostdiff.engine.model import Model, ModelFiles, locate
from boostdiff.engine.runners import GraphRunner, unavailable
from boostdiff.engine.sessions import OnnxSession
from boostdiff.engine.student import apply_student, read_student
from boostdiff.engine.trt import check_plan, load_tensorrt
from boostdiff.export.config import BATCH, ExportConfig, parse_range
from boostdiff.export.export import export, refuse_loss, up_to_date_engine
from boostdiff.export.graph import compare, graph_signature, onnx_from_part
from boostdiff.export.parts import Part, denoiser_part, text_encoder_part, vae_decoder_part
from boostdiff.export.plan import Backend, plan_in_a_process
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tiny import CPU, PROMPTS, with_another_unet

FAMILY = FAMILIES["StableDiffusionPipeline"]


@pytest.fixture
def engine(engines: dict[str, Path]) -> Path:
    return engines["lora"]


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
    cases = artefacts["unet/model.onnx"]["check"]["cases"]
    assert {f"batch {batch}, timestep 500" for batch in (1, 2, 4, 16)} <= set(cases)
    assert {f"batch 1, timestep {t}" for t in CHECK_TIMESTEPS} <= set(cases)
    assert "batch 2, timestep 500, 2 chunks of text" in cases
    assert all("check" in artefact for artefact in artefacts.values())
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
    assert set(plan["outputs"]) == {"out_sample"}
    with pytest.raises(BoostDiffError, match="needs an NVIDIA GPU"):
        check_plan(plan)
    load_tensorrt("tensorrt_rtx")
    with pytest.raises(BoostDiffError, match=r"run .* in another process"):
        load_tensorrt("tensorrt")


@pytest.mark.parametrize(
    ("capability", "version", "advice"),
    [
        ((8, 7), None, "export here with --trt-flavour tensorrt"),
        ((12, 1), "0.1", "export here with --trt-flavour tensorrt"),
        ((8, 9), "0.1", "export again with --trt"),
        ((8, 9), None, None),
    ],
)
def test_a_plan_for_other_hardware_says_what_helps(
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    version: str | None,
    advice: str | None,
) -> None:
    plan = dict(read_manifest(engine).artefacts["unet/model.plan"])
    plan["version"] = version or plan["version"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    if advice is None:
        check_plan(plan)
        return
    with pytest.raises(BoostDiffError) as refused:
        check_plan(plan)
    assert str(refused.value).endswith(advice)


def test_graphs_are_valid_and_take_any_batch(engine: Path, tiny: Model, students: dict[str, Path]) -> None:
    path = engine / "unet/model.onnx"
    onnx.checker.check_model(path)
    merged = merged_copy(tiny, students["lora"], read_student(students["lora"]))
    session = OnnxSession(path, device=CPU)
    with (
        GraphRunner(session, family=FAMILY, denoiser_config=read_manifest(engine).denoiser_config) as runner,
        torch.no_grad(),
    ):
        for batch in (1, 3, 17):
            inputs = tiny.family.example_inputs(tiny.pipeline, batch)
            torch.testing.assert_close(runner(**inputs).sample, merged(**inputs).sample, atol=1e-4, rtol=1e-3)


def tiny_part(model: Model, timesteps: tuple[int, ...] = (1, 500, 981)) -> Part:
    text = model.family.encode(model.pipeline, PROMPTS[:2]).conditional
    part = denoiser_part(model, model.denoiser, text, ExportConfig(), timesteps)
    part.compute_references()
    return part


def test_compare_refuses_another_network(engine: Path, tiny: Model) -> None:
    """The base is not the merged student: the gate must see that."""
    with OnnxSession(engine / "unet/model.onnx", device=CPU) as session:
        with pytest.raises(BoostDiffError, match=r"unet's onnx graph, out_sample at batch 1, timestep 500, differs"):
            compare(session, tiny_part(tiny).cases, what="unet", tolerance=1e-4)


def test_compare_refuses_nan(engine: Path, tiny: Model) -> None:
    class Broken(OnnxSession):
        def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
            super().run(inputs, outputs)
            outputs["out_sample"][0, 0, 0, 0] = float("nan")

    with Broken(engine / "unet/model.onnx", device=CPU) as session:
        with pytest.raises(BoostDiffError, match=r"batch 1, timestep 500, gives NaN or Inf"):
            compare(session, tiny_part(tiny).cases, what="unet", tolerance=1.0)


@pytest.mark.slow
def test_a_soft_prompt_is_in_the_graph_at_any_batch(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_files.folder.parent)
    files = locate(tiny_files.folder.name)
    config = DistillConfig(prompts=prompt_file, method="soft-prompt", tokens=3, updates=1, batch_size=2)
    distill(files, config, output=tmp_path / "s", device="cpu", observers=Observers(preview=False))
    # It compares batches of several sizes.
    manifest = export(files, ExportConfig(), student=tmp_path / "s", output=tmp_path / "engine", device="cpu")
    assert manifest.model == str(tiny_files.folder.resolve()), "a relative path is another's in another folder"


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

    merged = merged_copy(tiny, students["lora"], read_student(students["lora"]))
    with Engine.load(engine, runner="onnx", device="cpu") as exported:
        runner = exported.model.denoiser
        got = images(runner)
        with pytest.raises(InputError, match="not with transformers"):
            runner(hidden_states=torch.zeros(1, 4, 8, 8), timestep=3)
        with pytest.raises(InputError, match="can't take timestep_cond"):
            runner(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 16, 32), timestep_cond=torch.zeros(1))
    assert np.abs(got - images(merged)).max() <= 2 / 255
    assert np.abs(got - images(tiny.denoiser)).max() > 2 / 255


@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/model.onnx.data"])
def test_a_flipped_byte_is_refused(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(InputError, match="does not match its manifest"):
        Engine.load(copied, runner="onnx", device="cpu")


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
    copied: Path,
    engines: dict[str, Path],
    tiny_files: ModelFiles,
    students: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    reuse_graphs: Callable[..., None],
) -> None:
    reuse_graphs(engines["bitfit"])
    before = {path: sha256_of(path) for path in copied.rglob("*") if path.is_file()}
    monkeypatch.setattr("boostdiff.export.export.FP32_TOLERANCE", 0.0)
    with pytest.raises(BoostDiffError, match="differs from torch"):
        export(tiny_files, student=students["bitfit"], output=copied, device="cpu")
    assert {path: sha256_of(path) for path in copied.rglob("*") if path.is_file()} == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


@pytest.mark.parametrize("wanted", ["highest", "high"])
def test_references_are_computed_without_tf32(
    tiny_files: ModelFiles,
    students: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
) -> None:
    """The merge's check and the parts' references; afterwards the process is as it was, even after a failure."""
    seen = []

    def allowed() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def compute_references(part: Part) -> None:
        seen.append(allowed())
        raise BoostDiffError("far enough")

    def merged(*arguments: Any) -> Any:
        seen.append(allowed())
        return merge_and_check(*arguments)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        monkeypatch.setattr(Part, "compute_references", compute_references)
        monkeypatch.setattr("boostdiff.export.export.merge_and_check", merged)
        assert allowed() == (True, wanted)
        with pytest.raises(BoostDiffError, match="far enough"):
            export(tiny_files, student=students["lora"], output=tmp_path / "e", device="cpu")
        assert seen == [(False, "highest")] * 2
        assert allowed() == (True, wanted)
    finally:
        torch.set_float32_matmul_precision(before)


def test_runners_that_can_not_run_say_why(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert unavailable("onnx", manifest, CPU) is None
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in (unavailable("tensorrt", manifest, CPU) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_onnx_runtime_may_not_go_on_without_the_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu does where a library is missing: it lists its providers all the same."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BoostDiffError, match=r"could not start .* and took CPUExecutionProvider"):
        OnnxSession(engine / "unet/model.onnx", device=torch.device("cuda"))


def test_a_merged_unet_for_stock_diffusers(tiny: Model, students: dict[str, Path], engines: dict[str, Path]) -> None:
    assert "diffusers/unet/diffusion_pytorch_model.safetensors" in read_manifest(engines["bitfit"]).files
    stock = UNet2DConditionModel.from_pretrained(engines["bitfit"] / "diffusers", subfolder="unet")
    apply_student(tiny.denoiser, students["bitfit"], read_student(students["bitfit"]))
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).sample, tiny.denoiser(**inputs).sample, atol=1e-5, rtol=1e-4)


def test_exporting_again(
    copied: Path,
    engines: dict[str, Path],
    tiny_files: ModelFiles,
    students: dict[str, Path],
    reuse_graphs: Callable[..., None],
) -> None:
    """A stands; A again is instant, then B, then A: its files are back, and nothing of B is left."""
    first = {name: hash_ for name, hash_ in read_manifest(copied).files.items() if not name.endswith(".plan")}
    lines: list[str] = []

    def files_of(method: str, config: ExportConfig) -> dict[str, str]:
        reuse_graphs(engines[method])
        manifest = export(
            tiny_files, config, student=students[method], output=copied, device="cpu", report=lines.append
        )
        return manifest.files

    assert first.items() <= files_of("lora", ExportConfig(trt=True)).items()
    assert lines == [f"nothing has changed since the export in {copied}"]
    moved = replace(tiny_files, name="where/it/is/now")
    again = export(moved, ExportConfig(trt=True), student=students["lora"], output=copied, device="cpu")
    assert first.items() <= again.files.items()
    assert read_manifest(copied).model == "where/it/is/now"
    index = tiny_files.folder / "model_index.json"
    other_index = shutil.copytree(tiny_files.folder, copied.parent / "other model") / index.name
    other_index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": True}))
    assert locate(str(other_index.parent)).other_sha256() != tiny_files.other_sha256()
    foreign = copied / "tokenizer/added_tokens.json"
    foreign.write_text("{}")
    # Engines with it are refused, and another export is what that advises.
    assert up_to_date_engine(copied, again) is None
    foreign.unlink()
    other = files_of("bitfit", ExportConfig())
    assert other["unet/model.onnx.data"] != first["unet/model.onnx.data"]
    assert files_of("lora", ExportConfig(precision="both")) == first
    assert sum(line.startswith("nothing has changed") for line in lines) == 1


@pytest.mark.parametrize("name", ["text_encoder", pytest.param("vae_decoder", marks=pytest.mark.slow)])
def test_equal_parts_give_equal_bytes(engine: Path, tiny: Model, tmp_path: Path, name: str) -> None:
    """Exported again, they are what the engine holds."""
    config = ExportConfig()
    part = vae_decoder_part(tiny, config) if name == "vae_decoder" else text_encoder_part(tiny, name, PROMPTS, config)
    onnx_from_part(part, tmp_path / "model.onnx")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / file).read_bytes() == (engine / name / file).read_bytes()


def test_a_damaged_engine_is_exported_again(copied: Path) -> None:
    manifest = read_manifest(copied)
    assert up_to_date_engine(copied, manifest) == manifest
    assert up_to_date_engine(copied, replace(manifest, options={"precision": "fp16"})) is None
    assert up_to_date_engine(copied, replace(manifest, inputs=manifest.inputs | {"vae": "another"})) is None
    config = copied / "diffusers/model_index.json"
    config.parent.mkdir()
    config.write_text("{}")
    manifest.write(copied)
    assert up_to_date_engine(copied, manifest) == read_manifest(copied)
    # Whoever asks for this folder again has moved it.
    config.unlink()
    assert up_to_date_engine(copied, manifest) is None
    manifest.write(copied)
    data = copied / "unet/model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    assert up_to_date_engine(copied, manifest) is None
    data.unlink()
    assert up_to_date_engine(copied, manifest) is None


@pytest.mark.parametrize("name", ["notes.txt", "unet/mine.safetensors", "diffusers/README.md"])
def test_what_a_user_put_into_an_engine_is_not_removed(
    copied: Path, tiny_files: ModelFiles, students: dict[str, Path], name: str
) -> None:
    """The card of the folder for stock diffusers is there to be edited, which is no reason to export again."""
    path, manifest = copied / name, read_manifest(copied)
    path.parent.mkdir(exist_ok=True)
    if path.name == "README.md":
        path.write_text("a card")
        manifest.write(copied)
    path.write_text("mine")
    for allowed in (".DS_Store", "tokenizer/added_tokens.json"):
        (copied / allowed).touch()
    with pytest.raises(InputError, match=f"{name} was written or edited by another"):
        export(tiny_files, student=students["bitfit"], output=copied, device="cpu")
    assert path.read_text() == "mine"
    (copied / "tokenizer/added_tokens.json").unlink()
    assert up_to_date_engine(copied, manifest) == read_manifest(copied)
    path.unlink()
    if path.name == "README.md":
        path.write_text("a card")
    refuse_loss(copied)


@pytest.mark.parametrize("name", [pytest.param("my-notes.txt", marks=pytest.mark.slow), "unet/mine.safetensors"])
def test_what_a_user_puts_into_an_engine_during_an_export_is_not_removed(
    copied: Path,
    engines: dict[str, Path],
    tiny_files: ModelFiles,
    students: dict[str, Path],
    name: str,
    reuse_graphs: Callable[..., None],
) -> None:
    reuse_graphs(engines["bitfit"])
    with pytest.raises(InputError, match=rf"{name} was written .*; the finished one is in (.*)") as refused:
        export(
            tiny_files,
            student=students["bitfit"],
            output=copied,
            device="cpu",
            force=True,
            report=lambda message: (copied / name).write_text("mine"),
        )
    assert (copied / name).read_text() == "mine"
    finished = copied.with_name(f"{copied.name}-2")
    assert str(refused.value).endswith(str(finished))
    manifest = read_manifest(finished)
    assert up_to_date_engine(finished, manifest) == manifest


@pytest.mark.slow
def test_a_decoder_of_a_size_that_varies(tiny: Model, tmp_path: Path) -> None:
    part = vae_decoder_part(tiny, ExportConfig(size=(16, 16, 32)))
    part.compute_references()
    onnx_from_part(part, tmp_path / "model.onnx")
    latents = graph_signature(tmp_path / "model.onnx")["inputs"]["latent_sample"]
    assert latents["shape"] == ["batch", 4, "height", "width"]
    with OnnxSession(tmp_path / "model.onnx", device=CPU) as session:
        check = compare(session, part.cases, what="vae_decoder", tolerance=1e-4)
    assert {"batch 1, 8x8 latents", "batch 1, 16x16 latents"} <= set(check["cases"])


@pytest.mark.slow
def test_a_size_that_varies(
    engine: Path,
    tiny_files: ModelFiles,
    students: dict[str, Path],
    tmp_path: Path,
    reuse_graphs: Callable[..., None],
) -> None:
    reuse_graphs(engine, fresh=("unet", "vae_decoder"))
    config = ExportConfig(size=(16, 16, 32))
    manifest = export(tiny_files, config, student=students["lora"], output=tmp_path / "e", device="cpu")
    graph = manifest.artefacts["unet/model.onnx"]
    assert graph["inputs"]["sample"]["shape"] == ["batch", 4, "2*height", "2*width"]
    assert graph["inputs"]["encoder_hidden_states"]["shape"] == ["batch", "16*chunks", 32]
    assert {"batch 1, timestep 500, 16x16 latents", "batch 2, timestep 500, 2 chunks of text"} <= set(
        graph["check"]["cases"]
    )
    with pytest.raises(InputError, match="--precision both"):
        Engine.load(tmp_path / "e", precision="fp16")
    with Engine.load(tmp_path / "e", device="cpu") as opened:
        for height, width in ((16, 16), (32, 24)):
            drawing = GenerateConfig(
                prompts=list(PROMPTS[:2]), student=students["lora"], steps=3, height=height, width=width
            )
            paths = draw(tiny_files, drawing, output=tmp_path / f"{height}", device="cpu")
            got = opened(PROMPTS[:2], steps=3, height=height, width=width)
            for image, path in zip(got, paths, strict=True):
                assert image.size == (width, height)
                assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(path)).astype(int)).max() <= 1
        for size in ({"height": 40}, {"width": 20}, {"height": 8}):
            with pytest.raises(InputError, match=r"exported for 16 to 32, in 8s"):
                opened(PROMPTS[0], steps=1, **size)
        refused = replace(drawing, student=None, runner="onnx", engine=tmp_path / "e", width=64)
        with pytest.raises(InputError, match="can't draw 32x64 pixels"):
            draw(None, refused, output=tmp_path / "refused", device="cpu")
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_attention_scores_stay_in_fp32_where_the_model_asks(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, engine: Path, reuse_graphs: Callable[..., None]
) -> None:
    reuse_graphs(engine, fresh=("unet",))
    folder = with_another_unet(tiny_folder, tmp_path / "model", upcast_attention=True, mid_block_type=None)
    files = locate(str(folder))
    distill(
        files, DistillConfig(prompts=prompt_file, updates=1, batch_size=2), output=tmp_path / "student", device="cpu"
    )
    manifest = export(
        files, ExportConfig(precision="fp16"), student=tmp_path / "student", output=tmp_path / "e", device="cpu"
    )
    assert manifest.artefacts["unet/model.onnx"]["fp32_islands"] == ["attention scores"]
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "e/unet/model.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    softmax = [types[node.output[0]] for node in model.graph.node if node.op_type == "Softmax"]
    assert softmax
    assert set(softmax) == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "unknown precision"),
        ({"trt": True, "precision": "fp32"}, "builds from FP16"),
        ({"trt_flavour": "tensorrt_rtx"}, "--trt-flavour is not used without --trt"),
        ({"batch": (1, 1, 1)}, "--batch is not used without --trt"),
        ({"trt": True, "trt_flavour": "tensorflow"}, "unknown trt flavour"),
    ],
)
def test_options_that_can_not_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExportConfig(**options)


@pytest.mark.parametrize("text", ["", "x", "0", "4:1:16", "1:2", "1:2:3:4", "-1"])
def test_profiles_that_can_not_be_used(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="MIN:OPT:MAX"):
        parse_range(text)
    assert parse_range("3") == (3, 3, 3)
    assert parse_range(BATCH) == BATCH


def test_large_models_leave_the_fp32_graph_out() -> None:
    assert ExportConfig().precisions(865_910_724) == ("fp32",)
    assert ExportConfig(trt=True).precisions(865_910_724) == ("fp16",)
    assert ExportConfig(trt=True).precisions(6_000_000) == ("fp32", "fp16")
    assert ExportConfig(trt=True, precision="both").precisions(865_910_724) == ("fp32", "fp16")


def test_a_size_that_the_model_can_not_make(tiny_files: ModelFiles, students: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--size must be multiples of 8"):
        export(
            tiny_files, ExportConfig(size=(18, 18, 18)), student=students["lora"], output=tmp_path / "e", device="cpu"
        )
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
def test_a_plan_built_in_a_process_of_its_own(engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It equals the one that was built here but for its bytes, and its errors arrive as one line."""
    here = read_manifest(engine).artefacts["text_encoder/model.plan"]
    profile = {name: [tuple(shape) for shape in shapes] for name, shapes in here["profile"].items()}
    build = partial(plan_in_a_process, backend=Backend(name=here["flavour"], reason="a test"), profile=profile)
    entry = build(engine / "text_encoder/model.fp16.onnx", tmp_path / "model.plan")
    assert not capfd.readouterr().err, "libraries warn where they are imported"
    assert (tmp_path / "model.plan").stat().st_size > 1000
    assert {key: value for key, value in here.items() if key in entry} == entry | {"reason": here["reason"]}
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(BoostDiffError, match=r"can't build a plan from broken\.onnx"):
        build(tmp_path / "broken.onnx", tmp_path / "broken.plan")
    assert not (tmp_path / "broken.plan").exists()


def test_cases_of_a_plan_lie_within_its_profile(tiny: Model) -> None:
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2]).conditional
    part = denoiser_part(tiny, tiny.denoiser, text, ExportConfig(trt=True, batch=(3, 3, 4)), (1, 500))
    assert {case.where for case in part.planned_cases()} == {
        "batch 3, timestep 500, 2 chunks of text",
        "batch 3, timestep 500",
        "batch 4, timestep 500",
        "batch 3, timestep 1",
    }
    assert len(part.planned_cases()) < len(part.cases)


def test_cases_of_a_large_model(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few, one of them at a plan's smallest batch."""
    monkeypatch.setattr("boostdiff.export.parts.LARGE_PARAMETERS", 1)
    text = tiny.family.encode(tiny.pipeline, PROMPTS[:2]).conditional
    part = denoiser_part(tiny, tiny.denoiser, text, ExportConfig(batch=(8, 8, 16), trt=True), (1, 500, 981))
    assert part.large
    assert [case.where for case in part.cases] == ["batch 2, timestep 500", "batch 8, timestep 500"]
    assert [case.where for case in part.planned_cases()] == ["batch 8, timestep 500"]


def test_references_an_image_at_a_time_are_the_same(tiny: Model) -> None:
    part, whole = tiny_part(tiny), tiny_part(tiny)
    part.large = True
    part.compute_references()
    for case, other in zip(part.cases, whole.cases, strict=True):
        torch.testing.assert_close(case.expected, other.expected, atol=1e-5, rtol=1e-4)


def test_a_comparison_of_nothing_is_refused(engine: Path) -> None:
    with OnnxSession(engine / "unet/model.onnx", device=CPU) as session:
        with pytest.raises(BoostDiffError, match="no case suits it"):
            compare(session, [], what="unet", tolerance=1.0)


@pytest.mark.parametrize(("smallest", "expected"), [(1, [2, 2, 1]), (2, [2, 2, 2])])
def test_a_batch_beyond_the_largest_runs_in_several_goes(
    engine: Path, tiny: Model, smallest: int, expected: list[int]
) -> None:
    """As a plan's session does, whose profile has an end and may not begin at 1."""
    sizes = []

    class Small(OnnxSession):
        smallest_batch, largest_batch = smallest, 2

        def _execute(self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
            sizes.append(len(feeds["sample"]))
            super()._execute(feeds, outputs)

    path, config = engine / "unet/model.onnx", read_manifest(engine).denoiser_config
    inputs = tiny.family.example_inputs(tiny.pipeline, 5)
    with (
        GraphRunner(OnnxSession(path, device=CPU), family=FAMILY, denoiser_config=config) as whole,
        GraphRunner(Small(path, device=CPU), family=FAMILY, denoiser_config=config) as parts,
    ):
        torch.testing.assert_close(parts.predict(inputs), whole.predict(inputs), atol=1e-5, rtol=1e-4)
        for name in ("sample", "timestep", "encoder_hidden_states"):
            inputs[name] = inputs[name][:1]
        torch.testing.assert_close(parts.predict(inputs), whole.predict(inputs), atol=1e-5, rtol=1e-4)
    assert sizes == [*expected, smallest]
