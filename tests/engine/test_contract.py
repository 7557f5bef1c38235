"""What is refused of a model's folder, from configuration files alone and by every command in the same words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.cli import app
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import dry_run
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.model import load, locate
from diffusers import DiffusionPipeline
from tiny import CPU, make_pipeline, make_sd3_pipeline, make_xl_pipeline
from tiny_sana import make_sana_pipeline
from typer.testing import CliRunner

SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "xl"
    make_xl_pipeline().save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, name: str, **values: Any) -> str:
    """A copy of a folder's configuration files, one of them changed; a value of None deletes its key."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    found = {**read_json(target / name), **values}
    write_json(target / name, {key: value for key, value in found.items() if value is not None})
    return str(target)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (UNET, {"in_channels": 5}, "takes 5 channels and gives 4, the VAE has 4"),
        (UNET, {"in_channels": "4"}, "in_channels is '4': it must be a whole number"),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        (UNET, {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type is 'ip_image_proj'"),
        (UNET, {"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
        (UNET, {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        (UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256: it is distilled already"),
        (UNET, {"cross_attention_dim": [32, 24]}, r"width \[32, 24\], the text encoders give 32"),
        (UNET, {"sample_size": [8, 8, 8]}, "must be one number, or height and width"),
        (UNET, {"sample_size": 0}, "sample_size is 0"),
        (UNET, {"quantization_config": {"load_in_4bit": True}}, "the unet is quantized"),
        (UNET, {"_diffusers_version": "old"}, "_diffusers_version is 'old'"),
        (UNET, {"_diffusers_version": 0.6}, "_diffusers_version is 0.6"),
        (VAE, {"block_out_channels": 16}, "block_out_channels is 16: it must be a list"),
        (VAE, {"block_out_channels": []}, r"block_out_channels is \[\]: it must be a list"),
        (VAE, {"scaling_factor": 0}, "scaling_factor is 0"),
        (VAE, {"scaling_factor": "much"}, "scaling_factor is 'much'"),
        (VAE, {"out_channels": 4}, "images are RGB"),
        (VAE, {"latents_mean": [0.1]}, "latents_mean must be one number per channel"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "up to the 16 tokens"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 17}, "up to the 16 tokens"),
        ("text_encoder/config.json", {"hidden_size": 64}, "width 32, the text encoders give 64"),
        (SCHEDULER, {"num_train_timesteps": 10}, "must be at least 20"),
        (SCHEDULER, {"steps_offset": 1000}, "must lie between 0 and 999"),
        (SCHEDULER, {"steps_offset": 50}, "20 steps leave the 1000 timesteps"),
        (SCHEDULER, {"beta_end": 2.0}, "betas can't be used"),
        (SCHEDULER, {"beta_start": "small"}, "betas can't be used"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "must be 1000 numbers"),
        (SCHEDULER, {"trained_betas": [0.01] * 999 + [1.0]}, "they need v_prediction"),
        (SCHEDULER, {"variance_type": "learned_range"}, "variance_type 'learned_range' is not supported"),
        (SCHEDULER, {"use_flow_sigmas": True}, "use_flow_sigmas True is not supported"),
        (SCHEDULER, {"timestep_spacing": "even"}, "timestep_spacing 'even' is not supported"),
        ("model_index.json", {"scheduler": ["diffusers", "TCDScheduler"]}, "TCDScheduler has another noise schedule"),
        ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "EDMEulerScheduler has another noise"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKLWan"]}, "vae of class diffusers.AutoencoderKLWan"),
        ("model_index.json", {"unet": ["my_unet", "UNet2DConditionModel"]}, "my_unet.UNet2DConditionModel"),
        (
            "model_index.json",
            {"text_encoder": [None, None]},
            "has no text_encoder, which Stable",
        ),
        ("model_index.json", {"tokenizer": 3}, "has no tokenizer"),
    ],
)
def test_what_a_folder_must_not_say(
    tiny_folder: Path, tmp_path: Path, name: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as error:
        locate(changed(tiny_folder, tmp_path / "model", name, **values), weights=False)
    assert str(error.value).startswith(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (UNET, {"addition_time_embed_dim": 4}, "projection_class_embeddings_input_dim is 72"),
        (UNET, {"addition_embed_type": "image"}, "where stable-diffusion-xl has 'text_time'"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 8}, "different lengths, 16 and 8"),
        ("text_encoder_2/config.json", {"projection_dim": 32}, "text embeddings of 32 and 6 numbers"),
        ("text_encoder_2/config.json", {"projection_dim": -1}, "text_encoder_2.*projection_dim is -1"),
        (VAE, {"latents_std": [2.0] * 4}, "without the other of latents_mean and latents_std"),
    ],
)
def test_what_an_xl_folder_must_not_say(
    xl_folder: Path, tmp_path: Path, name: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        locate(changed(xl_folder, tmp_path / "model", name, **values), weights=False)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("width", [None, "16"])
def test_a_width_that_is_no_number(part: str, width: object, tmp_path: Path) -> None:
    make_sd3_pipeline().save_pretrained(tmp_path)
    path = tmp_path / part / "config.json"
    # Written as null, which `changed` would leave out.
    write_json(path, read_json(path) | {"projection_dim": width})
    with pytest.raises(InputError, match=f"/{part}/config.json can't be used: .*projection_dim"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"shift_terminal": "x"}, "shift_terminal 'x' can't be used: it must be a number"),
        ({"use_dynamic_shifting": True, "base_shift": [1]}, r"base_shift \[1\] can't be used: it must be a number"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "can't be used: .*division by zero"),
        ({"shift": "x"}, "can't be used"),
    ],
)
def test_what_a_schedule_of_flow_matching_must_not_say(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    make_sd3_pipeline().save_pretrained(tmp_path / "full")
    with pytest.raises(InputError, match=f"/scheduler_config.json: .*{said}"):
        locate(changed(tmp_path / "full", tmp_path / "model", SCHEDULER, **values))


LEFT_OUT = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}


@pytest.mark.parametrize("index", [LEFT_OUT, {"text_encoder_3": [None, None]}, dict.fromkeys(LEFT_OUT)], ids=str)
def test_the_index_says_what_is_left_out_though_its_folder_is_there(index: dict[str, Any], tmp_path: Path) -> None:
    make_sd3_pipeline().save_pretrained(tmp_path / "full")
    folder = changed(tmp_path / "full", tmp_path / "model", "model_index.json", **index)
    for weights in (tmp_path / "full").rglob("*.safetensors"):
        shutil.copy(weights, Path(folder) / weights.relative_to(tmp_path / "full"))
    files = locate(folder)
    assert set(files.absent_components) == set(index)
    assert "text_encoder_3" not in files.parameters()
    assert "text_encoder_3" not in files.other_sha256()
    pipeline = load(files, device=CPU).pipeline
    assert pipeline.text_encoder_3 is None
    assert files.family.encode(pipeline, ["a red cat"]).conditional.encoder_hidden_states.shape == (1, 272, 64)


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_t5_without_its_tokenizer(entry: Any, tmp_path: Path) -> None:
    make_sd3_pipeline().save_pretrained(tmp_path / "full")
    with pytest.raises(InputError, match=r"tokenizer_3/tokenizer_config\.json: model_index.json leaves it out"):
        locate(changed(tmp_path / "full", tmp_path / "model", "model_index.json", tokenizer_3=entry))


@pytest.mark.parametrize("part", ["vae", "scheduler", "tokenizer", "text_encoder"])
def test_a_part_that_is_not_there(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    with pytest.raises(InputError, match=f"has no {part}: {part}/.*json is missing"):
        locate(str(tmp_path / "model"))


def test_what_changes_nothing_is_allowed(tiny_folder: Path, tmp_path: Path) -> None:
    values = {"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 1], "shift_factor": 0.0}
    files = locate(changed(tiny_folder, tmp_path / "model", VAE, **values), weights=False)
    config = DistillConfig(batch_size=2).resolved(in_bfloat16=False, embedded=True)
    assert dry_run(files, config, RunConfig(), torch.device("cpu"))["total_parameters"] > 0


@pytest.mark.parametrize("values", [{"prediction_type": "flow_prediction"}, {"rescale_betas_zero_snr": True}])
def test_every_command_says_the_same(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    model = changed(tiny_folder, tmp_path / "model", SCHEDULER, **values)
    output = ["--output", str(tmp_path / "output"), "--device", "cpu"]
    data = ["--prompts", str(prompt_file)]
    said = set()
    for command in (
        ["distill", "--model", model, *data, *output, "--dry-run"],
        ["distill", "--model", model, *data, *output],
        ["generate", "a red cat", "--teacher", "--model", model, *output],
        ["export", "--model", model, *output],
        ["bench", "--model", model, *data, *output, "--speed-only"],
    ):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, InputError), command
        said.add(str(result.exception))
    assert len(said) == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("vae/config.json", {"norm_num_groups": -4}, "norm_num_groups is -4"),
        ("unet/config.json", {"norm_num_groups": "4"}, "norm_num_groups is '4'"),
        ("scheduler/scheduler_config.json", {"trained_betas": []}, "betas"),
        ("tokenizer/tokenizer_config.json", {"unk_token": 7}, "can't load the model"),
        (
            "tokenizer/tokenizer_config.json",
            {"pad_token": "<nothing>"},
            "special tokens that text_encoder",
        ),
        ("unet/config.json", {"up_block_types": ["UpBlock2D", 7]}, "can't load the model"),
    ],
)
def test_damaged_settings_are_no_fault_of_ours(
    tiny_folder: Path, tmp_path: Path, name: str, values: dict[str, Any], said: str
) -> None:
    folder = changed(tiny_folder, tmp_path / "model", name, **values)
    for weights in tiny_folder.rglob("*.safetensors"):
        shutil.copy(weights, Path(folder) / weights.relative_to(tiny_folder))
    with pytest.raises(InputError, match=said):
        load(locate(folder), device=CPU)


@pytest.mark.parametrize(("make", "name"), [(make_pipeline, "tokenizer"), (make_xl_pipeline, "tokenizer_2")])
def test_a_tokenizer_without_padding(make: Callable[[], DiffusionPipeline], name: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / name / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    with pytest.raises(InputError, match=f"{name} has no padding token"):
        load(locate(str(tmp_path)), device=CPU)


@pytest.mark.parametrize(
    ("make", "patch", "dynamic", "said"),
    [
        (make_sd3_pipeline, 1, True, "patch_size is 1: with use_dynamic_shifting it must be 2"),
        (make_sd3_pipeline, 4, True, "patch_size is 4: with use_dynamic_shifting it must be 2"),
        (make_sd3_pipeline, 1, False, None),
        (make_sana_pipeline, 1, True, "use_dynamic_shifting can't be used: Sana's pipeline gives no shift"),
    ],
)
def test_a_shift_by_image_size(
    tmp_path: Path, make: Callable[[], DiffusionPipeline], patch: int, dynamic: bool, said: str | None
) -> None:
    make().save_pretrained(tmp_path / "full")
    patched = changed(tmp_path / "full", tmp_path / "patched", "transformer/config.json", patch_size=patch)
    folder = changed(Path(patched), tmp_path / "model", SCHEDULER, use_dynamic_shifting=dynamic)
    if said is None:
        locate(folder, weights=False)
        return
    with pytest.raises(InputError, match=f"/transformer/config.json: .*{said}"):
        locate(folder, weights=False)
