"""The whole engine against the whole torch pipeline.

Each part may equal torch's while something between them is lost: a mask, a length of the text, a scaling factor. So one
prompt is drawn by the engine as people use it, and by the stock diffusers pipeline around the merged denoiser.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.conditions import is_live
from ..engine.config import PIXEL_MULTIPLE
from ..engine.errors import BoostDiffError
from ..engine.exported import Engine
from ..engine.manifest import Manifest
from ..engine.memory import give_back_memory
from ..engine.model import LARGE_PARAMETERS, Model
from ..engine.runners import unavailable
from ..engine.sampling import decode, initial_noise
from ..engine.student import Distilled
from .config import ExportConfig
from .parts import latent_sizes

PROMPT = "a photo of a red apple on a table"
NEGATIVE_PROMPT = "blurry, a green apple"
STEPS, SAMPLER, SEED = 2, "ddim", 0
"""Few, as a UNet of Stable Diffusion's size takes ten seconds a pass on a CPU; what is lost shows in the first."""

LATENT_TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "int8": 0.1, "fp8": 0.1}
"""Largest norm of the latents' difference, relative to their norm."""
IMAGE_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 5e-2, "fp8": 5e-2}
"""Largest root mean square of the images' difference, in [0, 1]: 60, 34 and 26 dB."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What torch draws.

    Attributes:
        latents: `(1, C, H, W)` after the last step, float32 on the CPU.
        image: `(1, 3, H, W)` in [0, 1].
        low_memory: whether memory is a concern.
    """

    latents: torch.Tensor
    image: torch.Tensor
    low_memory: bool


@torch.inference_mode()
def draw_reference(model: Model, config: ExportConfig, student: Distilled) -> Reference | None:
    """Draw by the stock pipeline of the merged student, in float32; None where it can't draw the smallest size."""
    pipeline, size = model.pipeline, latent_sizes(model, config)[0]
    height, width = (side * pipeline.vae_scale_factor for side in size)
    if height % PIXEL_MULTIPLE or width % PIXEL_MULTIPLE:
        return None
    states: list[torch.Tensor] = []

    def keep(pipeline: Any, index: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states.append(model.family.unpacked(tensors["latents"], *size).float().cpu())
        return {}

    scheduler, (sampler, steps) = pipeline.scheduler, _sampling(student)
    pipeline.scheduler = model.make_scheduler(sampler, spacing=student.timestep_spacing)
    image = pipeline(
        **_text(model),
        height=height,
        width=width,
        num_inference_steps=steps,
        **model.family.stock_guidance(
            1.0 if model.denoiser.config.get("time_cond_proj_dim") is None else student.guidance
        ),
        latents=model.family.packed(initial_noise((model.latent_shape[0], *size), count=1, seed=SEED)).to(model.device),
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    pipeline.scheduler = scheduler
    large = model.denoiser.num_parameters() >= LARGE_PARAMETERS
    return Reference(latents=states[-1], image=image.float().cpu(), low_memory=large)


def _sampling(student: Distilled) -> tuple[str, int]:
    """Sampler and steps: a few-step student's own."""
    return student.choose_sampling(student.sampler or SAMPLER, student.steps or STEPS)


def _text(model: Model) -> dict[str, Any]:
    """The prompt as arguments of the stock pipeline; with a negative prompt where the student takes any."""
    if not is_live(model.denoiser.config):
        return {"prompt": PROMPT}
    text = model.family.encode(model.pipeline, [PROMPT], negative_prompt=NEGATIVE_PROMPT).joined()
    tensors = text.tensors()
    pooled = {"pooled_prompt_embeds": tensors["text_embeds"]} if "text_embeds" in tensors else {}
    return {"prompt_embeds": text.encoder_hidden_states, **pooled}


def compare_engine(
    folder: Path,
    manifest: Manifest,
    reference: Reference | None,
    *,
    precisions: tuple[str, ...],
    device: torch.device,
    report: Callable[[str], None],
) -> None:
    """Draw by the engine in each precision of its graphs, and by its plans where they run; write the manifest.

    Raises:
        BoostDiffError: latents or image are beyond the tolerance.
    """
    manifest.write(folder)
    if reference is None:
        report(f"pipeline: not compared, as stock diffusers draws multiples of {PIXEL_MULTIPLE} pixels alone")
        return
    runs: list[tuple[str, str | None, str]] = [("onnx", precision, "cpu") for precision in precisions]
    if unavailable("tensorrt", manifest, device) is None:
        runs.append(("tensorrt", None, str(device)))
    sampler, steps = _sampling(manifest.distilled)
    negative_prompt = NEGATIVE_PROMPT if manifest.distilled.live_negative_prompt else None
    options: dict[str, Any] = {"negative_prompt": negative_prompt, "steps": steps, "sampler": sampler, "seed": SEED}
    for runner, precision, place in runs:
        name = f"{runner} {precision}" if precision else runner
        opened = Engine.load(folder, runner=runner, device=place, precision=precision, low_memory=reference.low_memory)
        # An encoder of few tokens cuts the prompt on both sides.
        with opened as engine, warnings.catch_warnings(action="ignore", category=UserWarning):
            height, width = (engine.model.pipeline.vae_scale_factor * side for side in reference.latents.shape[2:])
            *_, last = engine.stream(PROMPT, height=height, width=width, **options)
            image = decode(last.model, last.latents) - reference.image
        give_back_memory()
        latents = last.latents.float().cpu() - reference.latents
        check = {
            "latents": (latents.norm() / reference.latents.norm()).item(),
            "image": image.square().mean().sqrt().item(),
            "image_max": image.abs().max().item(),
        }
        precision = precision or manifest.artefacts[manifest.plan]["precision"]
        allowed = {"latents": LATENT_TOLERANCE[precision], "image": IMAGE_TOLERANCE[precision]}
        if wrong := [key for key in allowed if not check[key] <= allowed[key]]:
            differences = " and ".join(f"{key} by {check[key]:.2e} (allowed: {allowed[key]:.0e})" for key in wrong)
            raise BoostDiffError(f"the engine as a whole ({name}) differs from the torch pipeline: {differences}")
        manifest.pipeline[name] = check | {"allowed": allowed, "prompt": PROMPT, "steps": steps, "sampler": sampler}
        report(
            f"pipeline: {name} differs from torch by {check['latents']:.1e} of the latents' norm, "
            f"the image by {255 * check['image']:.2f}/255 (RMS), {255 * check['image_max']:.0f}/255 at most"
        )
    manifest.write(folder)
