import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.engine import embedded
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import read_json, sha256_of, write_json
from boostdiff.engine.model import Model, load, locate, resolve_device
from boostdiff.engine.student import read_student
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_the_embedded_model_is_a_stock_pipeline_under_16_megabytes() -> None:
    files = locate("emoji64")
    model = load(files, device=CPU)
    assert model.latent_shape == (4, 16, 16)
    assert model.pipeline.scheduler.config.prediction_type == "epsilon"
    assert sum(path.stat().st_size for path in files.folder.rglob("*") if path.is_file()) <= 16e6


def test_the_embedded_model_loads_in_stock_diffusers_without_options() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.MODEL_DIR)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("noto emoji of cat on a red background", num_inference_steps=2).images[0].size == (64, 64)


@pytest.mark.parametrize("name", ["missing", "./missing/folder", "organisation/missing"])
def test_a_missing_model_says_what_to_pass(name: str) -> None:
    with pytest.raises(InputError, match="diffusers pipeline folder or a hub id"):
        locate(name)


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_that_cannot_be_reached_is_named(weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="in the hub's cache, and the hub says: Cannot reach ") as raised:
        locate("organisation/missing", weights=weights)
    assert "stacktrace" not in str(raised.value)


@pytest.mark.parametrize("code", ["403 Client Error.\n\nCannot access gated repo", "404 Client Error.\n\nNot Found"])
def test_what_the_hub_answers_is_said_to_its_last_line(
    code: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise OSError("not cached: check out the root cause in the stacktrace above") from RuntimeError(code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("boostdiff.engine.hub.snapshot_download", refused)
        with pytest.raises(InputError, match=r"there is no model .* a hub id \(") as raised:
            locate("organisation/gated")
        assert f"the hub says: {' '.join(code.split())})" in str(raised.value)
    monkeypatch.setattr("boostdiff.engine.hub.snapshot_download", lambda *arguments, **options: tiny_folder)
    monkeypatch.setattr(DiffusionPipeline, "download", refused)
    with pytest.raises(InputError, match="can't fetch the weights of organisation/gated: the hub says: ") as raised:
        load(locate("organisation/gated"), device=CPU)
    assert str(raised.value).endswith(" ".join(code.split()))


def test_a_hub_id_is_read_from_the_cache(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and for its configuration no weights are asked for, which are looked for when they are read."""
    entry = tmp_path / "models--organisation--tiny"
    snapshot = entry / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_folder, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (entry / "refs").mkdir()
    (entry / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = locate("organisation/tiny", weights=False)
    assert files.folder == snapshot
    assert files.empty_denoiser().config.cross_attention_dim == 32
    files = locate("organisation/tiny")
    shutil.copytree(tiny_folder, snapshot, dirs_exist_ok=True)
    assert load(files, device=CPU).files.folder == snapshot


def test_weights_are_hashed_once_while_they_stay(
    copied: Path, students: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr("boostdiff.engine.model.sha256_of", counted)
    files = locate(str(copied))
    assert read_student(students["lora"], files) == read_student(students["lora"], files)
    assert read == ["diffusion_pytorch_model.safetensors"]
    path = copied / "unet" / read[0]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="belongs to another model"):
        read_student(students["lora"], files)
    assert len(read) == 2


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_of_other_parts_are_hashed_once_while_they_stay(
    copied: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.parent.name)
        return sha256_of(path)

    monkeypatch.setattr("boostdiff.engine.model.sha256_of", counted)
    files, (path,) = locate(str(copied)), (copied / part).glob("*.safetensors")
    first = files.other_sha256()
    assert files.other_sha256() == first
    # Its configuration, which is small, twice.
    assert read.count(part) == 3
    path.write_bytes(path.read_bytes() + b"\0")
    assert [name for name, value in files.other_sha256().items() if value != first[name]] == [part]


def test_a_checkpoint_in_one_file_says_how_to_convert_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match=r"from_single_file\('.*model\.safetensors'\)\.save_pretrained"):
        locate(str(file))


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index\.json"):
        locate(str(tmp_path))


def test_a_folder_without_a_unet(copied: Path) -> None:
    shutil.rmtree(copied / "unet")
    with pytest.raises(InputError, match=r"has no unet: unet/config\.json is missing"):
        locate(str(copied))


def test_an_unsupported_pipeline_class(copied: Path) -> None:
    write_json(copied / "model_index.json", read_json(copied / "model_index.json") | {"_class_name": "FluxPipeline"})
    with pytest.raises(InputError, match="FluxPipeline are not supported"):
        locate(str(copied))


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_truncated_weights(copied: Path, component: str) -> None:
    path = copied / component / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="can't load the model"):
        load(locate(str(copied)), device=CPU)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused(copied: Path, component: str) -> None:
    """transformers would draw random numbers for it."""
    (path,) = (copied / component).glob("*.safetensors")
    tensors = load_file(path)
    # Of these text encoders the position embedding is not tied to another.
    gone = next(name for name in sorted(tensors) if "position_embedding" in name or "conv_out.weight" in name)
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{component} lacks tensors \(1, such as .*{gone.split('.')[-2]}"):
        load(locate(str(copied)), device=CPU)


def test_weights_that_were_saved_with_a_lora_loaded_are_refused(copied: Path) -> None:
    (path,) = (copied / "unet").glob("*.safetensors")
    tensors = {name.replace("to_q.weight", "to_q.base_layer.weight"): x for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"unet lacks tensors .*to_q\.weight.*unload_lora_weights"):
        load(locate(str(copied)), device=CPU)


@pytest.mark.parametrize("name", ["model_index.json", "unet/diffusion_pytorch_model.safetensors"])
def test_links_that_lead_nowhere_are_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    (copied / name).symlink_to("../../blobs/0123")
    with pytest.raises(InputError, match=rf"{Path(name).name} is a link to nothing: .*cp -rL"):
        locate(str(copied)).denoiser_weights()


def test_pickled_weights_are_refused(copied: Path) -> None:
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(InputError, match="only safetensors"):
        load(locate(str(copied)), device=CPU)


def test_an_fp16_variant_is_found(copied: Path, tiny_folder: Path) -> None:
    for path in copied.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    variant, files = locate(str(copied)).denoiser_weights()
    assert variant == "fp16"
    assert [path.name for path in files] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert load(locate(str(copied)), device=CPU).denoiser.dtype == torch.float32


@pytest.mark.parametrize("parts", [["vae"], ["unet"], ["unet", "text_encoder"]])
def test_the_variant_of_each_part_is_its_own(copied: Path, tiny: Model, parts: list[str]) -> None:
    for part in parts:
        (path,) = (copied / part).glob("*.safetensors")
        path.rename(path.with_suffix(".fp16.safetensors"))
    pipeline = load(locate(str(copied)), device=CPU).pipeline
    for part in ("vae", "unet", "text_encoder"):
        expected = getattr(tiny.pipeline, part).state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in getattr(pipeline, part).state_dict().items())


@pytest.mark.parametrize("variant", ["bf16", "non_ema"])
def test_another_variant_alone_is_named(copied: Path, variant: str) -> None:
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(f".{variant}.safetensors"))
    with pytest.raises(InputError, match=f"the variant {variant} alone, .*variant='{variant}'"):
        load(locate(str(copied)), device=CPU)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_hub_repository_of_the_fp16_variant_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    folder, asked = tmp_path / f"revision-{refuses}", list[dict[str, Any]]()
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def download(model: str, **options: Any) -> str:
        asked.append(options)
        if options["variant"] is None:
            if refuses:
                raise OSError("Could not find the necessary safetensors weights")
            return str(folder)
        for path in tiny_folder.rglob("*.safetensors"):
            shutil.copy(path, (folder / path.relative_to(tiny_folder)).with_suffix(".fp16.safetensors"))
        return str(folder)

    monkeypatch.setattr("boostdiff.engine.hub.snapshot_download", lambda *arguments, **options: folder)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    files = locate("organisation/name")
    assert not asked
    assert load(files, device=CPU).files.denoiser_weights()[0] == "fp16"
    assert [options["variant"] for options in asked] == [None, "fp16"], "and no more"
    assert {options["revision"] for options in asked} == {folder.name}
    assert all(options["safety_checker"] is None for options in asked), "it is not fetched"


@pytest.mark.parametrize("name", ["teapot", "meta", "mps", "cuda:99", ""])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(InputError, match=f"can't use the device '{name}'") as refused:
        resolve_device(name)
    assert len(str(refused.value)) < 300
