"""The model families that can be used, by the class of their pipeline."""

from __future__ import annotations

from typing import Any

import torch

from .chroma import Chroma
from .errors import InputError
from .family import Family
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .stable_diffusion_3 import StableDiffusion3

FAMILIES: dict[str, Family] = {
    family.pipeline_class.__name__: family
    for family in (StableDiffusion(), StableDiffusionXL(), StableDiffusion3(), Sana(), Chroma(), QwenImage())
}
"""By the `_class_name` of a folder's `model_index.json`."""


def family_of(model_index: dict[str, Any]) -> Family:
    """The family of a pipeline folder.

    Raises:
        InputError: none handles this pipeline class.
    """
    class_name = model_index.get("_class_name")
    # Custom pipelines name a file and a class.
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"models of class {class_name} are not supported; supported: {known}")
    return FAMILIES[class_name]


def family_of_denoiser(denoiser: torch.nn.Module) -> Family:
    """A family whose denoisers are of this class: what calls and adapts one, which families of one class share."""
    return next(family for family in FAMILIES.values() if isinstance(denoiser, family.denoiser_class))
