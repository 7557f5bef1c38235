import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.engine.adapters import BITFIT_FILE, LORA_FILE, BitFit
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import hash_of, read_json, write_json
from boostdiff.engine.model import Model, ModelFiles, load, locate
from boostdiff.engine.student import INFO_FILE, apply_student, read_student
from safetensors.torch import load_file, save_file
from tiny import CPU, make_pipeline


def test_a_student_is_described(students: dict[str, Path], tiny_files: ModelFiles) -> None:
    info = read_student(students["lora"], tiny_files)
    assert (info.method, info.guidance) == ("lora", 3.0)
    assert info.settings["updates"] == 8
    assert "torch" in info.versions


def test_no_student_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `boostdiff distill` first"):
        read_student(tmp_path)


def test_a_student_of_another_model_is_refused(students: dict[str, Path], tmp_path: Path) -> None:
    make_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="belongs to another model"):
        read_student(students["lora"], locate(str(tmp_path / "other")))


@pytest.mark.parametrize(("method", "name"), [("lora", LORA_FILE), ("bitfit", BITFIT_FILE)])
def test_a_damaged_or_missing_adapter_is_refused(
    students: dict[str, Path], tmp_path: Path, method: str, name: str
) -> None:
    folder = shutil.copytree(students[method], tmp_path / "student")
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        read_student(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="incomplete"):
        read_student(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": 7.5},
        {"negative_prompt": "blurry"},
        {"guidance_range": [2.0, 5.0]},
        # As 0.1.0 wrote it.
        {"sha256": None},
    ],
)
def test_a_description_that_was_edited_or_has_no_hash_is_refused(
    students: dict[str, Path], tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = shutil.copytree(students["lora"], tmp_path / "student")
    write_json(folder / INFO_FILE, read_json(folder / INFO_FILE) | changes)
    with pytest.raises(InputError, match=r"student\.json is damaged or of boostdiff 0\.1\.0 .*: distill again"):
        read_student(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": None}, "not a student's description"),
        ({"guidance": math.nan}, "not a student's description"),
        ({"guidance": 0.5}, "not a student's description"),
        ({"guidance_range": [5.0, 2.0]}, "not a student's description"),
        ({"guidance_range": "ab"}, "not a student's description"),
        ({"adapter_files": ["x"]}, "not a student's description"),
        ({"guider_settings": []}, "not a student's description"),
        ({"steps": 8}, "not a student's description"),
        ({"steps": True, "sampler": "ddim", "timestep_spacing": "trailing"}, "not a student's description"),
        ({"steps": 8, "sampler": "x", "timestep_spacing": "trailing"}, "not a student's description"),
        ({"guider": "magic"}, "the teacher of the student .* can't be made"),
        ({"guider_settings": {"apg_eta": 0}}, "the teacher of the student .* can't be made"),
    ],
)
def test_a_description_with_its_hash_that_can_not_be_meant(
    students: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(students["lora"], tmp_path / "student")
    replace(read_student(folder), **changes).write(folder)
    with pytest.raises(InputError, match=message):
        read_student(folder)


def test_a_description_of_other_names_or_methods_is_refused(students: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(students["lora"], tmp_path / "student")
    write_json(folder / INFO_FILE, {"guidance": 3.0, "sha256": hash_of({"guidance": 3.0})})
    with pytest.raises(InputError, match="not a student's description; distill again"):
        read_student(folder)
    replace(read_student(students["lora"]), method="magic").write(folder)
    with pytest.raises(InputError, match="of method magic, which is gone"):
        read_student(folder)


def test_bitfit_replaces_every_bias_and_nothing_else(students: dict[str, Path], tiny: Model) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.denoiser.state_dict().items()}
    apply_student(tiny.denoiser, students["bitfit"], read_student(students["bitfit"]))
    biases = load_file(students["bitfit"] / BITFIT_FILE)
    changed = 0
    for name, tensor in tiny.denoiser.state_dict().items():
        torch.testing.assert_close(tensor, biases.get(name, before[name]))
        changed += not torch.equal(tensor, before[name])
    assert changed > len(biases) / 2


def test_biases_of_another_architecture(tiny_files: ModelFiles, tmp_path: Path) -> None:
    unet = load(tiny_files, device=CPU).denoiser
    save_file({"conv_in.bias": torch.zeros(16)}, tmp_path / BITFIT_FILE)
    with pytest.raises(ValueError, match="1 tensors are of another adapter"):
        BitFit.load(unet, tmp_path)
    wrong = {name: torch.zeros(3) for name, _ in unet.named_parameters() if name.endswith(".bias")}
    save_file(wrong, tmp_path / BITFIT_FILE)
    with pytest.raises(ValueError, match="has shape"):
        BitFit.load(unet, tmp_path)


@pytest.mark.parametrize("now", ["v_prediction", "sample"])
def test_a_student_of_another_prediction_type_is_refused(
    tiny_folder: Path, students: dict[str, Path], tmp_path: Path, now: str
) -> None:
    """The denoiser's file alone does not tell what its numbers mean."""
    copied = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    path = copied / "scheduler/scheduler_config.json"
    assert read_student(students["lora"], locate(str(copied)))
    write_json(path, read_json(path) | {"prediction_type": now})
    with pytest.raises(InputError, match=f"learned from a model of prediction_type epsilon, this is of {now}"):
        read_student(students["lora"], locate(str(copied)))
