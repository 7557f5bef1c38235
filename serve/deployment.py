"""The server on Ray Serve: an API that answers, and for each model replicas that draw batches.

`build` is what a configuration of Ray Serve names as `import_path: boostdiff.serve.deployment:build`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from ..engine.errors import InputError
from ..engine.ray_workers import start_ray
from ..engine.terminal import quiet_libraries
from .api import OverloadedError, Traffic, make_app
from .image_model import Description, Drawn, Job, name_of, open_model
from .local import LocalBackend
from .settings import ModelSettings, ServerSettings, api_key
from .url_files import UrlFiles

APPLICATION = "boostdiff"

DEPLOYMENT = {"max_ongoing_requests": 1000, "max_queued_requests": 1000}
"""Options of a model's deployment where the settings have no others."""


class Replica(LocalBackend):
    """One model. It can be asked once it has drawn images alone and together and compared them."""

    def __init__(self, settings: ModelSettings) -> None:
        quiet_libraries()
        model = open_model(settings)
        model.check_itself()
        super().__init__(model)


TRAFFIC = Traffic()
"""Of the API's replica that this process is."""


class Api:
    """What stands around the ASGI application in each of the API's replicas."""

    def __init__(self, *models: DeploymentHandle) -> None:
        """Ray starts the models first, as they are arguments."""

    def close(self) -> tuple[str, int]:
        """Refuse further requests; the replica's name, and how many requests it still answers."""
        TRAFFIC.closed = True
        return serve.get_replica_context().replica_id.unique_id, TRAFFIC.ongoing


class RayBackend:
    """Replicas of one model as the API's backend. What a lost replica was drawing is drawn by another."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def describe(self) -> Description:
        """See `api.Backend`."""
        return await self._answer(self._handle.describe)

    async def draw(self, job: Job) -> Drawn:
        """See `api.Backend`."""
        return await self._answer(self._handle.draw, job)

    async def stream(self, job: Job, previews: int) -> AsyncIterator[Drawn]:
        """See `api.Backend`."""
        try:
            async for drawn in self._handle.options(stream=True).stream.remote(job, previews):
                yield drawn
        except RayTaskError as error:
            raise _cause(error) from None
        except (RayActorError, RayServeException):
            raise OverloadedError from None

    async def _answer(self, method: Any, *arguments: Any) -> Any:
        for _ in range(3):
            try:
                return await method.remote(*arguments)
            except RayTaskError as error:
                raise _cause(error) from None
            except BackPressureError:
                break
            except (RayActorError, RayServeException):
                # The replica died. An image has no effect but itself: ask another one.
                await asyncio.sleep(0.5)
        raise OverloadedError


def _cause(error: RayTaskError) -> Exception:
    """What was raised in the replica, without Ray's account of where."""
    return InputError(str(error.cause)) if isinstance(error.cause, InputError) else RuntimeError(str(error.cause))


async def node_metrics() -> str:
    """What Ray measures on this node, in Prometheus' format."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()

    return await asyncio.to_thread(fetch)


def build(settings: ServerSettings) -> Application:
    """The application of a server's settings.

    Raises:
        InputError: a model can't be used, two have one name, or a key is needed and not there.
    """
    api_key(loopback=settings.loopback)
    names = [name_of(each) for each in settings.models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two models are called {twice!r}: give each a name of its own")
    deployments = {name: f"model-{index}" for index, name in enumerate(names)}
    # On a stop all that runs is finished, as long as a request may take.
    patient = {"graceful_shutdown_timeout_s": settings.limits.seconds + 10}
    models = [
        serve.deployment(Replica)
        .options(**DEPLOYMENT | patient | each.deployment, name=deployment)
        .bind(each.model_copy(update={"name": name}))
        for each, (name, deployment) in zip(settings.models, deployments.items(), strict=True)
    ]

    def app() -> FastAPI:
        name = serve.get_replica_context().app_name
        storage = Path(settings.storage) if settings.storage else None
        return make_app(
            {
                model: RayBackend(serve.get_deployment_handle(deployment, name))
                for model, deployment in deployments.items()
            },
            limits=settings.limits,
            files=UrlFiles(storage, seconds=settings.url_seconds),
            key=api_key(loopback=settings.loopback),
            loopback=settings.loopback,
            metrics=node_metrics,
            traffic=TRAFFIC,
        )

    api = serve.deployment(serve.ingress(app)(Api))
    options = {"num_replicas": settings.api_replicas, "ray_actor_options": {"num_cpus": 0}}
    return api.options(name="api", max_ongoing_requests=1000, **patient, **options).bind(*models)


def run(settings: ServerSettings, *, host: str, port: int, address: str | None, cpus: int) -> None:
    """Serve until interrupted; what is being drawn then is finished.

    Args:
        settings: models and limits.
        host: address to listen on.
        port: its port.
        address: of a running Ray cluster; None starts Ray here, for this machine alone.
        cpus: CPUs that Ray counts on here, where it is started.

    Raises:
        InputError: there is no such cluster, or see `build`.
    """
    application = build(settings)
    start_ray("local" if address is None else address, cpus=cpus)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.limits.seconds + 30})
        serve.run(application, name=APPLICATION)
    except BaseException:
        stop(address=address)
        raise


def finish(settings: ServerSettings) -> None:
    """Let the API refuse further requests, and wait until it has answered all that it has, if they end in time.

    Before `stop`, as Ray ends the models' replicas together with the API's, which may still have requests for them.
    """
    deadline, done = time.monotonic() + settings.limits.seconds + 10, set[str]()
    with suppress(Exception):
        handle = serve.get_deployment_handle("api", APPLICATION)
        while len(done) < settings.api_replicas and (left := deadline - time.monotonic()) > 0:
            # Ray chooses the replica, sooner or later each of them.
            name, ongoing = handle.close.remote().result(timeout_s=left)
            if ongoing == 0:
                done.add(name)
            time.sleep(0.1)


def stop(*, address: str | None) -> None:
    """End what `run` started."""
    # Replicas finish what they have; `shutdown` alone would take the proxy from under them.
    with suppress(Exception):
        serve.delete(APPLICATION)
    if address is None:
        serve.shutdown()
    ray.shutdown()
