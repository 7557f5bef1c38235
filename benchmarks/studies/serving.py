"""`boostdiff serve` under load, against the engine called directly: images per second, latency, and wrong images."""

from __future__ import annotations

import base64
import io
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image

from ...engine import embedded
from ...engine.errors import BoostDiffError
from ...engine.exported import Engine
from ...engine.prompts import read_prompts
from ..config import comma_separated
from ..report.tables import NOTHING, Table
from .held_out import Steps

clients_of = comma_separated("--clients", int, "1,4,16,64", least=1)
TIMEOUT_SECONDS = 600
"""For a server to start, to answer or to stop."""
REFUSED = 503
"""Status of a request that an overloaded server does not take."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One image that was asked for.

    Attributes:
        status: HTTP status; 0 where the connection broke.
        seconds: from the request to its answer.
        batch: images that it was drawn with.
        pixels: the image, `(H, W, 3)`; None where there is none.
    """

    status: int
    seconds: float
    batch: int = 0
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Load:
    """What one number of clients was answered, in how many seconds, and by how many MiB memory had grown then."""

    clients: int
    answers: list[Answer]
    seconds: float
    grown: float


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
    return port


@contextmanager
def served(*options: str, port: int | None = None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`boostdiff serve` with these options on a free port: the process and its URL, once it is ready.

    `port` is that of a configuration file among the options.

    Raises:
        BoostDiffError: it ended, or was not ready in time.
    """
    if port is None:
        port = free_port()
        options = ("--port", str(port), *options)
    server = subprocess.Popen([sys.executable, "-m", "boostdiff", "serve", *options])  # noqa: S603
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(server, url)
        yield server, url
    finally:
        server.terminate()
        try:
            server.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Wait until `/health` says so."""
    for _ in range(TIMEOUT_SECONDS):
        if server.poll() is not None:
            raise BoostDiffError("the server ended before it was ready")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30):  # noqa: S310
                return
        except OSError:
            time.sleep(1)
    raise BoostDiffError(f"the server was not ready within {TIMEOUT_SECONDS} seconds")


def ask(url: str, **fields: Any) -> Answer:
    """Ask for one image."""
    started = time.monotonic()
    request = urllib.request.Request(  # noqa: S310
        f"{url}/v1/images/generations", json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            (image,) = json.load(answer)["data"]
            status = answer.status
    except urllib.error.HTTPError as error:
        error.read()
        return Answer(status=error.code, seconds=time.monotonic() - started)
    except OSError:
        return Answer(status=0, seconds=time.monotonic() - started)
    seconds = time.monotonic() - started
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))
    return Answer(status=status, seconds=seconds, batch=image["batch"], pixels=pixels)


def memory(server: subprocess.Popen[bytes]) -> float:
    """MiB that the processes which answer and draw have to themselves."""
    found = 0
    for process in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ServeReplica" in " ".join(process.cmdline()):
                found += process.memory_full_info().uss
    return found / 2**20


def load(url: str, prompts: Sequence[str], *, clients: int, steps: int) -> tuple[list[Answer], float]:
    """The answers to all prompts, image i of seed i, by so many clients that each wait for theirs; and the seconds."""
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        numbered = enumerate(prompts)
        answers = list(pool.map(lambda item: ask(url, prompt=item[1], seed=item[0], steps=steps), numbered))
    return answers, time.monotonic() - started


def is_right(answer: Answer, expected: Image.Image) -> bool:
    """Whether an answer is the engine's own image, but for one level of 255."""
    if answer.pixels is None:
        return False
    return bool(np.abs(answer.pixels.astype(int) - np.asarray(expected).astype(int)).max() <= 1)


def serve(
    engine: Annotated[Path, typer.Option("--engine", help="Folder that `boostdiff export` wrote.")] = Path(
        "outputs/engine"
    ),
    clients: Annotated[str, typer.Option(help="Clients that ask at once.")] = "1,4,16,64",
    requests: Annotated[int, typer.Option(min=1, help="Images asked for by each number of clients.")] = 64,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that draw.")] = 1,
    steps: Steps = 20,
) -> None:
    """`boostdiff serve` under load, against the engine called directly in batches.

    MiB is what the memory of the processes that answer and draw has grown by since the warm-up.
    """
    numbers = clients_of(clients)
    prompts = list(islice(cycle(read_prompts(embedded.HELD_OUT_PROMPTS)), requests))
    loads: list[Load] = []
    # On the device that the server chooses, too.
    with Engine.load(engine) as opened:

        def directly() -> tuple[list[Image.Image], float]:
            started = time.monotonic()
            return opened(prompts, steps=steps, seed=0), time.monotonic() - started

        opened(prompts[:8], steps=steps)
        expected, before = directly()
        with served("--engine", str(engine), "--replicas", str(replicas)) as (server, url):
            load(url, prompts[: 8 * replicas], clients=8 * replicas, steps=steps)
            started_with = memory(server)
            for number in numbers:
                answers, seconds = load(url, prompts, clients=number, steps=steps)
                loads.append(Load(number, answers, seconds, memory(server) - started_with))
        # Without a server, whose processes take some of the machine when they have nothing to do, too.
        _, after = directly()
    direct = 2 * requests / (before + after)
    print(f"The engine directly, before and after the server: {requests / before:.2f}, {requests / after:.2f}\n")
    print(_table(loads, expected, direct).markdown())


def _table(loads: Sequence[Load], expected: Sequence[Image.Image], direct: float) -> Table:
    """Latency and batch are of images alone: a refusal is fast, and an overloaded server would look quick by it."""
    rows = []
    for each in loads:
        drawn = [answer for answer in each.answers if answer.status == 200]
        times = sorted(answer.seconds for answer in drawn)
        right = [is_right(answer, image) for answer, image in zip(each.answers, expected, strict=True)]
        wrong = sum(answer.status == 200 and not good for answer, good in zip(each.answers, right, strict=True))
        rate = sum(right) / each.seconds
        rows.append(
            [
                f"{each.clients}",
                f"{rate:.2f}",
                f"{rate / direct:.0%}",
                *(f"{times[int(share * len(times))]:.2f}" if times else NOTHING for share in (0.5, 0.95, 0.99)),
                f"{statistics.mean(answer.batch for answer in drawn):.1f}" if drawn else NOTHING,
                str(wrong),
                str(sum(answer.status == REFUSED for answer in each.answers)),
                str(sum(answer.status not in (200, REFUSED) for answer in each.answers)),
                f"{each.grown:+.0f}",
            ]
        )
    latencies = ["p50 s", "p95 s", "p99 s"]
    counts = ["wrong images", "refused", "errors"]
    headings = ["clients", "images per second", "of directly", *latencies, "batch", *counts, "MiB"]
    return Table(headings=headings, cells=rows)
