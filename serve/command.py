"""`boostdiff serve`: parse, configure, start, wait."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from ..engine.errors import BoostDiffError, InputError, one_line
from ..engine.files import read_text
from ..engine.options import config_from, options_of
from ..engine.terminal import console, quiet_libraries
from ..engine.versions import is_installed, to_install, usable_cpus
from .config import ServeConfig, absolute, read_config

RAY_SERVE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    # A second port of the API, for a load balancer that is not there; a stop would wait 30 seconds for it.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}
"""Read when Ray Serve is imported; its own work counts where images are small and cores few."""


@options_of(ServeConfig)
def serve(**options: Any) -> None:
    """Serve an engine behind OpenAI's images API on Ray Serve, with a page to try it."""
    config = config_from(ServeConfig, options)
    if not (is_installed("ray") and is_installed("fastapi")):
        raise BoostDiffError(f"Ray Serve is not installed: {to_install('serve')}")
    quiet_libraries()
    import torch
    import yaml

    from ..engine.generate import device_for
    from ..engine.model import locate
    from .loading import in_torch, name_of
    from .settings import api_key, is_loopback, parse_settings

    cpus, gpu = usable_cpus(), torch.cuda.is_available()
    if config.config is not None:
        try:
            values = yaml.safe_load(read_text(config.config))
        except yaml.YAMLError as error:
            raise InputError(f"{config.config} is no YAML: {one_line(error)}") from None
        args, host, port = read_config(values, config.config)
    else:
        count = config.replicas * (1 + config.teacher)
        share = {"num_gpus": 1 / (1 + config.teacher)} if gpu else {"num_cpus": max(1, cpus // count)}
        args = config.settings(deployment={"ray_actor_options": share})
        cpus, host, port = max(cpus, count), config.host, config.port
    settings = parse_settings({**args, "loopback": is_loopback(host)})
    # What can't be used is said before Ray starts, which takes seconds.
    api_key(loopback=settings.loopback)
    names = [name_of(each) for each in settings.models]
    if config.address is None:
        _check_port(host, port)
        for each in settings.models:
            if each.engine is None:
                device_for(in_torch(each), locate(each.model, weights=False).family, each.device)
        # Replicas run in folders of their own.
        for each in settings.models:
            each.engine, each.student = (
                folder and str(Path(folder).resolve()) for folder in (each.engine, each.student)
            )
            each.model = absolute(each.model)
        settings.storage = settings.storage and str(Path(settings.storage).resolve())
    for name, value in RAY_SERVE.items():
        os.environ.setdefault(name, value)
    from . import deployment

    stopped = threading.Event()
    with console.status("starting"):
        started = deployment.run(settings, host=host, port=port, address=config.address, cpus=cpus)
    # Ray has set its own.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    console.print(f"Serving {', '.join(names)} at [bold]http://{host}:{port}[/]; Ctrl-C stops")
    stopped.wait()
    with console.status("finishing what is being drawn"):
        deployment.finish(settings)
        deployment.stop(started=started)


def _check_port(host: str, port: int) -> None:
    """Refuse, by an InputError, an address that can't be listened on."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        raise InputError(f"can't listen on {host}:{port}: {error.strerror or one_line(error)}; pass another") from None
