"""One pass of a denoiser by memory layout, launched from Python and replayed as a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...engine.captured import CapturedRunner
from ...engine.errors import InputError
from ...engine.files import check_output, write_whole
from ...engine.model import resolve_device
from ...engine.options import DeviceOption
from ...engine.runners import Runner, TorchRunner
from ..config import comma_separated
from ..report.tables import Table
from ..speed.device import Stopwatch, gemm_peak, hardware, synchronize
from ..speed.flops import count_flops
from ..speed.random_weights import locate_configs, random_model
from .held_out import Configuration, Runs

rows_of = comma_separated("--rows", int, "1,2,8", least=1)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def seconds_per_pass(runner: Runner, inputs: dict[str, torch.Tensor], runs: int) -> float:
    """The median time of a pass, after two that are discarded."""
    times = []
    for number in range(runs + 2):
        watch = Stopwatch(runner.device)
        synchronize(runner.device)
        with watch.part("pass"):
            runner.predict(inputs)
        synchronize(runner.device)
        times += [watch.seconds("pass")] if number >= 2 else []
    return statistics.median(times)


def table(rows: Iterable[tuple[str, str, int, float]], *, flops: float, peak: float) -> str:
    """Markdown of layout, runner, rows and seconds; with operations per row and the peak, in 10¹² per second."""
    cells = [
        [layout, runner, f"{batch}", f"{1e3 * seconds:.2f}", f"{batch * flops / seconds / 1e12 / peak:.0%}"]
        for layout, runner, batch, seconds in rows
    ]
    return Table(headings=["layout", "runner", "rows", "ms per pass", "of the GEMM peak"], cells=cells).markdown()


def check_file(path: Path) -> None:
    """Refuse, by an InputError, a file that can't be written."""
    if path.is_dir():
        raise InputError(f"the output {path} is a folder: pass the name of a file as --output")
    check_output(path.parent)


@torch.no_grad()
def layouts(
    model: Configuration = "sd21-base",
    rows: Annotated[str, typer.Option(help="Rows per pass: two per image with guidance.")] = "1,2,8,16",
    runs: Runs = 7,
    output: Annotated[Path | None, typer.Option(help="File to write the table to, too.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Time of one pass of a denoiser of random weights, by memory layout and number of rows.

    Eager torch, whose kernels Python launches one by one, and on a GPU the same kernels replayed as a CUDA graph: the
    difference is the time that a GPU waits for Python.
    """
    target, batches = resolve_device(device), rows_of(rows)
    if output:
        check_file(output)
    loaded = random_model(locate_configs(model), device=target)
    denoiser, measured = loaded.denoiser, []
    print(hardware(target), flush=True)
    for layout, order in LAYOUTS.items():
        denoiser.to(memory_format=order)
        runners = [TorchRunner(denoiser)]
        captured = target.type == "cuda" and loaded.family.capturable
        runners += [CapturedRunner(denoiser, layout=order)] if captured else []
        for runner in runners:
            with runner:
                for batch in batches:
                    inputs = loaded.family.example_inputs(loaded.pipeline, batch=batch)
                    measured.append((layout, runner.name, batch, seconds_per_pass(runner, inputs, runs)))
                    print(*measured[-1], flush=True)
    peak = gemm_peak(target, loaded.denoiser.dtype)
    text = table(measured, flops=count_flops(loaded).denoiser, peak=peak)
    print(f"\n{text}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, f"{text}\n".encode())
