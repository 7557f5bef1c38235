"""A trained student on disk: its description, and putting it onto the model that it was trained for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import InputError
from .files import read_json, sha256_of, write_json
from .model import Model, ModelFiles

INFO_FILE = "student.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
BITFIT_FILE = "bitfit.safetensors"
ADAPTER_NAME = "boostdiff"


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """What `student.json` records.

    Attributes:
        method: "lora" or "bitfit".
        guidance: the guidance scale w that was distilled in.
        model: what the user called the model.
        unet_sha256: of the UNet weights that the adapter belongs to.
        adapter_sha256: of the adapter's file.
        trainable_parameters: their number.
        settings: the resolved training configuration.
        versions: of boostdiff and the libraries that matter.
        result: what the training measured (updates, seconds, losses).
    """

    method: str
    guidance: float
    model: str
    unet_sha256: str
    adapter_sha256: str
    trainable_parameters: int
    settings: dict[str, Any]
    versions: dict[str, str]
    result: dict[str, Any]

    @property
    def adapter_file(self) -> str:
        """The file's name beside `student.json`."""
        return LORA_FILE if self.method == "lora" else BITFIT_FILE

    def write(self, folder: Path) -> None:
        """Write `student.json`."""
        write_json(folder / INFO_FILE, asdict(self))


def read_student(folder: Path, files: ModelFiles | None = None) -> StudentInfo:
    """Read and check a student's description.

    Args:
        folder: what `distill` wrote.
        files: the model it is to be used with.

    Raises:
        InputError: there is no student, its adapter was changed or belongs to another model.
    """
    if not (folder / INFO_FILE).is_file():
        raise InputError(f"there is no student in {folder}: run `boostdiff distill` first, or pass --student DIR")
    values = read_json(folder / INFO_FILE)
    names = {field.name for field in fields(StudentInfo)}
    if not names <= set(values) or values["method"] not in {"lora", "bitfit"}:
        raise InputError(f"{folder / INFO_FILE} is not a student's description")
    info = StudentInfo(**{name: values[name] for name in names})
    path = folder / info.adapter_file
    if not path.is_file():
        raise InputError(f"the student in {folder} is incomplete: {info.adapter_file} is missing")
    if sha256_of(path) != info.adapter_sha256:
        raise InputError(f"{path} is damaged: its SHA-256 is not the one in {INFO_FILE}; distil again")
    if files is not None and files.unet_sha256() != info.unet_sha256:
        raise InputError(
            f"the student in {folder} belongs to another model ({info.model}), not to {files.name}: "
            "pass the --model it was trained on, or distil one for this model"
        )
    return info


def apply_student(model: Model, folder: Path) -> StudentInfo:
    """Put the student's adapter onto the model's UNet, unmerged, as stock diffusers would.

    Raises:
        InputError: see `read_student`; or the adapter's tensors don't fit the UNet.
    """
    info = read_student(folder, model.files)
    try:
        if info.method == "lora":
            model.pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=ADAPTER_NAME)
        else:
            load_biases(model.unet, folder / BITFIT_FILE)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the adapter in {folder} does not fit {model.files.name}: {reason}") from None
    return info


@torch.no_grad()
def load_biases(unet: torch.nn.Module, path: Path) -> None:
    """Replace all biases of a UNet by those in a BitFit file; the one call that BitFit needs in stock diffusers.

    Args:
        unet: `pipe.unet` of the model that the file was trained on.
        path: `bitfit.safetensors`: every `.bias` parameter by its name.

    Raises:
        KeyError: the file's biases are not those of this UNet.
        ValueError: one has another shape.
    """
    biases = load_file(path)
    parameters = {name: p for name, p in unet.named_parameters() if name.endswith(".bias")}
    if biases.keys() != parameters.keys():
        raise KeyError(f"its {len(biases)} biases are not the {len(parameters)} of the UNet")
    for name, parameter in parameters.items():
        if parameter.shape != biases[name].shape:
            raise ValueError(f"{name} has shape {tuple(biases[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(biases[name])
