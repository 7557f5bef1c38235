"""Speed: every mode on every runner, interleaved in one run, after warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from diffusers import SchedulerMixin

from ...engine.errors import one_line
from ...engine.guidance import GuidedDenoiser, SinglePassDenoiser
from ...engine.model import Model
from ...engine.runners import Runner
from ...engine.sampling import decode, initial_noise, sample
from ..stats import Estimate, Spread, median_of
from .device import Meter, Stopwatch, gemm_peaks, synchronize
from .flops import Flops, count_flops

MODES = {"teacher": 2, "student": 1, "unguided": 1}
"""Modes and their UNet passes per step: batched CFG, the student, and the unguided teacher: the no-CFG speed bound."""

PARTS = ("unet", "text_encoder", "vae_decode")


@dataclass(frozen=True)
class RunnerMode:
    """What is timed: a runner by its name, and one of `MODES`."""

    runner: str
    mode: str


@dataclass(frozen=True, kw_only=True)
class TimedVariant:
    """A mode on a runner.

    Attributes:
        mode: key of `MODES`.
        runner: executes the UNet.
        parts: text encoder and VAE of the runner; None takes the model's.
    """

    mode: str
    runner: Runner
    parts: Model | None = None

    @property
    def key(self) -> RunnerMode:
        """Key of its row."""
        return RunnerMode(self.runner.name, self.mode)

    @property
    def name(self) -> str:
        """For messages: "onnx student"."""
        return f"{self.key.runner} {self.key.mode}"

    def time(
        self,
        model: Model,
        *,
        prompts: Sequence[str],
        noise: torch.Tensor,
        guidance: float,
        scheduler: SchedulerMixin,
        steps: int,
    ) -> dict[str, float]:
        """Make one batch of images and time it; see `time_batch`.

        Returns:
            Seconds by part, as far as they are known, with "total".
        """
        return time_batch(
            self, self.parts or model, prompts=prompts, noise=noise, guidance=guidance, scheduler=scheduler, steps=steps
        )


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """A variant at one batch size; times in seconds. The parts of a stock pipeline are None.

    Attributes:
        mode: key of `MODES`.
        runner: its name.
        device: its device.
        precision: precision of the UNet.
        batch_size: images per batch.
        steps: sampling steps.
        latency: from prompts to pixels on the host, per batch.
        images_per_second: batch size over the median latency.
        unet_step: one evaluation of the UNet, the mean over a run's steps: on 2B for the teacher, else on B.
        text_encoder: encoding the prompts, per batch.
        vae_decode: decoding, and the copy to the host, per batch.
        host_gap: latency less all parts: scheduler, guidance arithmetic, Python, idle device.
        tflops: UNet operations per second of `unet_step`, in 10¹².
        peak_share: `tflops` over the peak of matrix multiplication in this precision; None where that is unknown.
        joules_per_image: energy of the whole GPU board, the mean over all timed batches; None without NVML.
        memory_in_use: bytes of GPU memory in use after a batch, by all that is loaded; None without NVML.
    """

    mode: str
    runner: str
    device: str
    precision: str
    batch_size: int
    steps: int
    latency: Spread
    images_per_second: Estimate
    unet_step: Spread
    text_encoder: Spread | None
    vae_decode: Spread | None
    host_gap: Spread | None
    tflops: float
    peak_share: float | None
    joules_per_image: float | None
    memory_in_use: int | None


@dataclass(frozen=True, kw_only=True)
class SpeedRatio:
    """How many times as fast one variant is as another, by their times in the same round.

    Attributes:
        slower: what is compared with.
        faster: a student.
        part: "images" (prompts to pixels) or "unet" (one step).
        batch_size: images per batch.
        estimate: median of the rounds' ratios.
        ceiling: ratio of the counted operations; None where it does not bound the estimate.
    """

    slower: RunnerMode
    faster: RunnerMode
    part: str
    batch_size: int
    estimate: Estimate
    ceiling: float | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """All that was measured about speed.

    Attributes:
        rows: one per variant and batch size.
        ratios: see `SpeedRatio`.
        flops: operations, counted from the model.
        peaks: peak of matrix multiplication in the same run, by precision, in 10¹² operations per second.
        left_out: reason by variant and batch size.
    """

    rows: list[SpeedRow]
    ratios: list[SpeedRatio]
    flops: Flops
    peaks: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def students(self) -> list[SpeedRow]:
        """The student's rows, the one with the most images per second first."""
        return sorted((row for row in self.rows if row.mode == "student"), key=lambda row: -row.images_per_second.value)

    def ratio(self, part: str, row: SpeedRow, *, baseline: str | None = None) -> SpeedRatio | None:
        """Guided teacher over a student's row; None where they were not timed together.

        Args:
            part: "images" or "unet".
            row: the student's.
            baseline: the teacher's runner, such as "stock diffusers"; None takes the student's.
        """
        wanted = (
            RunnerMode(baseline or row.runner, "teacher"),
            RunnerMode(row.runner, "student"),
            part,
            row.batch_size,
        )
        return next((r for r in self.ratios if (r.slower, r.faster, r.part, r.batch_size) == wanted), None)


def interleaved(count: int, rounds: int) -> Iterator[tuple[int, int]]:
    """Every round visits all, in alternating order, so that drift falls on all alike.

    Yields:
        (round, index) pairs: 0 1 2, 2 1 0, 0 1 2, …
    """
    for number in range(rounds):
        order = range(count) if number % 2 == 0 else reversed(range(count))
        yield from ((number, index) for index in order)


def time_batch(
    variant: TimedVariant,
    model: Model,
    *,
    prompts: Sequence[str],
    noise: torch.Tensor,
    guidance: float,
    scheduler: SchedulerMixin,
    steps: int,
) -> dict[str, float]:
    """Make one batch of images and time it.

    Args:
        variant: mode and runner.
        model: text encoder and VAE.
        prompts: B prompts.
        noise: `(B, C, H, W)` on the CPU.
        guidance: guidance scale of the teacher.
        scheduler: a fresh scheduler.
        steps: sampling steps.

    Returns:
        Seconds by part, with "total" and "host_gap".
    """
    runner, guided = variant.runner, MODES[variant.mode] > 1
    device = runner.device
    watch = Stopwatch(device)

    width = runner.config.get("time_cond_proj_dim")

    def timed_runner(z_t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The graph of a guidance-conditioned student wants the scale in every row; its value changes no time.
        if width is not None:
            kwargs["timestep_cond"] = z_t.new_zeros(len(z_t), width)
        with watch.part("unet"):
            return runner(z_t, *args, **kwargs)

    denoiser = GuidedDenoiser(timed_runner, guidance) if guided else SinglePassDenoiser(timed_runner)
    synchronize(device)
    began = time.perf_counter()
    with watch.part("text_encoder"):
        text = model.family.encode(model.pipeline, prompts, negative_prompt="" if guided else None).to(
            device, runner.dtype
        )
    latents = sample(denoiser, text=text, noise=noise.to(device, runner.dtype), scheduler=scheduler, steps=steps)
    with watch.part("vae_decode"):
        decode(model, latents.to(model.device))
    synchronize(device)
    seconds = {"total": time.perf_counter() - began} | {name: watch.seconds(name) for name in PARTS}
    return seconds | {"host_gap": seconds["total"] - sum(seconds[name] for name in PARTS)}


def measure(
    variants: Sequence[TimedVariant],
    model: Model,
    *,
    prompts: Sequence[str],
    guidance: float,
    make_scheduler: Callable[[], SchedulerMixin],
    steps: int,
    batch_sizes: Sequence[int],
    runs: int = 9,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Speed:
    """Measure all variants at all batch sizes.

    Weights don't matter to speed: where a runner has one graph, all of its variants share it. Student and unguided
    teacher are then the same work, timed twice: how much they differ is the noise of the measurement.

    Args:
        variants: see `TimedVariant`; the ratios need a teacher and a student on the same runner.
        model: text encoder, VAE and latent shape.
        prompts: at least one; repeated to fill a batch.
        guidance: guidance scale of the teacher.
        make_scheduler: gives a fresh scheduler.
        steps: sampling steps.
        batch_sizes: batch sizes, measured one after the other.
        runs: timed batches per variant, after one that is discarded.
        on_progress: progress callback, with a message.
    """
    flops = count_flops(model)
    on_progress("measuring the peak of matrix multiplication")
    device = variants[0].runner.device
    dtypes = [variant.runner.precision for variant in variants]
    speed, meter = Speed(rows=[], ratios=[], flops=flops, peaks=gemm_peaks(device, dtypes)), Meter(device)
    for batch_size in batch_sizes:
        noise = initial_noise(model.latent_shape, count=batch_size, seed=0)
        batch = [prompts[i % len(prompts)] for i in range(batch_size)]

        def timed(variant: TimedVariant, noise: torch.Tensor = noise, batch: list[str] = batch) -> dict[str, float]:
            before = meter.joules()
            seconds = variant.time(
                model, prompts=batch, noise=noise, guidance=guidance, scheduler=make_scheduler(), steps=steps
            )
            after, used = meter.joules(), meter.memory_in_use()
            if before is not None and after is not None:
                seconds["joules"] = after - before
            return seconds | ({} if used is None else {"memory": used})

        running = []
        for variant in variants:
            on_progress(f"batch {batch_size}: warming up {variant.name}")
            # What the one before no longer needs is not counted as memory in use.
            clear_device_cache()
            try:
                timed(variant)
                running.append(variant)
            except Exception as error:
                # Out of memory, or a batch beyond an engine's profile: each library raises a type of its own.
                speed.left_out[f"{variant.name}, batch {batch_size}"] = one_line(error)
        times: list[list[dict[str, float]]] = [[] for _ in running]
        for number, index in interleaved(len(running), runs):
            on_progress(f"batch {batch_size}: round {number + 1} of {runs}, {running[index].name}")
            times[index].append(timed(running[index]))
        measured = dict(zip([variant.key for variant in running], times, strict=True))
        for variant in running:
            speed.rows.append(_row(variant, measured[variant.key], flops, batch_size, steps))
        speed.ratios.extend(_ratios(measured, flops, batch_size, steps))
        # The best of several moments: other processes and clocks hold a single one down.
        for name, peak in gemm_peaks(device, dtypes).items():
            speed.peaks[name] = max(peak, speed.peaks[name])
    shares = [row.tflops / speed.peaks[row.precision] if row.precision in speed.peaks else None for row in speed.rows]
    speed.rows[:] = [replace(row, peak_share=share) for row, share in zip(speed.rows, shares, strict=True)]
    return speed


def _row(variant: TimedVariant, times: list[dict[str, float]], flops: Flops, batch_size: int, steps: int) -> SpeedRow:
    device = variant.runner.device

    def values(key: str) -> list[float]:
        return [run[key] for run in times if key in run]

    def spread(key: str) -> Spread | None:
        return Spread.of(spans) if (spans := values(key)) else None

    total = median_of([run["total"] for run in times])
    step = Spread.of([run["unet"] / steps for run in times])
    joules, memory = values("joules"), values("memory")
    return SpeedRow(
        mode=variant.mode,
        runner=variant.key.runner,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=str(variant.runner.precision).removeprefix("torch."),
        batch_size=batch_size,
        steps=steps,
        latency=Spread.of([run["total"] for run in times]),
        images_per_second=Estimate(
            value=batch_size / total.value,
            low=batch_size / total.high,
            high=batch_size / total.low,
            coverage=total.coverage,
        ),
        unet_step=step,
        text_encoder=spread("text_encoder"),
        vae_decode=spread("vae_decode"),
        host_gap=spread("host_gap"),
        tflops=MODES[variant.mode] * batch_size * flops.unet / step.median / 1e12,
        # Known once the peak is, at the end of the run.
        peak_share=None,
        joules_per_image=sum(joules) / len(joules) / batch_size if joules else None,
        memory_in_use=int(max(memory)) if memory else None,
    )


BASELINES = ("stock diffusers", "compiled")
"""The strongest that a user has without a student, compared with the student on its best runner."""


def _ratios(
    measured: dict[RunnerMode, list[dict[str, float]]], flops: Flops, batch_size: int, steps: int
) -> list[SpeedRatio]:
    """Teacher and unguided teacher over the student on each runner; torch's teacher over the other runners' students.

    And the baselines over the student that is fastest at this batch size.
    """
    ceilings = {"images": flops.ceiling(steps=steps, batch_size=batch_size), "unet": 2.0}
    students = [key for key in measured if key.mode == "student"]
    best = min(students, key=lambda key: median_of([run["total"] for run in measured[key]]).value, default=None)
    ratios = []
    for faster in students:
        others = [RunnerMode(faster.runner, "teacher"), RunnerMode(faster.runner, "unguided")]
        baselines = ("torch", *(BASELINES if faster == best else ()))
        others += [RunnerMode(name, "teacher") for name in baselines if name != faster.runner]
        for slower in others:
            if slower not in measured:
                continue
            bounded = slower == RunnerMode(faster.runner, "teacher")
            for part, key in (("images", "total"), ("unet", "unet")):
                rounds = zip(measured[slower], measured[faster], strict=True)
                ratios.append(
                    SpeedRatio(
                        slower=slower,
                        faster=faster,
                        part=part,
                        batch_size=batch_size,
                        estimate=median_of([one[key] / other[key] for one, other in rounds]),
                        ceiling=ceilings[part] if bounded else None,
                    )
                )
    return ratios
