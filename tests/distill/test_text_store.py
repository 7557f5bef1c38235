from pathlib import Path

import pytest
import torch
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.distill.text_store import TextStore
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.model import locate
from boostdiff.engine.versions import versions
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny import CPU, make_pipeline, make_sd3_pipeline, make_xl_pipeline
from tiny_qwen_image import make_qwen_image_pipeline


def make_clipping_pipeline() -> StableDiffusionPipeline:
    """Its pipeline corrects the scheduler's settings as it is made."""
    pipeline = make_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(dict(pipeline.scheduler.config) | {"clip_sample": True})
    return pipeline


def make_xl_pipeline_of_encoded_empty_prompts() -> StableDiffusionXLPipeline:
    """One whose empty prompt is not zeros, by `model_index.json`."""
    pipeline = make_xl_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    return pipeline


MAKERS = {
    "sdxl": make_xl_pipeline,
    "sdxl, encoded ∅": make_xl_pipeline_of_encoded_empty_prompts,
    "sd, clip_sample": make_clipping_pipeline,
    "sd3": make_sd3_pipeline,
    "qwen-image": make_qwen_image_pipeline,
}


def student(folder: Path, prompts: Path, output: Path, *, cache: Path | None, preview: bool = False) -> bytes:
    config = DistillConfig(prompts=prompts, updates=2, batch_size=2, learning_rate=0.01)
    execution = RunConfig(cache_text=cache)
    observers = Observers(preview=preview)
    distill(locate(str(folder)), config, execution, output=output, device="cpu", observers=observers)
    return (output / LORA_FILE).read_bytes()


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("sdxl", "qwen-image") else ()) for kind in MAKERS],
)
def test_a_run_on_stored_text_gives_the_same_student(
    kind: str, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MAKERS[kind]().save_pretrained(tmp_path / "model")
    expected = student(tmp_path / "model", prompt_file, tmp_path / "plain", cache=None)
    first = student(tmp_path / "model", prompt_file, tmp_path / "first", cache=tmp_path / "text", preview=True)
    assert first == expected
    assert (tmp_path / "first/grid.png").is_file()
    files = sorted((tmp_path / "text").rglob("*"))
    assert not any(path.name.endswith(".partial") for path in files)

    def needless(*arguments: object) -> None:
        raise AssertionError("all texts are stored already")

    monkeypatch.setattr(TextStore, "_text_pipeline", needless)
    assert student(tmp_path / "model", prompt_file, tmp_path / "second", cache=tmp_path / "text") == expected
    for damaged in (path for path in files if path.is_file()):
        damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(InputError, match="can't read the text embeddings in"):
        student(tmp_path / "model", prompt_file, tmp_path / "third", cache=tmp_path / "text")


def test_folders_of_other_settings_do_not_share_texts(tmp_path: Path) -> None:
    paths = set()
    for kind in ("sdxl", "sdxl, encoded ∅"):
        MAKERS[kind]().save_pretrained(tmp_path / kind)
        paths.add(TextStore(tmp_path, locate(str(tmp_path / kind)), torch.float32).path("", negative=True))
    assert len(paths) == 2


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_texts_of_another_version_are_not_taken(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    def stored() -> int:
        return TextStore(tmp_path, locate(str(tiny_folder)), torch.float32).fill(["a red cat"], [""], CPU)

    assert (stored(), stored()) == (2, 0)
    upgraded = versions() | {library: "99"}
    monkeypatch.setattr("boostdiff.distill.text_store.versions", lambda: upgraded)
    assert (stored(), stored()) == (2, 0)


@pytest.mark.parametrize("name", ["block_out_channels", "act_fn"])
def test_what_a_vaes_file_lacks_is_its_class_s(name: str, tmp_path: Path) -> None:
    pipeline, blocks = make_pipeline(), {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pipeline.vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), **blocks)
    pipeline.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/vae/config.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != name})
    store = TextStore(tmp_path / "text", locate(str(tmp_path / "model")), torch.float32)
    assert store._text_pipeline(CPU).vae_scale_factor == 2
    assert store.fill(["a red cat"], [""], CPU) == 2


@pytest.mark.parametrize("target", ["new", "new/below"])
def test_a_link_to_a_folder_that_is_to_be_made(tiny_folder: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    store = TextStore(tmp_path / "link", locate(str(tiny_folder)), torch.float32)
    assert store.fill(["a red cat"], [""], CPU) == 2
    assert len(list((tmp_path / target).rglob("*.safetensors"))) == 2
    assert store.fill(["a red cat"], [""], CPU) == 0


@pytest.mark.parametrize("options", [{"images": Path("x")}, {"negative_prompt": "live"}])
def test_texts_must_be_known_before(prompt_file: Path, tmp_path: Path, options: dict[str, object]) -> None:
    options = {"prompts": None if "images" in options else prompt_file} | options
    config = DistillConfig(updates=2, batch_size=2, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--cache-text"):
        distill(locate("emoji64"), config, RunConfig(cache_text=tmp_path), output=tmp_path / "out", device="cpu")


@pytest.mark.parametrize("folder", ["a-file", "a-file/below"])
def test_a_folder_that_can_not_be_written_is_refused(tiny_folder: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "a-file").write_text("x")
    store = TextStore(tmp_path / folder, locate(str(tiny_folder)), torch.float32)
    with pytest.raises(InputError, match="can't write text embeddings into"):
        store.fill(["a red cat"], [""], CPU)
    assert (tmp_path / "a-file").read_text() == "x"
