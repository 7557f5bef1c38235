"""Speed: teacher and student on one runner, interleaved, after warm-up, as ratios with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from ..engine.generate import decode, initial_noise, sample
from ..engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ..engine.model import Model
from ..engine.runners import Runner


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, p10 and p90 of repeated measurements, and their number."""

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """From the measurements themselves."""
        p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
        return cls(median=median, p10=p10, p90=p90, runs=len(values))


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """One runner at one batch size.

    Attributes:
        runner: its name.
        device: its device.
        precision: of the UNet.
        batch_size: images made together.
        steps: sampling steps of a whole image.
        unet_teacher: seconds of one batched-CFG evaluation (a pass over 2B).
        unet_student: seconds of one student evaluation (a pass over B).
        unet_ratio: teacher / student, of neighbouring runs.
        image_teacher: seconds from prompts to pixels for the batch.
        image_student: likewise.
        image_ratio: teacher / student, of neighbouring runs.
    """

    runner: str
    device: str
    precision: str
    batch_size: int
    steps: int
    unet_teacher: Spread
    unet_student: Spread
    unet_ratio: Spread
    image_teacher: Spread
    image_student: Spread
    image_ratio: Spread

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def synchronise(device: torch.device) -> None:
    """Wait for all work queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    device: torch.device,
    runs: int,
    warm_up: int,
) -> tuple[list[float], list[float]]:
    """Time two functions in turn, A B B A A B …, so that drift of the machine's speed falls on both.

    Args:
        first: timed.
        second: timed.
        device: synchronised before and after each.
        runs: timed calls of each.
        warm_up: calls of each that are thrown away first.

    Returns:
        Seconds of each call of `first`, and of `second`.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(-warm_up, runs):
        order = ((0, first), (1, second)) if run % 2 == 0 else ((1, second), (0, first))
        for index, call in order:
            synchronise(device)
            began = time.perf_counter()
            call()
            synchronise(device)
            if run >= 0:
                seconds[index].append(time.perf_counter() - began)
    return seconds


def measure(
    runner: Runner,
    model: Model,
    *,
    prompts: list[str],
    guidance: float,
    make_scheduler: Callable[[], SchedulerMixin],
    steps: int,
    runs: int = 9,
    step_runs: int = 40,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Throughput:
    """Measure teacher and student on one runner.

    The runner's weights are the student's in both cases: speed does not depend on them, and the teacher is what
    differs in batch (2B) and arithmetic (equation 3).

    Args:
        runner: executes the UNet.
        model: text encoder, VAE and latents' shape.
        prompts: as many as the batch size.
        guidance: of the teacher.
        make_scheduler: gives a fresh scheduler.
        steps: sampling steps.
        runs: whole images timed, of each.
        step_runs: UNet evaluations timed, of each.
        on_progress: told what is being measured.
    """
    batch_size = len(prompts)
    device = runner.device
    noise = initial_noise(model.latent_shape, count=batch_size, seed=0).to(device, runner.dtype)
    text = model.family.encode(model.pipeline, prompts).to(device, runner.dtype)
    teacher: Denoiser = GuidedDenoiser(runner, guidance)
    student: Denoiser = SinglePassDenoiser(runner)
    t = torch.tensor(501, device=device)

    def images(denoiser: Denoiser) -> torch.Tensor:
        encoded = model.family.encode(model.pipeline, prompts, negative_prompt="" if denoiser is teacher else None)
        encoded = encoded.to(device, runner.dtype)
        latents = sample(denoiser, text=encoded, noise=noise, scheduler=make_scheduler(), steps=steps)
        return decode(model, latents.to(model.device))

    with torch.inference_mode():
        on_progress("UNet steps")
        unet = interleaved(
            lambda: teacher(noise, t, text),
            lambda: student(noise, t, text),
            device=device,
            runs=step_runs,
            warm_up=5,
        )
        on_progress("whole images")
        whole = interleaved(lambda: images(teacher), lambda: images(student), device=device, runs=runs, warm_up=1)
    return Throughput(
        runner=runner.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=str(runner.dtype).removeprefix("torch."),
        batch_size=batch_size,
        steps=steps,
        unet_teacher=Spread.of(unet[0]),
        unet_student=Spread.of(unet[1]),
        unet_ratio=Spread.of([a / b for a, b in zip(*unet, strict=True)]),
        image_teacher=Spread.of(whole[0]),
        image_student=Spread.of(whole[1]),
        image_ratio=Spread.of([a / b for a, b in zip(*whole, strict=True)]),
    )
