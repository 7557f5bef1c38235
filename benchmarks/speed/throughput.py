"""Speed: every mode on every runner, interleaved in one run, after warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from diffusers import SchedulerMixin

from ...engine.conditions import PromptEmbeds, TextEmbeddings, is_live
from ...engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ...engine.guiders import Guider
from ...engine.model import Model
from ...engine.runners import Runner
from ...engine.sampling import decode, initial_noise, sample
from ..stats import Estimate, Percentiles, median_of
from .device import Stopwatch, gemm_peaks, in_turns, synchronize
from .flops import Flops, count_flops

MODES = {"teacher": 2, "student": 1, "unguided": 1}
"""Modes and their UNet passes per step: batched CFG, the student, and the unguided teacher: the no-CFG speed bound."""

PARTS = ("denoiser", "text_encoder", "vae_decode")


@dataclass(frozen=True)
class RunnerMode:
    """What is timed: a runner by its name, and one of `MODES`."""

    runner: str
    mode: str


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One batch of images, the same for all variants.

    Attributes:
        model: text encoder, VAE and latent shape.
        prompts: B prompts.
        guidance: guidance scale of the teacher.
        make_scheduler: gives a fresh scheduler.
        guider: guider of the teacher.
    """

    model: Model
    prompts: Sequence[str]
    guidance: float
    make_scheduler: Callable[[], SchedulerMixin]
    steps: int
    guider: Guider = field(default_factory=Guider)

    @cached_property
    def teacher_passes(self) -> float:
        """The teacher's UNet passes per step, the mean where its guider has none at some steps."""
        scheduler = self.make_scheduler()
        scheduler.set_timesteps(self.steps)
        return self.guider.passes(scheduler.timesteps.tolist()) / self.steps

    @cached_property
    def noise(self) -> torch.Tensor:
        """Initial noise `(B, C, H, W)`, on the CPU."""
        return initial_noise(self.model.latent_shape, count=len(self.prompts), seed=0)


@dataclass(frozen=True, kw_only=True)
class TimedVariant:
    """A mode on a runner.

    Attributes:
        mode: key of `MODES`.
        runner: executes the UNet.
        model: with the text encoder and VAE of the runner; None takes the workload's.
        batch_sizes: the only batch sizes to time; None for all.
    """

    mode: str
    runner: Runner
    model: Model | None = None
    batch_sizes: Sequence[int] | None = None

    @property
    def live(self) -> bool:
        """Whether its denoiser attends to two texts."""
        return is_live(self.runner.config)

    @property
    def key(self) -> RunnerMode:
        """Key of its row."""
        return RunnerMode(self.runner.name, self.mode)

    @property
    def name(self) -> str:
        """For messages: "onnx student"."""
        return f"{self.key.runner} {self.key.mode}"

    def passes(self, work: Workload) -> float:
        """UNet passes per step."""
        return work.teacher_passes if MODES[self.mode] > 1 else 1

    def time(self, work: Workload) -> dict[str, float]:
        """Make the batch of images: seconds by part, as far as they are known, with "total"."""
        model, runner, guided = self.model or work.model, self.runner, MODES[self.mode] > 1
        device, width = runner.device, runner.config.get("time_cond_proj_dim")
        watch = Stopwatch(device)

        class TimedRunner(Runner):
            family, config, device = runner.family, runner.config, runner.device

            def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
                # The graph of a guidance-conditioned student wants the scale in every row; its value changes no time.
                if width is not None:
                    z_t = inputs["sample"]
                    inputs = inputs | {"timestep_cond": z_t.new_zeros(len(z_t), width)}
                with watch.part("denoiser"):
                    return runner.predict(inputs)

        live = self.live
        denoiser: Denoiser = SinglePassDenoiser(TimedRunner(), live_negative_prompt=live)
        if guided:
            denoiser = GuidedDenoiser(TimedRunner(), work.guidance, work.guider)
        synchronize(device)
        began = time.perf_counter()
        with watch.part("text_encoder"):
            text = model.family.encode(model.pipeline, work.prompts, negative_prompt="" if guided or live else None)
            text = text.to(device, runner.dtype)
        if guided and live:
            # The graph of a student of live negative prompts, of which each row reads two texts.
            assert text.unconditional
            text = TextEmbeddings(conditional=_twice(text.conditional), unconditional=_twice(text.unconditional))
        noise = work.noise.to(device, model.family.latents_dtype(runner.dtype))
        latents = sample(denoiser, text=text, noise=noise, scheduler=work.make_scheduler(), steps=work.steps)
        with watch.part("vae_decode"):
            decode(model, latents.to(model.device))
        synchronize(device)
        seconds = {"total": time.perf_counter() - began} | {name: watch.seconds(name) for name in PARTS}
        return seconds | {"host_gap": seconds["total"] - sum(seconds[name] for name in PARTS)}


def _twice(embeds: PromptEmbeds) -> PromptEmbeds:
    return embeds.replaced(encoder_hidden_states=embeds.encoder_hidden_states.repeat(1, 2, 1))


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """A variant at one batch size; times in seconds. The parts of a stock pipeline are None.

    Attributes:
        precision: precision of the UNet.
        latency: from prompts to pixels on the host, per batch.
        images_per_second: batch size over the median latency.
        denoiser_step: one evaluation of the UNet, the mean over a run's steps: on 2B for the teacher, else on B.
        text_encoder: encoding the prompts, per batch.
        vae_decode: decoding, and the copy to the host, per batch.
        host_gap: latency less all parts: scheduler, guidance arithmetic, Python, idle device.
        tflops: UNet operations per second of `denoiser_step`, in 10¹².
        peak_share: `tflops` over the peak of matrix multiplication in this precision; None where that is unknown.
        memory_in_use: bytes of GPU memory in use after a batch of this row, by all that is loaded, but without what
            torch keeps of other rows' batches; None on a CPU.
    """

    mode: str
    runner: str
    precision: str
    batch_size: int
    latency: Percentiles
    images_per_second: Estimate
    denoiser_step: Percentiles
    text_encoder: Percentiles | None = None
    vae_decode: Percentiles | None = None
    host_gap: Percentiles | None = None
    tflops: float
    peak_share: float | None = None
    memory_in_use: int | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedRatio:
    """How many times as fast one variant is as another, by their times in the same round.

    Attributes:
        part: "images" (prompts to pixels) or "denoiser" (one step).
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
        flops: operations, counted from the model.
        peaks: peak of matrix multiplication in the same run, by precision, in 10¹² operations per second.
        left_out: reason by variant and batch size.
    """

    rows: list[SpeedRow]
    ratios: list[SpeedRatio]
    flops: Flops
    peaks: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def students(self) -> list[SpeedRow]:
        """The student's rows, the one with the most images per second first."""
        return sorted((row for row in self.rows if row.mode == "student"), key=lambda row: -row.images_per_second.value)

    def fastest_teacher(self, batch_size: int) -> SpeedRow | None:
        """The two-pass teacher's row with the most images per second, whatever its runner; None if there is none."""
        teachers = [row for row in self.rows if (row.mode, row.batch_size) == ("teacher", batch_size)]
        return max(teachers, key=lambda row: row.images_per_second.value, default=None)

    def ratio(self, part: str, row: SpeedRow, *, baseline: str | None = None) -> SpeedRatio | None:
        """Guided teacher over a student's row; None where they were not timed together.

        Args:
            part: "images" or "denoiser".
            row: the student's.
            baseline: the teacher's runner, such as "stock diffusers"; None takes the student's.
        """
        pair = RunnerMode(baseline or row.runner, "teacher"), RunnerMode(row.runner, "student")
        wanted = (*pair, part, row.batch_size)
        return next((r for r in self.ratios if (r.slower, r.faster, r.part, r.batch_size) == wanted), None)


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
    guider: Guider | None = None,
    on_progress: Callable[[str], None] = lambda stage: None,
) -> Speed:
    """Measure all variants at all batch sizes.

    Weights don't matter to speed: where a runner has one graph, all of its variants share it. Student and unguided
    teacher are then the same work, timed twice: how much they differ is the noise of the measurement.

    Args:
        variants: the ratios need a teacher and a student on the same runner.
        model: as `guidance`, `make_scheduler`, `steps` and `guider` see `Workload`.
        prompts: at least one; repeated to fill a batch.
        runs: timed batches per variant, after one that is discarded, on a GPU three.
    """
    live = {variant.key for variant in variants if variant.live}
    flops, device = count_flops(model, live=bool(live)), variants[0].runner.device
    speed = Speed(rows=[], ratios=[], flops=flops, peaks={})
    for batch_size in batch_sizes:
        batch = [prompts[i % len(prompts)] for i in range(batch_size)]
        work = Workload(
            model=model,
            prompts=batch,
            guidance=guidance,
            make_scheduler=make_scheduler,
            steps=steps,
            guider=guider or Guider(),
        )
        timed = [each for each in variants if each.batch_sizes is None or batch_size in each.batch_sizes]
        calls = [(f"{variant.name}, batch {batch_size}", partial(variant.time, work)) for variant in timed]
        found = in_turns(calls, runs, device=device, left_out=speed.left_out, report=on_progress)
        rows = [(variant, times, memory) for variant, (times, memory) in zip(timed, found, strict=True) if times]
        speed.rows.extend(_row(variant, times, work, flops, memory) for variant, times, memory in rows)
        speed.ratios.extend(_ratios({variant.key: times for variant, times, _ in rows}, work, flops, live))
        # The best of the moments after each batch size: other processes and clocks hold a single one down.
        for name, peak in gemm_peaks(device, [variant.runner.precision for variant in variants]).items():
            speed.peaks[name] = max(peak, speed.peaks.get(name, 0.0))
    speed.rows[:] = [
        replace(row, peak_share=row.tflops / speed.peaks[row.precision]) if row.precision in speed.peaks else row
        for row in speed.rows
    ]
    return speed


def _row(
    variant: TimedVariant, times: list[dict[str, float]], work: Workload, flops: Flops, memory: int | None
) -> SpeedRow:
    batch_size = len(work.prompts)
    values = {key: [run[key] for run in times] for key in times[0] if all(key in run for run in times)}
    parts: dict[str, Any] = {part: Percentiles.of(values[part]) for part in (*PARTS[1:], "host_gap") if part in values}
    total, step = median_of(values["total"]), Percentiles.of([seconds / work.steps for seconds in values["denoiser"]])
    return SpeedRow(
        mode=variant.mode,
        runner=variant.key.runner,
        precision=str(variant.runner.precision).removeprefix("torch."),
        batch_size=batch_size,
        latency=Percentiles.of(values["total"]),
        images_per_second=Estimate(
            value=batch_size / total.value,
            low=batch_size / total.high,
            high=batch_size / total.low,
            coverage=total.coverage,
        ),
        denoiser_step=step,
        **parts,
        tflops=variant.passes(work) * batch_size * flops.of_pass(live=variant.live) / step.median / 1e12,
        memory_in_use=memory,
    )


BASELINES = ("stock diffusers", "compiled")
"""What a user has without a student, compared with the student on its best runner."""


def _ratios(
    measured: dict[RunnerMode, list[dict[str, float]]], work: Workload, flops: Flops, live: Collection[RunnerMode] = ()
) -> list[SpeedRatio]:
    """Teacher and unguided teacher over the student on each runner; torch's teacher over the other runners' students.

    And the baselines and the fastest teacher over the student that is fastest at this batch size. Those in `live`
    attend to two texts.
    """

    def seconds(key: RunnerMode) -> float:
        return median_of([run["total"] for run in measured[key]]).value

    batch_size = len(work.prompts)
    passes = work.teacher_passes
    students = [key for key in measured if key.mode == "student"]
    # What is compared with the teacher on its own runner is compared with the baselines.
    candidates = [key for key in students if RunnerMode(key.runner, "teacher") in measured] or students
    best = min(candidates, key=seconds, default=None)
    teachers = sorted((key for key in measured if key.mode == "teacher"), key=seconds)
    strongest = [*BASELINES, *(key.runner for key in teachers[:1])]
    ratios = []
    for faster in students:
        same_runner, unguided = (RunnerMode(faster.runner, mode) for mode in ("teacher", "unguided"))
        baselines = [RunnerMode(name, "teacher") for name in ("torch", *(strongest if faster == best else ()))]
        others = dict.fromkeys([same_runner, unguided, *baselines])
        lives = {"live": faster in live, "live_teacher": same_runner in live}
        ceilings = {
            "total": flops.ceiling(steps=work.steps, batch_size=batch_size, passes=passes, **lives),
            "denoiser": passes * flops.of_pass(live=same_runner in live) / flops.of_pass(live=faster in live),
        }
        for slower, part in product((other for other in others if other in measured), ("total", "denoiser")):
            rounds = zip(measured[slower], measured[faster], strict=True)
            ratios.append(
                SpeedRatio(
                    slower=slower,
                    faster=faster,
                    part="images" if part == "total" else part,
                    batch_size=batch_size,
                    estimate=median_of([one[part] / other[part] for one, other in rounds]),
                    ceiling=ceilings[part] if slower == same_runner else None,
                )
            )
    return ratios
