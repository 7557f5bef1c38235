"""What a model's folder must be for its family, checked on configuration files alone, before weights are read.

Whatever decides what the weights mean is either honoured as stock diffusers honours it, or refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig

from .checks import ComponentConfigs, positive_ints
from .errors import InputError, one_line
from .family import Family
from .files import read_json
from .schedulers import check_schedule, completed


def check_folder(folder: Path, family: Family, index: dict[str, Any]) -> ComponentConfigs:
    """The configuration of every component of a pipeline folder with this `model_index.json`.

    Raises:
        InputError: the family can't use it as stock diffusers would: a component is missing, of another class, or
            does not fit the others.
    """
    absent = family.absent_components(index)
    components = {
        name: _settings(folder, name, index, classes)
        for name, classes in family.component_classes.items()
        if name not in absent
    }
    scheduler = {"scheduler": lambda: check_schedule(index["scheduler"][1], components["scheduler"], flow=family.flow)}
    for component, check in (family.checks(components) | scheduler).items():
        try:
            check()
        except InputError as error:
            raise InputError(f"{folder / _file(component)}: {error}") from None
    return components


def _file(component: str) -> str:
    stem = component.split("_")[0]
    return f"{component}/{f'{stem}_config' if stem in ('scheduler', 'tokenizer') else 'config'}.json"


def _settings(folder: Path, component: str, index: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """A component's configuration, after its class has been checked."""
    entry = index.get(component)
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if not isinstance(name, str):
        raise InputError(f"{folder / 'model_index.json'} has no {component}, which {index['_class_name']} needs")
    if classes and (library not in ("diffusers", "transformers") or name not in classes):
        raise InputError(
            f"{folder / 'model_index.json'} has a {component} of class {library}.{name}, which is not supported; "
            f"supported: {', '.join(classes)}"
        )
    path = folder / _file(component)
    if not path.is_file():
        raise InputError(f"{folder} has no {component}: {_file(component)} is missing")
    config = read_json(path)
    if "quantization_config" in config:
        raise InputError(
            f"{path}: the {component} is quantized, which is not supported: pass the model it was made from"
        )
    if name.startswith("CLIPText"):
        try:
            known = CLIPTextConfig(**config).to_dict()
            if name == "CLIPTextModelWithProjection":
                positive_ints(known, "projection_dim")
            return known
        except Exception as error:
            # transformers validates with exceptions that share no base class.
            raise InputError(f"{path} can't be used: {one_line(error)}") from None
    known = completed(name, config)
    if name == "AutoencoderTiny":
        # The class sets it as it is made, so that no default shows it; files of older versions lack it.
        known = {"block_out_channels": known["decoder_block_out_channels"]} | known
    return known
