"""Fold an adapter into the weights, in float32, and check it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapters import METHODS
from .conditions import is_live
from .errors import BoostDiffError
from .guidance import guidance_embedding
from .model import LARGE_PARAMETERS, Model
from .student import StudentInfo, apply_student

CHECK_TIMESTEPS = (1, 250, 500, 750, 981)
TOLERANCE = 1e-4
"""Largest difference between merged and adapted predictions, relative to their largest value, in float32."""


@dataclass(frozen=True, kw_only=True)
class MergeCheck:
    """How the merged denoiser compares.

    Attributes:
        max_abs: largest absolute difference from base + adapter, over all `CHECK_TIMESTEPS`.
        relative: the same over the prediction's largest absolute value.
        cosine: smallest cosine similarity to base + adapter.
        change: largest absolute difference from the base: the adapter's effect.
    """

    max_abs: float
    relative: float
    cosine: float
    change: float


def merged_copy(model: Model, folder: Path, info: StudentInfo) -> Any:
    """The student as a plain denoiser, see `merge_in_place`; the model is left as it is."""
    merged = copy.deepcopy(model.denoiser)
    merge_in_place(merged, folder, info)
    return merged


def merge_in_place(denoiser: Any, folder: Path, info: StudentInfo) -> None:
    """Turn a base denoiser into the student; a guidance input is added, a soft prompt stays a hook, as graphs take it.

    Raises:
        InputError: the adapter does not fit.
        BoostDiffError: it can't be merged.
    """
    apply_student(denoiser, folder, info)
    METHODS[info.method].merge(denoiser)


@torch.no_grad()
def merge_and_check(model: Model, folder: Path, info: StudentInfo) -> MergeCheck:
    """Turn the denoiser of a base model in float32 into the student, with one of them in memory at any time.

    It is compared with base + adapter as stock libraries apply it.

    Raises:
        InputError: the adapter does not fit.
        BoostDiffError: see `check_merge`; or it can't be merged.
    """
    denoiser = model.denoiser
    inputs = model.family.example_inputs(model.pipeline, batch=2)
    if denoiser.num_parameters() >= LARGE_PARAMETERS:
        # The weights are the same at any size, and at the full one this would take minutes.
        multiple = model.family.latent_multiple(denoiser.config)
        height, width = (max(1, side // 4 // multiple) * multiple for side in inputs["sample"].shape[2:])
        inputs["sample"] = inputs["sample"][..., :height, :width]

    def predictions() -> torch.Tensor:
        arguments = dict(inputs)
        if is_live(denoiser.config):
            tokens = inputs["encoder_hidden_states"]
            arguments["encoder_hidden_states"] = torch.cat([tokens.flip(0), tokens], dim=1)
        if (width := denoiser.config.get("time_cond_proj_dim")) is not None:
            scales = torch.tensor([2.0, 5.0], device=model.device)
            arguments["timestep_cond"] = guidance_embedding(scales, width)
        outputs = [
            model.family.forward(denoiser, arguments | {"timestep": torch.full_like(arguments["timestep"], t)})
            for t in CHECK_TIMESTEPS
        ]
        # Not all devices have double precision.
        return torch.stack(outputs).cpu().double()

    base = predictions()
    apply_student(denoiser, folder, info)
    adapted = predictions()
    METHODS[info.method].merge(denoiser)
    return check_merge(base=base, adapted=adapted, merged=predictions())


def check_merge(*, base: torch.Tensor, adapted: torch.Tensor, merged: torch.Tensor) -> MergeCheck:
    """Compare predictions of the base, of base + adapter and of the merged denoiser, each `(timesteps, B, C, H, W)`.

    Raises:
        BoostDiffError: merged differs from base + adapter by more than `TOLERANCE`, or the adapter changes nothing.
    """
    max_abs = (merged - adapted).abs().max().item()
    check = MergeCheck(
        max_abs=max_abs,
        relative=max_abs / adapted.abs().max().item(),
        cosine=torch.cosine_similarity(merged.flatten(1), adapted.flatten(1)).min().item(),
        change=(merged - base).abs().max().item(),
    )
    if not check.relative <= TOLERANCE:
        raise BoostDiffError(f"the merged denoiser differs from base + adapter by {check.relative:.2e} of its scale")
    if not check.change > 0:
        raise BoostDiffError("the adapter changes nothing: the merged denoiser equals the base")
    return check
