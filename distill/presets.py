"""From the command line's options to a `DistillConfig`: what is left out comes from a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..engine.embedded import TRAIN_PROMPTS
from ..engine.errors import InputError
from .config import DistillConfig

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"batch_size": 32, "loss_weight": "snr"},
    "paper": {"updates": 1600, "batch_size": 512, "learning_rate": 5e-5, "loss_weight": "constant"},
}
"""`paper`: BoostDiff's run on Stable Diffusion 2.1 base (474,741 LAION pairs)."""

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"updates": 260, "learning_rate": 1e-3},
    "bitfit": {"updates": 300, "learning_rate": 1e-2},
    "soft-prompt": {"updates": 300, "learning_rate": 1e-2},
}
"""Where neither the user nor the preset says: chosen on `emoji64`, where each takes under 4 minutes on two cores."""

RANGE_UPDATES = 4
"""How many times as many updates a range student gets: it learns many scales; figures in docs/distillation.md."""


def resolve_config(
    *,
    preset: str | None,
    in_bfloat16: bool,
    embedded: bool,
    method: str,
    prompts: Path | None,
    images: str | None,
    **options: Any,
) -> DistillConfig:
    """Fill in what the user left out.

    Args:
        preset: a key of `PRESETS`, or None for the default.
        in_bfloat16: the device has bfloat16 instructions.
        embedded: the model is the one that ships prompts of its own.
        method: of the adapter.
        prompts: as given.
        images: as given.
        options: the other fields of `DistillConfig`; None means left out.

    Raises:
        InputError: the preset is unknown, or a value can't be used.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    defaults: dict[str, Any] = {
        **METHOD_DEFAULTS.get(method, METHOD_DEFAULTS["lora"]),
        "precision": "bf16" if in_bfloat16 else "fp32",
        **PRESETS[preset or "default"],
    }
    if options.get("guidance_max") is not None and "updates" not in PRESETS[preset or "default"]:
        defaults["updates"] *= RANGE_UPDATES
    if prompts is None and images is None and embedded:
        prompts = TRAIN_PROMPTS
    given = {name: value for name, value in options.items() if value is not None}
    return DistillConfig(method=method, prompts=prompts, images=images, **(defaults | given))
