"""Where a batch's time goes, and how much memory a training update takes; both on random weights."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as profiled

from ...distill.monitoring import peak_memory
from ...distill.objective import distillation_loss
from ...engine.errors import InputError
from ...engine.files import write_json
from ...engine.generate import IN_TORCH, LACKING
from ...engine.guidance import combine
from ...engine.guidance_input import make_adapter
from ...engine.model import Model, ModelFiles, resolve_device
from ...engine.runners import Runner
from ...engine.sampling import initial_noise
from ...engine.schedulers import make_scheduler
from ...engine.terminal import print_json
from ..config import parse_batch_sizes
from ..speed.device import copy_peak, gemm_peak, hardware
from ..speed.flops import count_flops
from ..speed.random_weights import locate_configs, random_model
from ..speed.throughput import PARTS, TimedVariant
from ..stats import median_of
from .study_options import Configuration, Device, GradientCheckpointing, Sampler, Steps

KINDS = {
    "attention": r"flash|fmha|attention|attn|softmax",
    "convolution": r"conv|fprop|wgrad|dgrad|winograd|nchwtonhwc|nhwctonchw",
    "matrix product": r"gemm|gemv|cutlass|nvjet|cublas|addmm|bmm|aten::mm|matmul|linear|splitk|triton_tem",
    "normalisation": r"norm|moments|welford",
    "copy": r"copy|memcpy|memset|aten::cat|catarray|transpose|contiguous|aten::_to_copy|fill",
    "pointwise": r"elementwise|pointwise|vectorized|triton_poi|triton_red|triton_per|aten::(add|sub|mul|div|silu|gelu)",
}
"""By kind, what the names of its kernels contain, of CUDA's libraries and Triton, or of a CPU's operators; the first
that fits counts, as a convolution's kernel may have "gemm" in its name, too."""

OTHER = "other"


def kind_of(kernel: str) -> str:
    """A key of `KINDS`, or "other", by a kernel's name."""
    name = kernel.lower()
    if re.match(r"triton_(poi|red|per)_", name):
        # Named after all that is fused into them, products' and convolutions' epilogues among it.
        return next((kind for kind in ("attention", "normalisation") if re.search(KINDS[kind], name)), "pointwise")
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans (begin, end) lasted."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """One batch on one runner; times in seconds.

    Attributes:
        runner: its name.
        batch_size: images made together.
        total: prompts to pixels, the median without the profiler.
        parts: the text encoder's, the UNet's and the VAE's, likewise.
        busy: how long the device had work; on a CPU, how long operators ran; 0 where the profiler saw nothing.
        kinds: the kernels' time by kind.
        longest: the kernels that took longest: name, time and how often each ran.
        peak_share: the UNet's operations a second over the peak of matrix multiplication.
    """

    runner: str
    batch_size: int
    total: float
    parts: dict[str, float]
    busy: float
    kinds: dict[str, float]
    longest: list[tuple[str, float, int]]
    peak_share: float


def kernels_of(events: Iterable[Any], device: torch.device) -> tuple[float, dict[str, tuple[float, int]]]:
    """How long the device was busy, and each kernel's time and count, by name; in seconds.

    Args:
        events: of `torch.profiler.profile`, in microseconds.
        device: whose kernels; a CPU's are its operators, each without those that it calls.
    """
    kernels: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    spans = []
    for event in events:
        on_gpu = event.device_type == DeviceType.CUDA
        if event.is_user_annotation or on_gpu != (device.type == "cuda"):
            continue
        seconds = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6
        if on_gpu:
            spans.append((event.time_range.start, event.time_range.end))
        before, count = kernels[event.name]
        kernels[event.name] = (before + seconds, count + 1)
    busy = union(spans) / 1e6 if spans else sum(seconds for seconds, _ in kernels.values())
    return busy, dict(kernels)


def break_down(
    runner: Runner, model: Model, *, batch_size: int, sampler: str, steps: int, flops: int, peak: float, runs: int
) -> Breakdown:
    """Time a batch of the student's, then profile one.

    Args:
        runner: executes the UNet.
        model: text encoder, VAE and latents' shape.
        batch_size: images made together.
        sampler: a name in `engine.samplers.SAMPLERS`.
        steps: sampling steps.
        flops: of one UNet pass over one image's latents.
        peak: of matrix multiplication in the runner's precision, in 10¹² operations per second.
        runs: timed batches, after one that is thrown away.
    """
    variant = TimedVariant(mode="student", runner=runner)
    batch = partial(
        variant.time,
        model,
        prompts=["a photograph of an astronaut"] * batch_size,
        noise=initial_noise(model.latent_shape, count=batch_size, seed=0),
        guidance=1.0,
        steps=steps,
    )

    def once() -> dict[str, float]:
        return batch(scheduler=make_scheduler(sampler, model.pipeline.scheduler.config))

    once()
    times = [once() for _ in range(runs)]
    activity = ProfilerActivity.CUDA if model.device.type == "cuda" else ProfilerActivity.CPU
    # The first batch under a profiler, which starts up in it, is thrown away.
    with profiled(activities=[activity], schedule=schedule(wait=0, warmup=1, active=1)) as profiler:
        once()
        profiler.step()
        once()
    busy, kernels = kernels_of(profiler.events() or (), model.device)
    kinds: dict[str, float] = dict.fromkeys((*KINDS, OTHER), 0.0)
    for name, (seconds, _) in kernels.items():
        kinds[kind_of(name)] += seconds
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:20]
    parts = {part: median_of([run[part] for run in times]).value for part in PARTS}
    return Breakdown(
        runner=runner.name,
        batch_size=batch_size,
        total=median_of([run["total"] for run in times]).value,
        parts=parts,
        busy=busy,
        kinds=kinds,
        longest=[(name, *figures) for name, figures in longest],
        peak_share=batch_size * steps * flops / parts["unet"] / 1e12 / peak,
    )


def table(found: Iterable[Breakdown]) -> str:
    """Markdown: shares of the whole batch's time."""
    headings = ["runner", "batch", "ms", "of GEMM peak", *PARTS, *KINDS, OTHER, "device waits"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in found:
        # A profiler that saw nothing does not make a device that waits.
        waits = max(0.0, row.total - row.busy) if row.busy else float("nan")
        shares = [*row.parts.values(), *row.kinds.values(), waits]
        cells = [row.runner, str(row.batch_size), f"{row.total * 1e3:.1f}", f"{row.peak_share:.0%}"]
        lines.append(f"| {' | '.join([*cells, *(f'{share / row.total:.0%}' for share in shares)])} |")
    return "\n".join(lines)


def profile(
    model: Configuration = "sd21-base",
    batch_sizes: Annotated[str, typer.Option(help="Images made together.")] = "1,8",
    runners: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(IN_TORCH),
    sampler: Sampler = "dpm++",
    steps: Steps = 20,
    runs: Annotated[int, typer.Option(min=1, help="Timed batches of each.")] = 5,
    device: Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything there.")] = None,
) -> None:
    """Where a batch's time goes: kernels by kind, text encoder, UNet and VAE, and the time that the device waits.

    A model of random weights, in torch: eager, captured (on CUDA) and compiled, the student's single pass. Each batch
    is timed without the profiler, then run once under it: kernels take as long either way, but launching them does not.
    """
    if unknown := set(runners.split(",")) - set(IN_TORCH):
        raise InputError(f"unknown runner {unknown.pop()!r}: choose from {', '.join(IN_TORCH)}")
    target = resolve_device(device)
    loaded = random_model(locate_configs(model), device=target)
    bandwidth, flops = copy_peak(target), count_flops(loaded).unet
    print(f"{hardware(target)}\ncopying: {bandwidth:.2f} TB/s, read and written", flush=True)
    found: list[Breakdown] = []
    peaks: dict[str, float] = {}
    for name in runners.split(","):
        if name in LACKING and (reason := LACKING[name](target)):
            print(f"{name}: left out, {reason}", flush=True)
            continue
        # A copy, as all but eager torch change the order of the weights.
        runner = IN_TORCH[name](loaded.unet if name == "torch" else copy.deepcopy(loaded.unet))
        precision = str(runner.precision).removeprefix("torch.")
        peaks[precision] = max(peaks.get(precision, 0.0), gemm_peak(target, runner.precision))
        for size in parse_batch_sizes(batch_sizes) or ():
            row = break_down(
                runner,
                loaded,
                batch_size=size,
                sampler=sampler,
                steps=steps,
                flops=flops,
                peak=peaks[precision],
                runs=runs,
            )
            found.append(row)
            print(f"\n{name}, batch {size}, the longest:", *_described(row), sep="\n", flush=True)
    print(f"\nGEMM peak, TFLOP/s: {peaks}\n\n{table(found)}")
    if json_file:
        write_json(
            json_file,
            {
                "model": model,
                "sampler": sampler,
                "steps": steps,
                "hardware": hardware(target),
                "gemm_tflops": peaks,
                "copy_terabytes_per_second": bandwidth,
                "rows": [asdict(row) for row in found],
            },
        )


def _described(row: Breakdown) -> list[str]:
    return [f"  {seconds * 1e3:8.2f} ms  {count:5d} x  {name[:100]}" for name, seconds, count in row.longest[:8]]


MODES = ("fine-tune", "distil")


def one_update(mode: str, configs: ModelFiles, batch_size: int, checkpointing: bool) -> dict[str, float]:
    """Make the UNet, do one update, and report memory in bytes before and at its peak."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    unet = configs.empty_unet().to(torch.bfloat16).to_empty(device=device)
    assert isinstance(unet, UNet2DConditionModel)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
    unet.requires_grad_(False)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    adapter = make_adapter("lora", unet, rank=8)
    optimizer = torch.optim.AdamW(adapter.parameters().values(), lr=1e-4)
    size, channels = unet.config.sample_size, unet.config.in_channels
    z_t = torch.randn(batch_size, channels, size, size, device=device, dtype=torch.bfloat16)
    text = torch.randn(2 * batch_size, 77, unet.config.cross_attention_dim, device=device, dtype=torch.bfloat16)
    t = torch.full((batch_size,), 500, device=device)
    alpha = sigma = torch.full((batch_size, 1, 1, 1), 0.5**0.5, device=device)
    before, began = peak_memory(device), time.monotonic()
    with torch.autocast(device.type, torch.bfloat16):
        target = torch.randn(z_t.shape, device=device)
        if mode == "distil":
            with torch.no_grad(), adapter.disabled():
                both = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), text, return_dict=False)[0]
                unconditional, conditional = both.float().chunk(2)
                target = combine(unconditional, conditional, 3.0)
        prediction = unet(z_t, t, text[batch_size:], return_dict=False)[0]
        distillation_loss(prediction.float(), target, alpha, sigma, "constant").mean().backward()
    optimizer.step()
    return {"before": before, "peak": peak_memory(device), "seconds": time.monotonic() - began}


def training_memory(
    model: Configuration = "sd21-base",
    batch_size: Annotated[int, typer.Option(min=1, help="States of the update.")] = 1,
    gradient_checkpointing: GradientCheckpointing = False,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Peak memory of one distillation update against the same update as a plain fine-tune.

    Both train the same LoRA on a randomly initialised UNet in bf16, each in a process of its own; what differs is the
    teacher's pass. Peak is the process's resident set on a CPU, allocated memory on a GPU.
    """
    if only is not None:
        print_json(one_update(only, locate_configs(model), batch_size, gradient_checkpointing))
        return
    peaks = {}
    for mode in MODES:
        command = [sys.executable, "-m", "boostdiff.benchmarks.studies", "training-memory", model, "--only", mode]
        command += ["--batch-size", str(batch_size)] + ["--gradient-checkpointing"] * gradient_checkpointing
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
        result = json.loads(done.stdout)
        peaks[mode] = result["peak"]
        print(
            f"{mode:9}: {result['peak'] / 2**30:.2f} GiB at its peak, {result['before'] / 2**30:.2f} before, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )
    print(f"ratio {peaks['distil'] / peaks['fine-tune']:.3f} (batch {batch_size})")
