"""Shards drawn over a Ray cluster: one worker per GPU, or per machine; a lost worker's shard is drawn by another."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .errors import BoostDiffError, InputError, one_line
from .generate import Sampling, opened
from .shards import Job, draw_shard
from .terminal import quiet_libraries
from .versions import usable_cpus

CONNECT_TIMEOUT = 10
"""Seconds for a cluster to take a connection."""

ATTEMPTS = 3
"""Workers that are lost over one shard, or one after the other before they are ready, until it is no accident."""


class Worker:
    """A process of the cluster that draws."""

    def open(self, job: Job) -> None:
        """Read the weights."""
        quiet_libraries()
        self._job, self._held = job, ExitStack()
        self._sampling: Sampling = self._held.enter_context(opened(job.files, job.config, job.device))

    def draw(self, shard: int) -> int:
        """See `shards.draw_shard`."""
        return draw_shard(self._sampling, self._job, shard)


def start_ray(address: str, *, cpus: int | None = None) -> None:
    """Connect to a cluster at HOST:PORT or "auto"; "local" starts Ray on this machine alone.

    Started here, Ray counts on `cpus` CPUs, or on all of this process.

    Raises:
        InputError: there is no such cluster.
    """
    # Ray would send its statistics of use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started: dict[str, Any] = {}
    if address == "local":
        started = {"num_cpus": cpus or usable_cpus(), "include_dashboard": False}
    try:
        if found := re.fullmatch(r"(?:ray://)?\[?([^\[\]]+?)\]?:(\d{1,5})", address):
            # Ray itself tries for minutes.
            socket.create_connection((found[1], int(found[2])), timeout=CONNECT_TIMEOUT).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False, **started)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise InputError(f"can't reach a Ray cluster at {address!r}: {one_line(error)}") from None
    logging.getLogger("ray").setLevel(logging.WARNING)


def worker_options(count: int | None) -> tuple[int, dict[str, Any]]:
    """The number of workers, and what Ray must set aside for each of them.

    By default one per GPU of the cluster, or without any one per machine with all of its CPUs.

    Raises:
        InputError: no machine can take a worker, for which Ray would wait without end.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus := sum(int(node.get("GPU", 0)) for node in nodes):
        return count or gpus, {"num_gpus": 1}
    machines = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not machines:
        raise InputError(
            "no machine of the Ray cluster has a GPU or a CPU for a worker: add one, or draw without --ray"
        )
    if count is None:
        return len(machines), {"num_cpus": min(machines)}
    # A worker is on one machine: the largest share of which so many have room at once, else of one CPU.
    shares = range(min(sum(machines) // count, max(machines)), 1, -1)
    return count, {"num_cpus": next((n for n in shares if sum(each // n for each in machines) >= count), 1)}


def draw_on_cluster(
    job: Job,
    shards: Sequence[int],
    *,
    address: str,
    workers: int | None = None,
    on_shard: Callable[[int], None] = lambda shard: None,
) -> int:
    """Draw shards on a Ray cluster, whose machines have BoostDiff and the job's folders under the same paths.

    `address` is as for `start_ray`, `workers` as for `worker_options`; `on_shard` is told the number of each shard that
    is there.

    Returns:
        How many prompts were truncated, see `draw_shard`.

    Raises:
        InputError: there is no such cluster, or the job can't be drawn.
        BoostDiffError: a shard could not be drawn, or workers are lost again and again.
    """
    # What Ray says of lost machines goes to the standard output, which is for results.
    with redirect_stdout(sys.stderr), _connected(address):
        count, options = worker_options(workers)
        # A worker that waits for room on the cluster begins as soon as there is some.
        count = min(count, len(shards))
        return _draw(ray.put(job), list(shards), count, options, on_shard)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    start_ray(address)
    try:
        yield
    except RayError as error:
        raise BoostDiffError(f"Ray failed: {one_line(error)}") from None
    finally:
        ray.shutdown()


def _draw(job: Any, waiting: list[int], count: int, options: dict[str, Any], on_shard: Callable[[int], None]) -> int:
    # Over the machines, where each has its own memory and disk.
    spread = ray.remote(Worker).options(max_restarts=0, scheduling_strategy="SPREAD", **options)
    idle, running, losses, truncated = list[Any](), dict[Any, tuple[Any, int | None]](), dict[int | None, int](), 0

    def start_worker() -> None:
        worker = spread.remote()
        running[worker.open.remote(job)] = worker, None

    for _ in range(count):
        start_worker()
    waiting.reverse()
    while waiting or any(shard is not None for _, shard in running.values()):
        while waiting and idle:
            worker, following = idle.pop(), waiting.pop()
            running[worker.draw.remote(following)] = worker, following
        (done,), _ = ray.wait(list(running), num_returns=1)
        worker, shard = running.pop(done)
        try:
            result = ray.get(done)
        except RayTaskError as error:
            # Without Ray's account of where it was raised.
            raise error.cause from None
        except RayError as error:
            # The worker or its machine is gone. A shard that is not whole is not there.
            losses[shard] = losses.get(shard, 0) + 1
            if losses[shard] >= ATTEMPTS:
                where = "before they could draw" if shard is None else f"over shard {shard}"
                raise BoostDiffError(f"{ATTEMPTS} workers were lost {where}: {one_line(error)}") from None
            if shard is not None:
                waiting.append(shard)
            start_worker()
            continue
        losses.pop(shard, None)
        idle.append(worker)
        if shard is not None:
            truncated += result
            on_shard(shard)
    return truncated
