"""Speed: every way of sampling on every runner, interleaved in one run, after warm-up."""

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
from .device import Meter, Stopwatch, gemm_peaks, synchronise
from .flops import Flops, count_flops

WAYS = {"teacher": 2, "student": 1, "unguided": 1}
"""Ways of sampling and their UNet passes per step: batched CFG, the student, the teacher without guidance (floor)."""

PARTS = ("unet", "text_encoder", "vae_decode")


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One way of sampling on one runner.

    Attributes:
        way: a key of `WAYS`.
        runner: executes the UNet.
        parts: the text encoder and VAE that go with the runner; None takes the model's own.
    """

    way: str
    runner: Runner
    parts: Model | None = None

    @property
    def label(self) -> str:
        """Of the row: the runner's name."""
        return self.runner.name

    @property
    def name(self) -> str:
        """For people: "onnx student"."""
        return f"{self.label} {self.way}"

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
    """One entrant at one batch size; times in seconds.

    Attributes:
        way: a key of `WAYS`.
        runner: its name.
        device: its device.
        precision: of the UNet.
        batch_size: images made together.
        steps: sampling steps.
        latency: from prompts to pixels on the host, for the batch.
        images_per_second: batch size over the median latency.
        unet_step: one evaluation of the UNet, the mean over a run's steps: over 2B for the teacher, else over B.
        text_encoder: encoding the prompts, for the batch.
        vae_decode: decoding the batch, with its way to the host.
        host_gap: latency less all of the parts: scheduler, guidance arithmetic, Python, idle device.
        tflops: UNet operations per second of `unet_step`, in 10¹².
        peak_share: `tflops` over the peak of matrix multiplication in the row's precision; None where that is unknown.
        joules_per_image: of the whole GPU board, the mean over all timed batches; None without NVML.
        memory_in_use: bytes of GPU memory in use after a batch, by all that is loaded; None without NVML.

    Of a stock pipeline the text encoder, the VAE and the gap are not known apart: None.
    """

    way: str
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
    """How many times as fast one entrant is as another, by their times in the same round.

    Attributes:
        slower: its name, "torch teacher".
        faster: likewise.
        part: "images" (prompts to pixels) or "unet" (one step).
        batch_size: of both.
        estimate: median of the rounds' ratios.
        ceiling: the ratio of the counted operations; None where the runners differ.
    """

    slower: str
    faster: str
    part: str
    batch_size: int
    estimate: Estimate
    ceiling: float | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """All that was measured about speed.

    Attributes:
        rows: one per entrant and batch size.
        ratios: see `SpeedRatio`.
        flops: counted from the model.
        peaks: of matrix multiplication in the same run, by precision, in 10¹² operations per second.
        left_out: reasons by entrant and batch size.
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
    def fastest(self) -> SpeedRow:
        """The student's row with the most images per second."""
        students = [row for row in self.rows if row.way == "student"]
        return max(students, key=lambda row: row.images_per_second.value)

    def ratio(self, part: str, row: SpeedRow) -> SpeedRatio | None:
        """Teacher over student where this row was measured; None where the teacher couldn't run."""
        names = (f"{row.runner} teacher", f"{row.runner} student", part, row.batch_size)
        matches = [r for r in self.ratios if (r.slower, r.faster, r.part, r.batch_size) == names]
        return matches[0] if matches else None

    def over_baseline(self, baseline: str, row: SpeedRow) -> SpeedRatio | None:
        """Whole images: a baseline with guidance ("stock diffusers", …) over this student's row; None if not timed."""
        names = (f"{baseline} teacher", f"{row.runner} student", "images", row.batch_size)
        matches = [r for r in self.ratios if (r.slower, r.faster, r.part, r.batch_size) == names]
        return matches[0] if matches else None


def in_turn(count: int, rounds: int) -> Iterator[tuple[int, int]]:
    """Whose turn it is: every round visits all, in alternating order, so that drift falls on all alike.

    Yields:
        (round, index) pairs: 0 1 2, 2 1 0, 0 1 2, …
    """
    for number in range(rounds):
        order = range(count) if number % 2 == 0 else reversed(range(count))
        yield from ((number, index) for index in order)


def time_batch(
    entrant: Entrant,
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
        entrant: how.
        model: text encoder and VAE.
        prompts: B of them.
        noise: `(B, C, H, W)` on the CPU.
        guidance: of the teacher.
        scheduler: a fresh one.
        steps: sampling steps.

    Returns:
        Seconds by part, with "total" and "host_gap".
    """
    runner, guided = entrant.runner, WAYS[entrant.way] > 1
    device = runner.device
    watch = Stopwatch(device)

    width = runner.config.get("time_cond_proj_dim")

    def timed_runner(z_t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # A range student's graph wants its guidance in every row; the value changes no time.
        if width is not None:
            kwargs["timestep_cond"] = z_t.new_zeros(len(z_t), width)
        with watch.part("unet"):
            return runner(z_t, *args, **kwargs)

    denoiser = GuidedDenoiser(timed_runner, guidance) if guided else SinglePassDenoiser(timed_runner)
    synchronise(device)
    began = time.perf_counter()
    with watch.part("text_encoder"):
        text = model.family.encode(model.pipeline, prompts, negative_prompt="" if guided else None).to(
            device, runner.dtype
        )
    latents = sample(denoiser, text=text, noise=noise.to(device, runner.dtype), scheduler=scheduler, steps=steps)
    with watch.part("vae_decode"):
        decode(model, latents.to(model.device))
    synchronise(device)
    seconds = {"total": time.perf_counter() - began} | {name: watch.seconds(name) for name in PARTS}
    return seconds | {"host_gap": seconds["total"] - sum(seconds[name] for name in PARTS)}


def measure(
    entrants: Sequence[Entrant],
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
    """Measure all entrants at all batch sizes.

    Weights don't matter to speed: where a runner has one graph, all of its entrants share it, and student and
    unguided teacher are then the same work, timed twice: how much they differ is the noise of the measurement.

    Args:
        entrants: see `Entrant`; the ratios need a teacher and a student on the same runner.
        model: text encoder, VAE and latents' shape.
        prompts: at least one; repeated to fill a batch.
        guidance: of the teacher.
        make_scheduler: gives a fresh scheduler.
        steps: sampling steps.
        batch_sizes: measured one after the other.
        runs: timed batches of each entrant, after one that is thrown away.
        on_progress: told what is being measured.
    """
    flops = count_flops(model)
    on_progress("measuring the peak of matrix multiplication")
    device = entrants[0].runner.device
    dtypes = [entrant.runner.precision for entrant in entrants]
    speed, meter = Speed(rows=[], ratios=[], flops=flops, peaks=gemm_peaks(device, dtypes)), Meter(device)
    for batch_size in batch_sizes:
        noise = initial_noise(model.latent_shape, count=batch_size, seed=0)
        batch = [prompts[i % len(prompts)] for i in range(batch_size)]

        def timed(entrant: Entrant, noise: torch.Tensor = noise, batch: list[str] = batch) -> dict[str, float]:
            before = meter.joules()
            seconds = entrant.time(
                model, prompts=batch, noise=noise, guidance=guidance, scheduler=make_scheduler(), steps=steps
            )
            after, used = meter.joules(), meter.memory_in_use()
            if before is not None and after is not None:
                seconds["joules"] = after - before
            return seconds | ({} if used is None else {"memory": used})

        running = []
        for entrant in entrants:
            on_progress(f"batch {batch_size}: warming up {entrant.name}")
            # What the one before it no longer needs is not counted as memory in use.
            clear_device_cache()
            try:
                timed(entrant)
                running.append(entrant)
            except Exception as error:
                # Out of memory, or a batch beyond an engine's profile: each library raises a type of its own.
                speed.left_out[f"{entrant.name}, batch {batch_size}"] = one_line(error)
        times: list[list[dict[str, float]]] = [[] for _ in running]
        for number, index in in_turn(len(running), runs):
            on_progress(f"batch {batch_size}: round {number + 1} of {runs}, {running[index].name}")
            times[index].append(timed(running[index]))
        measured = dict(zip([entrant.name for entrant in running], times, strict=True))
        for entrant in running:
            speed.rows.append(_row(entrant, measured[entrant.name], flops, batch_size, steps))
        speed.ratios.extend(_ratios(measured, flops, batch_size, steps))
        # The best of several moments: neighbours and clocks hold a single one down.
        for name, peak in gemm_peaks(device, dtypes).items():
            speed.peaks[name] = max(peak, speed.peaks[name])
    shares = [row.tflops / speed.peaks[row.precision] if row.precision in speed.peaks else None for row in speed.rows]
    speed.rows[:] = [replace(row, peak_share=share) for row, share in zip(speed.rows, shares, strict=True)]
    return speed


def _row(entrant: Entrant, times: list[dict[str, float]], flops: Flops, batch_size: int, steps: int) -> SpeedRow:
    device = entrant.runner.device

    def values(key: str) -> list[float]:
        return [run[key] for run in times if key in run]

    def spread(key: str) -> Spread | None:
        return Spread.of(found) if (found := values(key)) else None

    total = median_of([run["total"] for run in times])
    step = Spread.of([run["unet"] / steps for run in times])
    joules, memory = values("joules"), values("memory")
    return SpeedRow(
        way=entrant.way,
        runner=entrant.label,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=str(entrant.runner.precision).removeprefix("torch."),
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
        tflops=WAYS[entrant.way] * batch_size * flops.unet / step.median / 1e12,
        # Known once the peak is, at the end of the run.
        peak_share=None,
        joules_per_image=sum(joules) / len(joules) / batch_size if joules else None,
        memory_in_use=int(max(memory)) if memory else None,
    )


BASELINES = ("stock diffusers", "compiled")
"""Labels of the strongest that a user has without a student, compared with the student on its best runner."""


def _ratios(measured: dict[str, list[dict[str, float]]], flops: Flops, batch_size: int, steps: int) -> list[SpeedRatio]:
    """Teacher over student and floor over student on each runner; torch's teacher over the other runners' students.

    And the baselines over the student that is fastest at this batch size.
    """
    ceilings = {"images": flops.ceiling(steps=steps, batch_size=batch_size), "unet": 2.0}
    students = [name for name in measured if name.endswith(" student")]
    best = min(students, key=lambda name: median_of([run["total"] for run in measured[name]]).value, default=None)
    ratios = []
    for faster in students:
        runner = faster.removesuffix(" student")
        pairs = {f"{runner} teacher": True, f"{runner} unguided": False}
        # The first mention of a pair counts: a baseline on the student's own runner is bounded.
        others = (*(("torch",) if runner != "torch" else ()), *(BASELINES if faster == best else ()))
        for other in others:
            pairs.setdefault(f"{other} teacher", False)
        for slower, bounded in pairs.items():
            if slower not in measured:
                continue
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
