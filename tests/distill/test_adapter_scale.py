import math
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.cli import app
from boostdiff.distill.config import ADAPTER_SCALES, LIVE_SCALE, NORMS_SCALES, DistillConfig, RunConfig
from boostdiff.distill.distill import distill, resolve
from boostdiff.distill.loop import Observers
from boostdiff.distill.run_folder import work_folder
from boostdiff.engine import embedded
from boostdiff.engine.adapters import KOHYA_FILE, LORA_FILE
from boostdiff.engine.errors import InputError
from boostdiff.engine.live_negative import GAIN, INITIAL_SCALE, LIVE_FILE, LiveNegativeAttention, growth_at
from boostdiff.engine.merge import merge_in_place, merged_copy
from boostdiff.engine.model import ModelFiles, load, locate
from boostdiff.engine.student import StudentInfo, read_student
from safetensors.torch import load_file
from typer.testing import CliRunner


def trained(files: ModelFiles, folder: Path, execution: RunConfig | None = None, **settings: Any) -> StudentInfo:
    config = DistillConfig(updates=4, batch_size=2, learning_rate=0.01, **settings)
    return distill(files, config, execution, output=folder, device="cpu", observers=Observers(preview=False))


def added(files: ModelFiles, folder: Path) -> dict[str, torch.Tensor]:
    """What a merged student adds to the denoiser's weights."""
    denoiser = load(files, device=torch.device("cpu")).denoiser
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    merge_in_place(denoiser, folder, read_student(folder, files))
    return {name: tensor - before[name] for name, tensor in denoiser.state_dict().items()}


@pytest.mark.parametrize("settings", [{"method": "lora", "rank": 4, "alpha": 6.0}, {"method": "bitfit"}])
def test_a_scaled_adapter_adds_that_much_more_and_is_scaled_again_without_training(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    kohya = RunConfig(format="kohya" if settings["method"] == "lora" else None)
    plain = trained(tiny_files, tmp_path / "1", prompts=prompt_file, **settings)
    scaled = trained(tiny_files, tmp_path / "s", kohya, prompts=prompt_file, adapter_scale=1.5, **settings)
    assert (plain.settings["adapter_scale"], scaled.settings["adapter_scale"]) == (1, 1.5)
    assert scaled.result["guidance_r2"] == plain.result["guidance_r2"], "it is scaled at the end"
    once, more = added(tiny_files, tmp_path / "1"), added(tiny_files, tmp_path / "s")
    assert max(difference.abs().max() for difference in once.values()) > 1e-3
    for name, difference in once.items():
        torch.testing.assert_close(more[name], 1.5 * difference, rtol=1e-4, atol=1e-6, msg=name)

    before = (tmp_path / "s" / KOHYA_FILE).read_bytes() if kohya.format else b""
    again = RunConfig(resume=True)
    rescaled = trained(tiny_files, tmp_path / "s", again, prompts=prompt_file, adapter_scale=0.5, **settings)
    assert rescaled == read_student(tmp_path / "s", tiny_files)
    assert rescaled.settings == scaled.settings | {"adapter_scale": 0.5}
    for name, difference in added(tiny_files, tmp_path / "s").items():
        torch.testing.assert_close(difference, 0.5 * once[name], rtol=1e-4, atol=1e-6, msg=name)
    if kohya.format:
        assert (tmp_path / "s" / KOHYA_FILE).read_bytes() != before
    assert trained(tiny_files, tmp_path / "s", again, prompts=prompt_file, **settings) == rescaled, "none was asked for"
    assert not list(tmp_path.glob(".s*"))
    assert not work_folder(tmp_path / "s").exists()


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_of_a_live_negative_prompt_what_tells_the_texts_apart_is_scaled(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, method: Any
) -> None:
    settings = {"prompts": prompt_file, "negative_prompt": "live", "method": method}
    plain = trained(tiny_files, tmp_path / "1", adapter_scale=1.0, **settings)
    trained(tiny_files, tmp_path / "s", adapter_scale=1.5, **settings)
    trained(tiny_files, tmp_path / "s", RunConfig(resume=True), adapter_scale=2.0, **settings)
    assert (tmp_path / "1" / LORA_FILE).read_bytes() == (tmp_path / "s" / LORA_FILE).read_bytes()
    once, twice = (load_file(tmp_path / name / LIVE_FILE) for name in ("1", "s"))
    for name, tensor in once.items():
        # The part of s − 1 that does not depend on the timestep, and the slope over the time embedding.
        constant = INITIAL_SCALE - 1 if name.endswith(".scale") else 0.0
        torch.testing.assert_close(constant + GAIN * twice[name], 2 * (constant + GAIN * tensor), msg=name)
    assert any(tensor.any() for name, tensor in once.items() if name.endswith(".slope"))
    assert plain.settings["adapter_scale"] == 1


@pytest.mark.parametrize(
    "few", [{}, {"few_steps": "4:2", "stage_updates": 1}, pytest.param({"adapter_scale": 1.5}, marks=pytest.mark.slow)]
)
def test_kohyas_file_is_added_to_a_finished_student(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, few: dict[str, Any]
) -> None:
    kohya, again = RunConfig(resume=True, format="kohya"), few | {"adapter_scale": None}
    whole = trained(tiny_files, tmp_path / "whole", RunConfig(format="kohya"), prompts=prompt_file, **few)
    plain = trained(tiny_files, tmp_path / "s", prompts=prompt_file, **few)
    (tmp_path / "s" / "grid.png").write_bytes(b"picture")
    assert not (tmp_path / "s" / KOHYA_FILE).exists()
    asked = few if "few_steps" in few else again
    info = trained(tiny_files, tmp_path / "s", kohya, prompts=prompt_file, **asked)
    assert info == read_student(tmp_path / "s", tiny_files) == plain
    assert info.adapter_files == whole.adapter_files
    assert (tmp_path / "s" / KOHYA_FILE).read_bytes() == (tmp_path / "whole" / KOHYA_FILE).read_bytes()
    assert (tmp_path / "s" / "grid.png").read_bytes() == b"picture"
    stamp = (tmp_path / "s" / KOHYA_FILE).stat().st_ino
    assert trained(tiny_files, tmp_path / "s", kohya, prompts=prompt_file, **asked) == info
    assert (tmp_path / "s" / KOHYA_FILE).stat().st_ino == stamp, "it is there"


def test_of_a_range_the_scale_is_that_at_its_upper_end(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    settings = {"prompts": prompt_file, "negative_prompt": "live", "guidance": 1.5, "guidance_max": 5.0}
    trained(tiny_files, tmp_path / "1", adapter_scale=1.0, **settings)
    trained(tiny_files, tmp_path / "s", adapter_scale=1.5, **settings)
    trained(tiny_files, tmp_path / "s", RunConfig(resume=True), adapter_scale=2.0, **settings)
    trained(tiny_files, tmp_path / "whole", adapter_scale=2.0, **settings)
    for name in (LIVE_FILE, LORA_FILE):
        ends = [load_file(tmp_path / each / name) for each in ("s", "whole")]
        for key, tensor in ends[0].items():
            torch.testing.assert_close(tensor, ends[1][key], msg=key)
    merged = merged_copy(load(tiny_files, device=torch.device("cpu")), tmp_path / "s", read_student(tmp_path / "s"))
    processors = [p for p in merged.attn_processors.values() if isinstance(p, LiveNegativeAttention)]
    assert processors
    for processor in processors:
        assert math.exp(processor.shared.rise * growth_at(5.0)) == pytest.approx(2)


def test_the_command_leaves_a_finished_students_scale_alone(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    words = ["distill", "--model", str(tiny_files.folder), "--prompts", str(prompt_file), "--device", "cpu"]
    words += ["--updates", "1", "--batch-size", "2", "--output", str(tmp_path / "s")]

    def run(*more: str) -> tuple[float, bytes]:
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 0
        return read_student(tmp_path / "s").settings["adapter_scale"], (tmp_path / "s" / LORA_FILE).read_bytes()

    assert run()[0] == 1
    scaled = run("--resume", "--adapter-scale", "1.7")
    assert scaled[0] == 1.7
    assert run("--resume") == scaled


def test_an_unfinished_run_may_end_with_another_scale(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    def stop(report: object) -> None:
        raise KeyboardInterrupt

    config = DistillConfig(prompts=prompt_file, updates=4, batch_size=2, learning_rate=0.01)
    observers = Observers(preview=False, on_update=stop)
    with pytest.raises(KeyboardInterrupt):
        distill(
            tiny_files,
            config,
            RunConfig(checkpoint_every=1),
            output=tmp_path / "s",
            device="cpu",
            observers=observers,
        )
    trained(tiny_files, tmp_path / "s", RunConfig(resume=True), prompts=prompt_file, adapter_scale=2.0)
    trained(tiny_files, tmp_path / "whole", prompts=prompt_file, adapter_scale=2.0)
    ends = [load_file(tmp_path / name / LORA_FILE) for name in ("s", "whole")]
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], msg=name)


def test_a_few_step_student_begins_with_a_scaled_one_and_is_not_scaled_itself(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    few = {"prompts": prompt_file, "few_steps": "4:2", "stage_updates": 1}
    trained(tiny_files, tmp_path / "1", **few)
    trained(tiny_files, tmp_path / "2", adapter_scale=2.0, **few)
    guidance, last = (
        [load_file(tmp_path / str(scale) / part / LORA_FILE) for scale in (1, 2)] for part in ("stages/guidance", ".")
    )
    names = [name for name in guidance[0] if "lora_B" in name or "lora.up" in name]
    assert names
    for name in names:
        torch.testing.assert_close(guidance[1][name], 2 * guidance[0][name])
        assert (last[1][name] - guidance[1][name]).abs().max() < guidance[1][name].abs().max() / 2
    with pytest.raises(InputError, match=r"adapter_scale was 2\.0, is 1\.0"):
        trained(tiny_files, tmp_path / "2", RunConfig(resume=True), **few)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "dora"}, "--adapter-scale is not used with --method dora"),
        ({"method": "soft-prompt"}, "--adapter-scale is not used with --method soft-prompt"),
        ({"guidance_max": 5.0}, "--adapter-scale is not used with a range of --guidance"),
        ({"few_steps": "4:2", "start_from": Path("s")}, "--adapter-scale is not used with --start-from"),
    ],
)
def test_adapters_that_are_not_scaled(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        DistillConfig(adapter_scale=1.2, **settings)
    if "start_from" not in settings:
        resolved = resolve(DistillConfig(**settings), locate(embedded.MODEL_NAME), torch.device("cpu"))
        assert resolved.adapter_scale is None


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.01, float("nan")])
def test_scales_that_are_none(scale: float) -> None:
    with pytest.raises(InputError, match="--adapter-scale must be above 0"):
        DistillConfig(adapter_scale=scale)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"method": "lora"}, ADAPTER_SCALES["lora"]),
        ({"method": "bitfit"}, ADAPTER_SCALES["bitfit"]),
        ({"method": "lora", "norms": True}, NORMS_SCALES["lora"]),
        ({"method": "bitfit", "norms": True}, NORMS_SCALES["bitfit"]),
        ({"method": "dora", "negative_prompt": "live"}, LIVE_SCALE),
        ({"negative_prompt": "live", "guidance_max": 5.0}, 1),
    ],
)
def test_the_embedded_model_has_its_own_scale(tiny_files: ModelFiles, settings: Any, scale: float) -> None:
    own = resolve(DistillConfig(**settings), locate(embedded.MODEL_NAME), torch.device("cpu"))
    other = resolve(DistillConfig(**settings), tiny_files, torch.device("cpu"))
    assert own.adapter_scale == scale
    assert other.adapter_scale == 1
