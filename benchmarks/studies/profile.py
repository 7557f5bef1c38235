"""Where a batch's time goes, and how much memory a training update takes; both on random weights."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any

import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as profiled

from ...distill.monitoring import peak_memory
from ...distill.objective import distillation_loss
from ...engine.captured import CapturedRunner
from ...engine.compiled import CompiledRunner, missing_compiler
from ...engine.errors import InputError
from ...engine.guidance import combine
from ...engine.guidance_input import make_adapter
from ...engine.model import ModelFiles, resolve_device
from ...engine.options import DeviceOption, SamplerOption
from ...engine.runners import TorchRunner
from ...engine.schedulers import check_steps
from ...engine.stable_diffusion import StableDiffusion
from ..config import parse_batch_sizes
from ..report.tables import Table
from ..speed.device import hardware
from ..speed.random_weights import locate_configs, random_model
from ..speed.throughput import TimedVariant, Workload
from .held_out import Configuration, Runs, Steps

OPERATIONS = {
    "attention": r"flash|fmha|attention|attn|softmax",
    "convolution": r"conv|fprop|wgrad|dgrad|winograd|nchwtonhwc|nhwctonchw",
    "matrix product": r"gemm|gemv|cutlass|nvjet|cublas|addmm|bmm|aten::mm|matmul|linear|splitk|triton_tem",
    "normalization": r"norm|moments|welford",
    "copy": r"copy|memcpy|memset|aten::cat|catarray|transpose|contiguous|aten::_to_copy|fill",
    "pointwise": r"elementwise|pointwise|vectorized|triton_poi|triton_red|triton_per|aten::(add|sub|mul|div|silu|gelu)",
    "other": "",
}
"""What the names of kernels contain, of CUDA's libraries and Triton, or of a CPU's operators; the first that fits
counts, as a convolution's kernel may have "gemm" in its name, too."""


def operation_of(kernel: str) -> str:
    """A key of `OPERATIONS`, by a kernel's name."""
    name = kernel.lower()
    if re.match(r"triton_(poi|red|per)_", name):
        # Named after all that is fused into them, products' and convolutions' epilogues among it.
        fused = ("attention", "normalization")
        return next((each for each in fused if re.search(OPERATIONS[each], name)), "pointwise")
    return next(each for each, pattern in OPERATIONS.items() if re.search(pattern, name))


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """One batch on one runner; times in seconds.

    Attributes:
        runner: its name.
        batch_size: images per batch.
        total: prompts to pixels, the median without the profiler.
        operations: time of the kernels, on a CPU of the operators, by key of `OPERATIONS`.
        longest: the kernels that took longest: name, time and number of calls.
    """

    runner: str
    batch_size: int
    total: float
    operations: dict[str, float]
    longest: list[tuple[str, float, int]]


def kernels_of(events: Iterable[Any], device: torch.device) -> list[tuple[str, float, int]]:
    """Name, time in seconds and number of calls of each kernel in a profiler's `key_averages()`, the longest first.

    A CPU's kernels are its operators, each without those that it calls.
    """
    on_gpu = device.type == "cuda"
    kernels = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6, event.count)
        for event in events
        if not event.is_user_annotation and (event.device_type == DeviceType.CUDA) == on_gpu
    ]
    return sorted(kernels, key=lambda kernel: -kernel[1])


def break_down(runner: TorchRunner, work: Workload, runs: int) -> Breakdown:
    """Time a batch of the student's, the median of `runs` after one that is discarded, then profile one."""
    variant = TimedVariant(mode="student", runner=runner)
    variant.time(work)
    times = [variant.time(work)["total"] for _ in range(runs)]
    activity = ProfilerActivity.CUDA if runner.device.type == "cuda" else ProfilerActivity.CPU
    # The first batch under a profiler, which starts up in it, is discarded.
    with profiled(activities=[activity], schedule=schedule(wait=0, warmup=1, active=1)) as profiler:
        variant.time(work)
        profiler.step()
        variant.time(work)
    kernels = kernels_of(profiler.key_averages(), runner.device)
    operations = dict.fromkeys(OPERATIONS, 0.0)
    for name, seconds, _ in kernels:
        operations[operation_of(name)] += seconds
    return Breakdown(
        runner=runner.name,
        batch_size=len(work.prompts),
        total=statistics.median(times),
        operations=operations,
        longest=kernels[:20],
    )


def table(rows: Iterable[Breakdown]) -> str:
    """Markdown: shares of the whole batch's time."""
    lines = []
    for row in rows:
        busy = sum(row.operations.values())
        # A profiler that saw nothing does not make a device that waits.
        waits = max(0.0, row.total - busy) if busy else float("nan")
        shares = (f"{share / row.total:.0%}" for share in (*row.operations.values(), waits))
        lines.append([row.runner, str(row.batch_size), f"{row.total * 1e3:.1f}", *shares])
    return Table(headings=["runner", "batch", "ms", *OPERATIONS, "device waits"], cells=lines).markdown()


def profile(
    model: Configuration = "sd21-base",
    batch_sizes: Annotated[str, typer.Option(help="Images per batch.")] = "1,8",
    compile: Annotated[bool, typer.Option("--compile", help="Also profile torch.compile.")] = False,
    sampler: SamplerOption = "dpm++",
    steps: Steps = 20,
    runs: Runs = 5,
    device: DeviceOption = "auto",
) -> None:
    """Where a batch's time goes: kernels by operation, and the time that the device waits.

    A model of random weights, in eager torch, captured on a GPU, and compiled, the student's single pass. Each batch is
    timed without the profiler, then run once under it: kernels take as long either way, but launching them does not.
    For text encoder, UNet step and VAE see `boostdiff bench --random-weights`.
    """
    target = resolve_device(device)
    if compile and (reason := missing_compiler(target)):
        raise InputError(reason)
    sizes, configs = parse_batch_sizes(batch_sizes), locate_configs(model)
    check_steps(configs.scheduler_config, [sampler], [steps])
    loaded, rows = random_model(configs, device=target), []
    print(hardware(target), flush=True)
    captured = target.type == "cuda" and loaded.family.capturable
    others = [*([CapturedRunner] if captured else []), *([CompiledRunner] if compile else [])]
    # Copies, as these change the order of the weights.
    for runner in [TorchRunner(loaded.denoiser), *(other(copy.deepcopy(loaded.denoiser)) for other in others)]:
        for size in sizes:
            work = Workload(
                model=loaded,
                prompts=["a photograph of an astronaut"] * size,
                guidance=1.0,
                make_scheduler=partial(loaded.make_scheduler, sampler),
                steps=steps,
            )
            rows.append(break_down(runner, work, runs))
            print(f"\n{runner.name}, batch {size}, the longest:")
            for kernel, seconds, count in rows[-1].longest[:8]:
                print(f"  {seconds * 1e3:8.2f} ms  {count:5d} x  {kernel[:100]}", flush=True)
    print(f"\n{table(rows)}")


UPDATES = ("fine-tune", "distill")


def one_update(update: str, configs: ModelFiles, batch_size: int, checkpointing: bool) -> dict[str, float]:
    """Make the UNet, do one update, and give memory in bytes before and at its peak."""
    device = resolve_device("auto")
    torch.manual_seed(0)
    unet = configs.empty_denoiser().to(torch.bfloat16).to_empty(device=device)
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
        if update == "distill":
            with torch.no_grad(), adapter.disabled():
                both = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), text, return_dict=False)[0]
                unconditional, conditional = both.float().chunk(2)
                target = combine(unconditional, conditional, 3.0)
        prediction = unet(z_t, t, text[batch_size:], return_dict=False)[0]
        distillation_loss(prediction.float(), target, alpha, sigma, "constant").mean().backward()
    optimizer.step()
    return {"before": before, "peak": peak_memory(device), "seconds": time.monotonic() - began}


def training_memory(
    model: Annotated[
        str, typer.Argument(help="sd15, sd21-base, or a folder with the configuration of such a UNet's pipeline.")
    ] = "sd21-base",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per update.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations.")
    ] = False,
) -> None:
    """Peak memory of one distillation update against the same update as a plain fine-tune.

    Both train the same LoRA on a randomly initialized UNet in bf16, each in a process of its own; what differs is the
    teacher's pass. Peak is the process's resident set on a CPU, allocated memory on a GPU.
    """
    configs, peaks = locate_configs(model), {}
    if configs.family.name != StableDiffusion.name:
        raise InputError(f"training-memory is for Stable Diffusion 1.x and 2.x, and {model} is {configs.family.name}")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for update in UPDATES:
            result = processes.submit(one_update, update, configs, batch_size, gradient_checkpointing).result()
            peaks[update] = result["peak"]
            memory = " GiB, ".join(f"{when} {result[when] / 2**30:.2f}" for when in ("before", "peak"))
            print(f"{update:9}: {memory} GiB, {result['seconds']:.0f} s", flush=True)
    print(f"ratio {peaks['distill'] / peaks['fine-tune']:.3f} (batch {batch_size})")
