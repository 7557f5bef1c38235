"""What a training run watches: requests to stop, its losses, throughput, memory."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass
class StopRequest:
    """The name of the signal, SIGINT or SIGTERM, that asked the run to stop after this update; None before one did."""

    name: str | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; another one acts as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; a run elsewhere is stopped by its owner.
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LossWatch:
    """All losses of a run: whether they diverge, and how much of the guidance term the student explains.

    Attributes:
        losses: equation (4), one per update.
        baseline: the same for a student that has learned nothing: the teacher's conditional pass, or in a stage of few
            steps the student of the stage before.
    """

    WINDOW = 10
    FACTOR = 10.0

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.baseline: list[float] = []

    def add(self, loss: float, baseline: float) -> None:
        """Take in one more update."""
        self.losses.append(loss)
        self.baseline.append(baseline)

    def diverges(self) -> bool:
        """Whether the loss has left the range that it began in.

        The loss of an update depends much on the noise levels drawn, so windows are compared: the newest `WINDOW`
        losses with `FACTOR` times the first, and with more where the baselines of the newest samples are larger.
        """
        if len(self.losses) < 2 * self.WINDOW:
            return False
        first, newest = slice(self.WINDOW), slice(-self.WINDOW, None)
        before, now = sum(self.baseline[first]), sum(self.baseline[newest])
        harder = max(1.0, now / before) if before > 0 else 1.0
        return sum(self.losses[newest]) > self.FACTOR * harder * sum(self.losses[first])

    def _newest(self, values: list[float]) -> float:
        """The mean over the newest tenth of the updates: one alone says little."""
        count = max(1, len(values) // 10)
        return sum(values[-count:]) / count

    def mean_loss(self) -> float:
        """Over the newest tenth of the updates."""
        return self._newest(self.losses)

    def guidance_r2(self) -> float | None:
        """R² of the guidance term, over the newest tenth of the updates: 1 − loss / baseline.

        It is 0 for a student that has learned nothing, 1 for the guided teacher itself, and below 0 for one that is
        further from it than the baseline. None where guidance changes nothing.
        """
        baseline = self._newest(self.baseline)
        return 1 - self._newest(self.losses) / baseline if baseline > 0 else None


class Throughput:
    """How fast a run goes. The first update counts only while it is the only one: kernels are chosen or compiled in it.

    Attributes:
        images_per_second: so far; None before the first update.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.images_per_second: float | None = None
        self._since, self._updates = time.monotonic(), 0

    def after_update(self) -> float:
        """`images_per_second`, with one more update of `batch_size` images."""
        now = time.monotonic()
        self.images_per_second = self.batch_size * max(self._updates, 1) / (now - self._since)
        if self._updates == 0:
            self._since = now
        self._updates += 1
        return self.images_per_second


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: what was allocated on a GPU, else the process's resident set; 0 where none is counted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
