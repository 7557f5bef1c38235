"""What a model's folder must be for its family, checked on configuration files alone, before weights are read.

Whatever decides what the weights mean is either honoured as stock diffusers honours it, or refused here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig

from .errors import InputError, one_line
from .families import Family
from .files import read_json
from .schedulers import check_schedule, completed

Parts = dict[str, dict[str, Any]]
"""The configuration of each part, completed with the defaults of its class, by the part's name."""

PLAIN_UNET: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "time_cond_proj_dim": (None,),
}
"""Settings of a UNet that ask for further inputs, with the values that don't."""


def check_folder(folder: Path, family: Family, index: dict[str, Any]) -> Parts:
    """The configuration of every part of a pipeline folder with this `model_index.json`.

    Raises:
        InputError: the family can't use it as stock diffusers would: a part is missing, of another class, or does not
            fit the others.
    """
    parts = {name: _settings(folder, name, index, classes) for name, classes in family.parts.items()}
    for part, check in (
        ("unet", lambda: _check_unet(parts, family)),
        ("vae", lambda: _check_vae(parts["vae"], family)),
        ("tokenizer", lambda: _check_text(parts, family)),
        ("scheduler", lambda: check_schedule(index["scheduler"][1], parts["scheduler"])),
    ):
        try:
            check()
        except InputError as error:
            raise InputError(f"{folder / _file(part)}: {error}") from None
    return parts


def _file(part: str) -> str:
    stem = part.split("_")[0]
    return f"{part}/{f'{stem}_config' if stem in ('scheduler', 'tokenizer') else 'config'}.json"


def _settings(folder: Path, part: str, index: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """A part's configuration, after its class has been checked."""
    entry = index.get(part)
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if not isinstance(name, str):
        raise InputError(f"{folder / 'model_index.json'} has no {part}, which {index['_class_name']} needs")
    if classes and (library not in ("diffusers", "transformers") or name not in classes):
        raise InputError(
            f"{folder / 'model_index.json'} has a {part} of class {library}.{name}, which is not supported; "
            f"supported: {', '.join(classes)}"
        )
    path = folder / _file(part)
    if not path.is_file():
        raise InputError(f"{folder} has no {part}: {_file(part)} is missing")
    config = read_json(path)
    if "quantization_config" in config:
        raise InputError(f"{path}: the {part} is quantized, which is not supported: pass the model it was made from")
    if name.startswith("CLIPText"):
        try:
            return CLIPTextConfig(**config).to_dict()
        except Exception as error:
            # transformers validates with exceptions that share no base class.
            raise InputError(f"{path} can't be used: {one_line(error)}") from None
    return completed(name, config)


def _counts(config: dict[str, Any], *names: str) -> list[int]:
    """Settings that must be whole numbers above 0."""
    for name in names:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}: it must be a whole number above 0")
    return [config[name] for name in names]


def _check_unet(parts: Parts, family: Family) -> None:
    unet, vae = parts["unet"], parts["vae"]
    for name, values in PLAIN_UNET.items():
        if unet.get(name) not in values:
            why = ": it is distilled already, for any guidance" if name == "time_cond_proj_dim" else ""
            raise InputError(
                f"{name} is {unet[name]!r}{why}; models that take more than latents, time and text can't be used"
            )
    inputs, outputs = _counts(unet, "in_channels", "out_channels")
    (latents,) = _counts(vae, "latent_channels")
    if not inputs == outputs == latents:
        raise InputError(
            f"the UNet takes {inputs} channels and gives {outputs}, the VAE has {latents}: only text-to-image models, "
            "where all three are the same, can be used"
        )
    for part in (unet, vae):
        if part.get("norm_num_groups") is not None:
            _counts(part, "norm_num_groups")
    size = unet.get("sample_size")
    sizes = size if isinstance(size, (list, tuple)) else [size, size]
    if len(sizes) != 2:
        raise InputError(f"sample_size is {size!r}: it must be one number, or height and width")
    for side in sizes:
        _counts({"sample_size": side}, "sample_size")
    widths = unet["encoder_hid_dim"] if unet.get("encoder_hid_dim_type") else unet.get("cross_attention_dim")
    given = sum(_counts(parts[name], "hidden_size")[0] for name in family.text_encoders)
    if any(width != given for width in (widths if isinstance(widths, (list, tuple)) else [widths])):
        raise InputError(f"the UNet takes text embeddings of width {widths}, the text encoders give {given}")
    family.check_added_conditions(parts)


def _check_vae(vae: dict[str, Any], family: Family) -> None:
    scale = vae.get("scaling_factor")
    if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale == 0:
        raise InputError(f"scaling_factor is {scale!r}: it must be a number other than 0")
    if vae.get("in_channels") != 3 or vae.get("out_channels") != 3:
        raise InputError("in_channels and out_channels must be 3: images are RGB")
    if vae.get("shift_factor"):
        raise InputError(f"shift_factor is {vae['shift_factor']!r}, which {family.pipeline_class.__name__} ignores")
    for name, nothing in (("latents_mean", 0), ("latents_std", 1)):
        values = vae.get(name)
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or len(values) != vae["latent_channels"]:
            raise InputError(f"{name} must be one number per channel")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise InputError(f"{name} must be numbers")
        honoured = family.normalizes_latents and vae.get("latents_mean") and vae.get("latents_std")
        if not honoured and any(value != nothing for value in values):
            raise InputError(
                f"{name} is set, which {family.pipeline_class.__name__} ignores"
                + (" without the other of latents_mean and latents_std" if family.normalizes_latents else "")
            )


def _check_text(parts: Parts, family: Family) -> None:
    lengths = []
    for name, encoder in zip(family.tokenizers, family.text_encoders, strict=True):
        length = parts[name].get("model_max_length")
        (most,) = _counts(parts[encoder], "max_position_embeddings")
        if not isinstance(length, int) or not 2 < length <= most:
            said = "no model_max_length" if length is None else f"the model_max_length {length!r}"
            raise InputError(
                f"{name} has {said}: it must be a number up to the {most} tokens that {encoder} takes, as a rule {most}"
            )
        lengths.append(length)
    if len(set(lengths)) > 1:
        raise InputError(f"the tokenizers have different lengths, {' and '.join(map(str, lengths))}")
