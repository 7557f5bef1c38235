"""The application on Ray Serve, as far as it can be tried without starting Ray."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from boostdiff.engine.errors import InputError
from boostdiff.serve.config import read_config
from boostdiff.serve.settings import KEY_VARIABLE, ModelSettings, parse_settings

pytest.importorskip("ray", reason="the extra serve has it")
pytest.importorskip("fastapi", reason="the extra dev has it")

from boostdiff.serve import deployment
from boostdiff.serve.deployment import RayBackend, build, check_room
from boostdiff.serve.guard import Guard
from boostdiff.serve.image_model import Job
from fastapi import FastAPI
from ray import cloudpickle
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

JOB = Job(prompt="a", seed=0)


@pytest.fixture
def args(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a server of one teacher for this machine alone."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return {"models": [{"model": str(tiny_folder), "name": "tiny"}], "loopback": True}


@pytest.fixture
def replica_app(monkeypatch: pytest.MonkeyPatch) -> Callable[[Application], tuple[FastAPI, Any]]:
    """What an API's replica makes of an application that came to it pickled: its ASGI application and its class."""
    monkeypatch.setattr(deployment.serve, "get_replica_context", lambda: SimpleNamespace(app_name="boostdiff"))
    monkeypatch.setattr(deployment.serve, "get_deployment_handle", lambda name, app: object())

    def make(application: Application) -> tuple[FastAPI, Any]:
        api = cloudpickle.loads(cloudpickle.dumps(application._bound_deployment.func_or_class))
        held = [cell.cell_contents for cell in api.__init__.__closure__]
        (app,) = (each for each in held if inspect.isfunction(each))
        return app(), api

    return make


def guard_of(app: FastAPI) -> dict[str, Any]:
    (guard,) = (each for each in app.user_middleware if each.cls is Guard)
    return guard.kwargs


def test_rays_own_commands_pass_plain_values(args: dict[str, Any]) -> None:
    assert isinstance(call_user_app_builder_with_args_if_necessary(build, args), Application)
    with pytest.raises(InputError, match=r"models\.0\.speed"):
        call_user_app_builder_with_args_if_necessary(build, {"models": [{"speed": 2}]})


def test_the_key_is_that_of_who_serves(
    args: dict[str, Any], monkeypatch: pytest.MonkeyPatch, replica_app: Callable[..., Any]
) -> None:
    """Not that of the machine on which the API happens to run."""
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    application = build(parse_settings(args))
    monkeypatch.delenv(KEY_VARIABLE)
    app, _ = replica_app(application)
    assert guard_of(app)["key"] == "secret"


def test_a_stop_closes_the_traffic_that_the_guard_counts(args: dict[str, Any], replica_app: Callable[..., Any]) -> None:
    app, api = replica_app(build(args))
    assert guard_of(app)["traffic"] is api.close.__globals__["TRAFFIC"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nme": 1}, "unexpected keyword argument 'nme'"),
        ({"name": "x"}, "multiple values for keyword argument 'name'"),
        ({"num_replicas": 0}, "num_replicas"),
        ({"ray_actor_options": {"num_cpu": 1}}, "num_cpu"),
        ({"max_ongoing_requests": "many"}, "max_ongoing_requests"),
        ({"autoscaling_config": {"min_replicas": -1}}, "min_replicas"),
    ],
)
def test_options_of_a_deployment_that_can_not_be_used(args: dict[str, Any], options: Any, said: str) -> None:
    args["models"][0]["deployment"] = options
    with pytest.raises(InputError, match="the deployment of tiny can't be used") as error:
        build(args)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("deployment_options", "machines", "said"),
    [
        ([{}, {}], [{"CPU": 2}], None),
        ([{}, {}], [{"CPU": 1}], "ask for 2 CPUs, and Ray has 1"),
        ([{"ray_actor_options": {"num_cpus": 0.5}}] * 2, [{"CPU": 1}], None),
        ([{"num_replicas": 3}], [{"CPU": 1}, {"CPU": 1}], "ask for 3 CPUs, and Ray has 2"),
        ([{"ray_actor_options": {"num_cpus": 2}}], [{"CPU": 1}] * 2, "asks for 2 CPUs, and no machine has more than 1"),
        ([{"ray_actor_options": {"num_gpus": 1}}], [{"CPU": 9}], "asks for 1 GPUs, and no machine has more than 0"),
        ([{"ray_actor_options": {"num_gpus": 0.5}, "num_replicas": 2}], [{"CPU": 2, "GPU": 1}], None),
        ([{"autoscaling_config": {"min_replicas": 0, "max_replicas": 9}}], [{"CPU": 1}], None),
        ([{"autoscaling_config": {"min_replicas": 1, "initial_replicas": 3}}], [{"CPU": 2}], "ask for 3 CPUs"),
        ([{"num_replicas": "auto"}], [{"CPU": 1}], None),
    ],
)
def test_more_than_the_cluster_has(
    deployment_options: list[dict[str, Any]], machines: list[dict[str, float]], said: str | None
) -> None:
    models = [ModelSettings(deployment=options) for options in deployment_options]
    if said is None:
        check_room(models, machines)
        return
    with pytest.raises(InputError, match=said):
        check_room(models, machines)


def test_the_example_for_one_machine_runs_on_one_cpu() -> None:
    example = Path(__file__).parents[2] / "docs/serving/serve.yaml"
    args, *_ = read_config(yaml.safe_load(example.read_text()), example)
    check_room(parse_settings(args).models, [{"CPU": 1}])


class Serve:
    """Stands for Ray Serve; `found` is where it listens already, if anywhere."""

    def __init__(self, found: tuple[str, int] | None, others: bool = False, error: Exception | None = None) -> None:
        self.found, self.others, self.error, self.calls = found, others, error, list[str]()

    def start(self, http_options: dict[str, Any]) -> None:
        self.found = self.found or (http_options["host"], http_options["port"])

    def run(self, application: Any, name: str) -> None:
        self.calls.append("run")
        if self.error:
            raise self.error

    def delete(self, name: str) -> None:
        self.calls.append("delete")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def status(self) -> Any:
        return SimpleNamespace(applications={"other": 1} if self.others else {})

    def client(self, raise_if_no_controller_running: bool = True) -> Any:
        return self.found and SimpleNamespace(http_config=SimpleNamespace(host=self.found[0], port=self.found[1]))


@pytest.fixture
def run_on(args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[Serve], bool]:
    def run(found: Serve) -> bool:
        monkeypatch.setattr(deployment, "build", lambda settings: None)
        monkeypatch.setattr(deployment, "serve", found)
        monkeypatch.setattr(deployment, "start_ray", lambda address, cpus: None)
        monkeypatch.setattr(deployment, "_get_global_client", found.client)
        nodes = [{"Alive": True, "Resources": {"CPU": 1}}]
        monkeypatch.setattr(deployment, "ray", SimpleNamespace(nodes=lambda: nodes, shutdown=lambda: None))
        return deployment.run(parse_settings(args), host="127.0.0.1", port=8000, address="auto", cpus=1)

    return run


def test_a_serve_that_listens_elsewhere_is_refused(run_on: Callable[[Serve], bool]) -> None:
    """It keeps its address, which may be open to all; what it serves stays."""
    found = Serve(("0.0.0.0", 8000))  # noqa: S104
    with pytest.raises(InputError, match=r"listens on 0\.0\.0\.0:8000, not on 127\.0\.0\.1:8000"):
        run_on(found)
    assert found.calls == []
    same = Serve(("127.0.0.1", 8000))
    assert run_on(same) is False
    deployment.stop(started=False)
    assert same.calls == ["run", "delete"]


def test_who_started_serve_ends_it(run_on: Callable[[Serve], bool]) -> None:
    failed = Serve(None, error=RuntimeError("no"))
    with pytest.raises(RuntimeError, match="no"):
        run_on(failed)
    assert failed.calls == ["run", "delete", "shutdown"]
    used = Serve(None, others=True)
    assert run_on(used) is True
    deployment.stop(started=True)
    assert used.calls == ["run", "delete"], "another application is served there"


class Response:
    """Of a replica that is never done; it can be awaited, and iterated over."""

    def __init__(self) -> None:
        self.cancelled, self.asked = False, False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Any:
        self.asked = True
        return asyncio.Event().wait().__await__()

    async def __aiter__(self) -> AsyncIterator[int]:
        yield 1
        await self


class Handle:
    """Of a deployment whose methods answer so."""

    def __init__(self, response: Response) -> None:
        self.draw = self.stream = SimpleNamespace(remote=lambda *arguments: response)

    def options(self, *, stream: bool) -> "Handle":
        return self


@pytest.mark.parametrize("method", ["draw", "stream", "closed"])
def test_what_is_given_up_is_cancelled_in_the_replica(method: str) -> None:
    response = Response()
    backend = RayBackend(Handle(response))  # type: ignore[arg-type]

    async def all_states() -> None:
        async for _ in backend.stream(JOB, 1):
            pass

    async def give_up() -> None:
        if method == "closed":
            states = backend.stream(JOB, 1)
            await anext(states)
            await states.aclose()
            return
        task = asyncio.ensure_future(backend.draw(JOB) if method == "draw" else all_states())
        while not response.asked:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert response.cancelled
