"""A device: what it is, how it is timed, its best rate of matrix multiplication, and what it draws (NVML)."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GEMM_SIZES = {"cpu": 1024, "cuda": 8192}
"""Side of the square matrices: large enough that arithmetic, not memory, is the limit."""

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Far more than any cache holds."""

PEAK_RUNS = 7


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    described: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large square matrix multiplication, in 10¹² operations per second.

    Measured in the same run as what it is compared with: a data sheet's peak says nothing about clocks and neighbors.

    Args:
        device: where.
        dtype: of both factors and the product.
    """
    size = GEMM_SIZES.get(device.type, 4096)
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product = a @ b
    return 2 * size**3 / _best_time(lambda: torch.mm(a, b, out=product), device) / 1e12


def copy_peak(device: torch.device) -> float:
    """The best rate of copying within the device's memory, in 10¹² bytes per second, read and written.

    Args:
        device: where.
    """
    source = torch.zeros(COPY_BYTES.get(device.type, 2**28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / _best_time(lambda: target.copy_(source), device) / 1e12


def _best_time(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(PEAK_RUNS):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def gemm_peaks(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """`gemm_peak` by the dtype's name: float32 and bfloat16 on a CPU, else of those that the rows use."""
    wanted = {torch.float32, torch.bfloat16, *dtypes} if device.type == "cpu" else set(dtypes)
    return {
        str(dtype).removeprefix("torch."): gemm_peak(device, dtype)
        for dtype in sorted(wanted, key=str)
        # Half precision on a CPU is emulated: slow, and no peak.
        if not (device.type == "cpu" and dtype == torch.float16)
    }


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
        """The part's time so far; on CUDA only after synchronising."""
        return sum(span() for span in self._spans[name])


class Meter:
    """Energy and memory of an NVIDIA GPU as NVML counts them; knows nothing where there is none."""

    def __init__(self, device: torch.device) -> None:
        """Open NVML (nvidia-ml-py) for a CUDA device; without the package or its counters, every reading is None."""
        self._nvml: Any = None
        self._handle: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except Exception:
            # A missing package, driver or permission: each raises a type of its own, and none is an error here.
            self._nvml = None

    def joules(self) -> float | None:
        """Energy that the GPU has drawn since its driver was loaded, in joules; the whole board's."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def memory_in_use(self) -> int | None:
        """Bytes of the GPU's memory in use, by all processes."""
        memory = self._read("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def _read(self, name: str) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle)
        except self._nvml.NVMLError:
            # Counters that this GPU does not have, such as energy before Volta.
            return None
