"""A device: what it is, how it is timed, its best rate of matrix multiplication, and its memory in use."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from ...engine.compiled import has_bfloat16
from ...engine.errors import BoostDiffError, one_line

GEMM_SIZES = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices: large enough that arithmetic, not memory, is the limit."""

PEAK_RUNS = 7

Result = TypeVar("Result")


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, GPU and threads, for a report."""
    described: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return described


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large square matrix multiplication, in 10¹² operations per second.

    Measured in the same run as what it is compared with: a data sheet's peak says nothing about clocks and neighbors.
    """
    size = GEMM_SIZES.get(device.type, 4096)
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product, seconds = a @ b, []
    for _ in range(PEAK_RUNS):
        # torch's own timers wait for the current device alone.
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b, out=product)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12


def gemm_peaks(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """`gemm_peak` by the dtype's name: of those that the rows use, and bfloat16 on a CPU that has it."""
    # torch's products take no 8-bit numbers.
    wanted = {dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1}
    if device.type == "cpu":
        # What a CPU has no instructions for is emulated: it takes many seconds, and is no peak.
        wanted = {torch.float32, *([torch.bfloat16] if has_bfloat16(device) else [])}
    return {str(dtype).removeprefix("torch."): gemm_peak(device, dtype) for dtype in sorted(wanted, key=str)}


class Stopwatch:
    """Times the parts of a run without stopping it: events on CUDA, where work is only queued; else the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[Callable[[], float]]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what runs inside to a part's time."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self._spans[name].append(lambda: begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            yield
            seconds = time.perf_counter() - began
            self._spans[name].append(lambda: seconds)

    def seconds(self, name: str) -> float:
        """The part's time so far; on CUDA only after synchronizing."""
        return sum(span() for span in self._spans[name])


def memory_in_use(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that are taken, by all that is loaded; None on other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def in_turns(
    calls: Sequence[tuple[str, Callable[[], Result]]],
    rounds: int,
    *,
    device: torch.device,
    left_out: dict[str, str],
    report: Callable[[str], None],
    needed: int = 0,
) -> list[tuple[list[Result], int | None]]:
    """Call all in alternating order, 0 1 2, 2 1 0, 0 1 2, …, so that drift falls on all alike.

    Args:
        calls: what makes a batch and gives its times, with its name.
        rounds: batches of each, after one that is discarded, on a GPU three.
        left_out: takes the reason, by name, for what fails.
        needed: so many of the first must not fail.

    Returns:
        What each gave, round by round, nothing if it failed; and `memory_in_use` after its second discarded batch.

    Raises:
        BoostDiffError: one that must not fail did.
    """
    found: list[list[Result]] = [[] for _ in calls]
    memory, failed = [], set[int]()

    def attempt(index: int, stage: str) -> None:
        name, call = calls[index]
        if index in failed:
            return
        report(f"{stage} {name}")
        try:
            found[index].append(call())
        except Exception as error:
            # Out of memory, or a batch beyond an engine's profile: each library raises a type of its own.
            if index < needed:
                raise BoostDiffError(f"{name} can't be timed: {one_line(error)}") from error
            left_out[name] = one_line(error)
            failed.add(index)
            found[index].clear()

    for index in range(len(calls)):
        # On a GPU twice: the first batch compiles and records graphs, which takes memory that it gives back.
        for _ in range(1 if memory_in_use(device) is None else 2):
            # Torch keeps what batches took. It is not let go while rows are timed, as that would slow them down.
            clear_device_cache()
            attempt(index, "warming up")
        memory.append(memory_in_use(device))
    if memory_in_use(device) is not None:
        # Torch takes back the memory that it let go of for later rows: that must not count as the first round's.
        for index in range(len(calls)):
            attempt(index, "warming up")
    for times in found:
        times.clear()
    for number in range(rounds):
        for index in range(len(calls))[:: (-1) ** number]:
            attempt(index, f"round {number + 1} of {rounds},")
    return list(zip(found, memory, strict=True))
