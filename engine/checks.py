"""Checks of components' configurations that several families share; each raises an InputError that names the setting.

A configuration is complete: the defaults of its class are in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .errors import InputError

ComponentConfigs = dict[str, dict[str, Any]]
"""The configuration of each of a pipeline's components, completed with the defaults of its class, by name."""

PLAIN_UNET: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "time_cond_proj_dim": (None,),
}
"""Settings of a UNet that ask for further inputs, with the values that don't."""


def positive_ints(config: dict[str, Any], *names: str) -> list[int]:
    """Settings that must be whole numbers above 0."""
    for name in names:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}: it must be a whole number above 0")
    return [config[name] for name in names]


def check_unet(components: ComponentConfigs, text_encoders: Sequence[str]) -> None:
    """A UNet of text-to-image models whose text embeddings are those of its encoders, beside each other."""
    unet, vae = components["unet"], components["vae"]
    for name, values in PLAIN_UNET.items():
        if unet.get(name) not in values:
            why = ": it is distilled already, for any guidance" if name == "time_cond_proj_dim" else ""
            raise InputError(
                f"{name} is {unet[name]!r}{why}; models that take more than latents, time and text can't be used"
            )
    inputs, outputs = positive_ints(unet, "in_channels", "out_channels")
    (latents,) = positive_ints(vae, "latent_channels")
    if not inputs == outputs == latents:
        raise InputError(
            f"the UNet takes {inputs} channels and gives {outputs}, the VAE has {latents}: only text-to-image models, "
            "where all three are the same, can be used"
        )
    for config in (unet, vae):
        if config.get("norm_num_groups") is not None:
            positive_ints(config, "norm_num_groups")
    size = unet.get("sample_size")
    sizes = size if isinstance(size, (list, tuple)) else [size, size]
    if len(sizes) != 2:
        raise InputError(f"sample_size is {size!r}: it must be one number, or height and width")
    for side in sizes:
        positive_ints({"sample_size": side}, "sample_size")
    widths = unet["encoder_hid_dim"] if unet.get("encoder_hid_dim_type") else unet.get("cross_attention_dim")
    given = sum(positive_ints(components[name], "hidden_size")[0] for name in text_encoders)
    if any(width != given for width in (widths if isinstance(widths, (list, tuple)) else [widths])):
        raise InputError(f"the UNet takes text embeddings of width {widths}, the text encoders give {given}")


def check_vae(vae: dict[str, Any], *, pipeline: str, normalizes: bool = False, shifts: bool = False) -> None:
    """A VAE of RGB images; what the stock pipeline of this name would ignore is refused.

    `normalizes` says whether it honours `latents_mean` and `latents_std`, `shifts` whether `shift_factor`.
    """
    scale = vae.get("scaling_factor")
    if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale == 0:
        raise InputError(f"scaling_factor is {scale!r}: it must be a number other than 0")
    if vae.get("in_channels") != 3 or vae.get("out_channels", 3) != 3:
        raise InputError("in_channels and out_channels must be 3: images are RGB")
    for name in ("block_out_channels", "encoder_block_out_channels"):
        if name in vae and (not isinstance(vae[name], (list, tuple)) or not vae[name]):
            raise InputError(f"{name} is {vae[name]!r}: it must be a list, of one number for each size")
    if not shifts and vae.get("shift_factor"):
        raise InputError(f"shift_factor is {vae['shift_factor']!r}, which {pipeline} ignores")
    for name, nothing in (("latents_mean", 0), ("latents_std", 1)):
        values = vae.get(name)
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or len(values) != vae["latent_channels"]:
            raise InputError(f"{name} must be one number per channel")
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise InputError(f"{name} must be numbers")
        honoured = normalizes and vae.get("latents_mean") and vae.get("latents_std")
        if not honoured and any(value != nothing for value in values):
            raise InputError(
                f"{name} is set, which {pipeline} ignores"
                + (" without the other of latents_mean and latents_std" if normalizes else "")
            )


def check_clip_text(components: ComponentConfigs, text_encoders: Sequence[str], tokenizers: Sequence[str]) -> None:
    """CLIP text encoders and their tokenizers, all of one length."""
    lengths = []
    for name, encoder in zip(tokenizers, text_encoders, strict=True):
        length = components[name].get("model_max_length")
        (most,) = positive_ints(components[encoder], "max_position_embeddings")
        if not isinstance(length, int) or not 2 < length <= most:
            said = "no model_max_length" if length is None else f"the model_max_length {length!r}"
            raise InputError(
                f"{name} has {said}: it must be a number up to the {most} tokens that {encoder} takes, as a rule {most}"
            )
        lengths.append(length)
    if len(set(lengths)) > 1:
        raise InputError(f"the tokenizers have different lengths, {' and '.join(map(str, lengths))}")
