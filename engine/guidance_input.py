"""Guidance-conditioned students (w-conditioned, Meng et al. 2023), and a student's adapter with or without that."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from .adapters import METHODS, Adapter, BitFit, Lora, SoftPrompt, copy_by_name
from .errors import InputError
from .families import family_of_denoiser
from .guidance import smooth_columns
from .live_negative import LiveNegative
from .norms import Norms

GUIDANCE_FILE = "guidance_embedding.safetensors"
PROJECTION = "time_embedding.cond_proj.weight"

GUIDANCE_WIDTH = 256
"""Width of the guidance embedding, as in latent consistency models (Luo et al. 2023) and diffusers' examples."""


class GuidanceConditioned(Adapter):
    """Another adapter, and with it a guidance embedding of w (Meng et al. 2023, §3.1).

    The embedding enters beside the timestep's, through a projection that starts at zero. The teacher, which is given
    no w, does not see it.
    """

    file = GUIDANCE_FILE

    def __init__(self, unet: UNet2DConditionModel, inner: Adapter) -> None:
        super().__init__(unet)
        self.inner = inner
        self.projection = add_guidance_embedding(unet)
        # The other columns stay at zero: trained, they add noise at every scale that was not drawn.
        smooth = smooth_columns(self.projection.in_features).to(self.projection.weight.device)
        self.projection.weight.register_hook(lambda gradient: gradient * smooth)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {**self.inner.parameters(), PROJECTION: self.denoiser.get_parameter(PROJECTION)}

    def count(self) -> int:
        """See `Adapter.count`: the projection's smooth columns alone."""
        columns = int(smooth_columns(self.projection.in_features).sum())
        return self.inner.count() + columns * self.projection.out_features

    def disabled(self) -> AbstractContextManager[None]:
        return self.inner.disabled()

    def scale(self, factor: float, largest: float | None = None) -> None:
        """See `Adapter.scale`; nothing tells how a plain adapter's additions grow with w."""
        if not isinstance(self.inner, LiveNegative):
            super().scale(factor, largest)
        self.inner.scale(factor, largest)

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the other adapter, and the projection in another file."""
        save_file({PROJECTION: self.projection.weight.detach().cpu().contiguous()}, folder / GUIDANCE_FILE)
        return [*self.inner.save(folder, pipeline), folder / GUIDANCE_FILE]

    @staticmethod
    @torch.no_grad()
    def load(unet: UNet2DConditionModel, folder: str | Path) -> None:
        """See `Adapter.load`, of the projection alone."""
        weight = load_file(Path(folder) / GUIDANCE_FILE)[PROJECTION]
        projection = add_guidance_embedding(unet, weight.shape[1]).to(unet.dtype).requires_grad_(False)
        if weight.shape != projection.weight.shape:
            raise ValueError(f"its guidance embedding has shape {tuple(weight.shape)}")
        projection.weight.copy_(weight)

    def load_for_training(self, folder: Path) -> None:
        self.inner.load_for_training(folder)
        copy_by_name({PROJECTION: self.denoiser.get_parameter(PROJECTION)}, load_file(folder / GUIDANCE_FILE))


def add_guidance_embedding(unet: UNet2DConditionModel, width: int = GUIDANCE_WIDTH) -> torch.nn.Linear:
    """Give a UNet the input `timestep_cond`, through which a stock pipeline hands it any `guidance_scale`.

    The projection is float32 and starts at zero, so that nothing changes before it is trained: diffusers'
    (`TimestepEmbedding.cond_proj`) starts at random.

    Raises:
        ValueError: the UNet has one already.
    """
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError("the UNet is guidance-conditioned already")
    projection = torch.nn.Linear(width, unet.time_embedding.linear_1.in_features, bias=False, device=unet.device)
    torch.nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection
    unet.register_to_config(time_cond_proj_dim=width)
    return projection


ADAPTERS: tuple[type[Adapter], ...] = (*METHODS.values(), Norms, LiveNegative, GuidanceConditioned)
"""All that may have a file in a student's folder."""

ADAPTER_FILES = {each.file for each in ADAPTERS}


def make_adapter(
    method: str,
    denoiser: Any,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str = "attention",
    tokens: int = 16,
    norms: bool = False,
    guidance_input: bool = False,
    live_negative_prompt: bool = False,
) -> Adapter:
    """Put a new adapter on a frozen denoiser; its initial weights come from torch's default generator.

    The denoiser's parameters must not require gradients. `alpha` is the rank by default, `targets` a key of
    `Family.targets` or comma-separated endings of module names, `tokens` the length of a soft prompt; with
    `norms` normalizations are trained, too, with `guidance_input` the student is guidance-conditioned.

    Raises:
        InputError: no layer has such a name, or the tuner can't take one that has; or the family's students can't be
            such ones.
    """
    family = family_of_denoiser(denoiser)
    asked = {
        "--method soft-prompt": method == "soft-prompt",
        "--norms": norms,
        "a range of --guidance": guidance_input,
        "--negative-prompt live": live_negative_prompt,
    }
    option = next((name for name, given in asked.items() if given), None)
    if option and not family.takes_more:
        raise InputError(f"{option} is for UNets, not for a {family.name} model")
    adapter: Adapter
    if method == "bitfit":
        adapter = BitFit(denoiser)
    elif method == "soft-prompt":
        adapter = SoftPrompt(denoiser, tokens)
    else:
        named = family.targets.get(targets)
        modules = list(named or (part.strip() for part in targets.split(",")))
        if named is None:
            layers = [f".{name}" for name, _ in denoiser.named_modules()]
            for ending in modules:
                if not any(layer.endswith(f".{ending}") for layer in layers):
                    raise InputError(f"no layer's name in the denoiser ends in {ending!r}: check --targets")
        adapter = Lora(denoiser, method, rank=rank, alpha=alpha or rank, targets=modules)
    if norms:
        adapter = Norms(denoiser, adapter)
    if live_negative_prompt:
        adapter = LiveNegative(denoiser, adapter)
    return GuidanceConditioned(denoiser, adapter) if guidance_input else adapter
