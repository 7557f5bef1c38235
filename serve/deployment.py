"""The server on Ray Serve: an API that answers, and for each model replicas that draw batches.

`build` is what a configuration of Ray Serve names as `import_path: boostdiff.serve.deployment:build`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.request
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from ..engine.errors import InputError, one_line
from ..engine.ray_workers import start_ray
from ..engine.terminal import quiet_libraries
from .api import OverloadedError, make_app
from .guard import Traffic
from .image_model import Description, Drawn, Job
from .loading import name_of, open_model
from .local import LocalBackend
from .settings import ModelSettings, ServerSettings, api_key, first_of, parse_settings
from .url_files import UrlFiles

APPLICATION = "boostdiff"

log = logging.getLogger(__name__)

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

    async def stream(self, job: Job, previews: int) -> AsyncGenerator[Drawn, None]:
        """See `api.Backend`."""
        states = self._handle.options(stream=True).stream.remote(job, previews)
        try:
            async for drawn in states:
                yield drawn
        except RayTaskError as error:
            raise _cause(error) from None
        except (RayActorError, RayServeException):
            raise OverloadedError from None
        finally:
            # Whoever stops listening must not be drawn for.
            states.cancel()

    async def _answer(self, method: Any, *arguments: Any) -> Any:
        for _ in range(3):
            response = method.remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                # Given up, or too late. Ray itself would let the replica draw it nevertheless.
                response.cancel()
                raise
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


def build(settings: ServerSettings | dict[str, Any]) -> Application:
    """The application of a server's settings; Ray's own commands pass `args` as they stand in a configuration.

    Raises:
        InputError: a setting or a model can't be used, two have one name, or a key is needed and not there.
    """
    if not isinstance(settings, ServerSettings):
        settings = parse_settings(settings)
    # Here and not in the replica, whose environment is that of `ray start`.
    key = api_key(loopback=settings.loopback)
    names = [name_of(each) for each in settings.models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two models are called {twice!r}: give each a name of its own")
    deployments = {name: f"model-{index}" for index, name in enumerate(names)}
    # On a stop all that runs is finished, as long as a request may take.
    patient = {"graceful_shutdown_timeout_s": settings.limits.seconds + 10}
    models = [
        _bound(each.model_copy(update={"name": name}), deployment, patient)
        for each, (name, deployment) in zip(settings.models, deployments.items(), strict=True)
    ]

    def app() -> FastAPI:
        return _app(settings, deployments, key)

    api = serve.deployment(serve.ingress(app)(Api))
    options = {"num_replicas": settings.api_replicas, "ray_actor_options": {"num_cpus": 0}}
    return api.options(name="api", max_ongoing_requests=1000, **patient, **options).bind(*models)


def _bound(settings: ModelSettings, deployment: str, options: dict[str, Any]) -> Application:
    """A model's replicas; an InputError where the options of its deployment can't be used."""
    try:
        made = serve.deployment(Replica).options(**DEPLOYMENT | options | settings.deployment, name=deployment)
    except (TypeError, ValueError, AttributeError) as error:
        said = first_of(error) if isinstance(error, ValidationError) else one_line(error)
        raise InputError(f"the deployment of {settings.name} can't be used: {said}") from None
    return made.bind(settings)


def _app(settings: ServerSettings, deployments: Mapping[str, str], key: str | None) -> FastAPI:
    """The application in an API's replica.

    Pickle names a function of this module, but copies one inside another together with what it uses: `TRAFFIC` there
    would not be the one that `Api` closes.
    """
    name = serve.get_replica_context().app_name
    storage = Path(settings.storage) if settings.storage else None
    return make_app(
        {model: RayBackend(serve.get_deployment_handle(deployment, name)) for model, deployment in deployments.items()},
        limits=settings.limits,
        files=UrlFiles(storage, seconds=settings.url_seconds),
        key=key,
        loopback=settings.loopback,
        public_url=settings.public_url,
        metrics=node_metrics,
        traffic=TRAFFIC,
    )


def check_room(models: Sequence[ModelSettings], machines: Sequence[Mapping[str, float]]) -> None:
    """Refuse, by an InputError, more than a cluster has: Ray would wait for it without end.

    `machines` is what each machine has, as `ray.nodes` names it.
    """
    for resource, option, default in (("CPU", "num_cpus", 1), ("GPU", "num_gpus", 0)):
        there, asked = [machine.get(resource, 0) for machine in machines], 0.0
        for each in models:
            chosen = (each.deployment.get("ray_actor_options") or {}).get(option)
            one = default if chosen is None else chosen
            if one > max(there, default=0):
                raise InputError(
                    f"a replica asks for {one:g} {resource}s, and no machine has more than {max(there, default=0):g}: "
                    f"give it less by {option} of ray_actor_options"
                )
            asked += _replicas(each.deployment) * one
        if asked > sum(there):
            raise InputError(
                f"the models ask for {asked:g} {resource}s, and Ray has {sum(there):g}: serve fewer replicas, or give "
                f"each less by {option} of ray_actor_options"
            )


def _replicas(options: Mapping[str, Any]) -> int:
    """With how many replicas a deployment begins."""
    scaling = options.get("autoscaling_config")
    if isinstance(scaling, dict):
        first = scaling.get("initial_replicas")
        return int(scaling.get("min_replicas", 1) if first is None else first)
    count = options.get("num_replicas")
    return count if isinstance(count, int) else 1


def run(settings: ServerSettings, *, host: str, port: int, address: str | None, cpus: int) -> bool:
    """Start to serve on the Ray cluster at `address`; None starts Ray here, with `cpus`, for this machine alone.

    Returns:
        Whether this process started Ray Serve, and so has to end it; see `stop`.

    Raises:
        InputError: there is no such cluster, it has too little, or Serve listens elsewhere on it; or see `build`.
    """
    application = build(settings)
    start_ray("local" if address is None else address, cpus=cpus)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started = deployed = False
    try:
        check_room(settings.models, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        started = _get_global_client(raise_if_no_controller_running=False) is None
        if started:
            serve.start(http_options={"host": host, "port": port, "request_timeout_s": settings.limits.seconds + 30})
        _check_address(host, port)
        deployed = True
        serve.run(application, name=APPLICATION)
    except BaseException:
        stop(started=started, deployed=deployed)
        raise
    return started


def _check_address(host: str, port: int) -> None:
    """Refuse, by an InputError, a Serve that ran before and listens elsewhere: it keeps its address, and says nothing.

    What was meant for the loopback could stand open to all, without a key.
    """
    found = _get_global_client().http_config
    if (found.host, found.port) != (host, port):
        raise InputError(
            f"Ray Serve runs on this cluster and listens on {found.host}:{found.port}, not on {host}:{port}: "
            "pass that --host and --port, or end it by Ray's `serve shutdown`"
        )


def finish(settings: ServerSettings) -> None:
    """Let the API refuse further requests, and wait until it has answered all that it has, if they end in time.

    Before `stop`, as Ray ends the models' replicas together with the API's, which may still have requests for them.
    """
    deadline, done = time.monotonic() + settings.limits.seconds + 10, set[str]()
    try:
        handle = serve.get_deployment_handle("api", APPLICATION)
        # As `boostdiff serve` sets Ray up, handles would answer in an asyncio loop alone.
        handle._init(_run_router_in_separate_loop=True)
        while len(done) < settings.api_replicas and (left := deadline - time.monotonic()) > 0:
            # Ray chooses the replica, sooner or later each of them.
            name, ongoing = handle.close.remote().result(timeout_s=left)
            if ongoing == 0:
                done.add(name)
            time.sleep(0.1)
    except Exception as error:
        log.warning("requests may have been left unanswered: %s", one_line(error))


def stop(*, started: bool, deployed: bool = True) -> None:
    """End what `run` started: the application if it may be there, and Serve if it began here and has no others."""
    with suppress(Exception):
        # Replicas finish what they have; `shutdown` alone would take the proxy from under them.
        if deployed:
            serve.delete(APPLICATION)
    with suppress(Exception):
        if started and not serve.status().applications:
            serve.shutdown()
    ray.shutdown()
