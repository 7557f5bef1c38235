"""OpenAI's images API as an ASGI application, over models in this process or in Ray Serve's replicas.

Sources: https://platform.openai.com/docs/api-reference/images/create and …/images-streaming
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ..engine.errors import InputError
from ..engine.options import STEPS
from .guard import Guard, Traffic, error_answer
from .image_model import Description, Drawn, Job
from .settings import Limits
from .url_files import UrlFiles

PAGE = Path(__file__).with_name("page.html")
FIELD = re.compile(r"[a-z_]{1,40}")
"""Names of fields that an answer may repeat: a client's own may hold anything."""

POLICY = (
    "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page asks nobody but this server."""

DESCRIBE_SECONDS = 10.0
"""Seconds that a model has to say what it is; one that does not is still loading, or its replica is lost."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class OverloadedError(Exception):
    """Too many wait for a model."""


class NotReadyError(Exception):
    """A model does not answer yet, or no longer."""


class Backend(Protocol):
    """What draws for the API, in this process or another."""

    async def describe(self) -> Description:
        """What the model is and takes; answered once it can draw."""

    async def draw(self, job: Job) -> Drawn:
        """Draw, together with others if they are there.

        Raises:
            InputError: the model can't draw it.
            OverloadedError: too many wait.
        """

    def stream(self, job: Job, previews: int) -> AsyncGenerator[Drawn, None]:
        """Draw with previews; the image is the one that is not a `preview`. Raises as `draw`."""


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`; below `user`, what is not OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str = Field(min_length=1)
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(pattern=r"^([1-9]\d{0,4}x[1-9]\d{0,4}|auto)$")] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    sampler: str | None = None
    negative_prompt: str | None = None
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = None

    def jobs(self) -> list[Job]:
        """One job an image, of seeds that follow one another."""
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        width, height = map(int, self.size.split("x")) if self.size not in (None, "auto") else (None, None)
        same = self.model_dump(include={"prompt", "steps", "sampler", "negative_prompt", "guidance"})
        return [Job(**same, seed=seed + i, height=height, width=width) for i in range(self.n or 1)]


def make_app(
    backends: Mapping[str, Backend],
    *,
    limits: Limits,
    files: UrlFiles,
    key: str | None = None,
    loopback: bool = True,
    public_url: str | None = None,
    metrics: Callable[[], Awaitable[str]] | None = None,
    traffic: Traffic | None = None,
) -> FastAPI:
    """The application.

    Args:
        backends: models by name; the first is the default.
        limits: what a request may ask for.
        files: where images lie that are answered as a URL.
        key: what requests must show as a bearer token, if anything.
        loopback: whether this machine alone may ask.
        public_url: what the URLs of images begin with, without a slash at the end; None takes what a request asked for.
        metrics: gives the text of `GET /metrics` in Prometheus' format.
        traffic: counts its requests, and closes it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        files.close()

    # Its pages of documentation would ask a server far away.
    app = FastAPI(title="BoostDiff", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, key=key, body=limits.body, loopback=loopback, traffic=traffic or Traffic())
    started, default, page = int(time.time()), next(iter(backends)), PAGE.read_text(encoding="utf-8")
    waiting = 0

    @contextmanager
    def place(count: int) -> Any:
        """Room for so many images among those that wait."""
        nonlocal waiting
        if waiting + count > limits.waiting:
            raise OverloadedError
        waiting += count
        try:
            yield
        finally:
            waiting -= count

    async def described(name: str) -> Description:
        """What a model says of itself; a NotReadyError where it says nothing in time."""
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS):
                return await backends[name].describe()
        except (TimeoutError, OverloadedError):
            raise NotReadyError(name) from None

    def entry(name: str, found: Description | None) -> dict[str, Any]:
        """A model as OpenAI lists it, with what it takes if that is known."""
        common = {"id": name, "object": "model", "created": started, "owned_by": "boostdiff"}
        return common | {"ready": found is not None} | (asdict(found) if found else {})

    async def listed(name: str) -> dict[str, Any]:
        try:
            return entry(name, await described(name))
        except NotReadyError:
            return entry(name, None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        # A name of the client's own, which may hold anything.
        param = param if param in ImagesRequest.model_fields else None
        if first["type"] == "extra_forbidden" and FIELD.fullmatch(str(first["loc"][-1])):
            said = f"the field {first['loc'][-1]} is not known here: leave it out"
            return error_answer(400, said, code=first["type"])
        hint = "" if param else " (the body is a JSON object, with Content-Type: application/json)"
        return error_answer(400, f"{param or 'the request'}: {first['msg']}{hint}", param=param, code=first["type"])

    @app.exception_handler(InputError)
    async def refused(request: Request, error: InputError) -> Response:
        return error_answer(400, str(error), code="unsupported")

    @app.exception_handler(OverloadedError)
    async def overloaded(request: Request, error: OverloadedError) -> Response:
        return error_answer(503, "too many images are waiting: try again later", code="overloaded")

    @app.exception_handler(NotReadyError)
    async def not_ready(request: Request, error: NotReadyError) -> Response:
        return error_answer(503, f"the model {error} is not ready: try again later", code="not_ready")

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> Response:
        return error_answer(503, f"no image within {limits.seconds:g} seconds: try again later", code="timeout")

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> Response:
        return error_answer(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return error_answer(500, "the image could not be drawn", code="internal_error")

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Any:
        """200 once every model has drawn and compared images, which `models` tells."""
        found = {
            name: each.checked for name, each in zip(backends, await _together(map(described, backends)), strict=True)
        }
        return {"status": "ok", "models": found}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Ray's metrics of this node, in Prometheus' format."""
        if metrics is None:
            raise HTTPException(404, "this server keeps no metrics")
        return PlainTextResponse(await metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Any:
        """OpenAI's list, with what each model takes; of one that is not `ready`, its name alone."""
        data = await _together(map(listed, backends))
        return {"object": "list", "data": data, "limits": limits.model_dump()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        """One model of the list."""
        if name not in backends:
            return error_answer(404, "there is no such model", param="model", code="model_not_found")
        return entry(name, await described(name))

    @app.get("/v1/images/files/{name}")
    async def image_file(name: str) -> Response:
        """An image that was answered as a URL, for as long as it is kept."""
        content = await asyncio.to_thread(files.read, name)
        if content is None:
            raise HTTPException(404, "there is no such image, or no longer")
        return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=60"})

    @app.post("/v1/images/generations")
    async def generations(body: ImagesRequest, request: Request) -> Response:
        """Draw images."""
        name = default if body.model is None else body.model
        if name not in backends:
            return error_answer(404, "there is no such model", param="model", code="model_not_found")
        steps = body.steps
        if steps is None and limits.steps < STEPS:
            steps = (await described(name)).steps or limits.steps
        for value, most, param in (
            (len(body.prompt), limits.prompt, "prompt"),
            (len(body.negative_prompt or ""), limits.prompt, "negative_prompt"),
            (body.n or 1, min(limits.images, limits.waiting), "n"),
            (steps or 1, limits.steps, "steps"),
            (body.n or 1 if body.stream else 1, 1, "n"),
        ):
            if value > most:
                return error_answer(400, f"{param} is {value} and may be {most} at most", param=param, code="too_large")
        if body.stream and body.response_format == "url":
            return error_answer(400, "a stream answers b64_json", param="response_format", code="unsupported")
        if body.partial_images and not body.stream:
            return error_answer(400, "partial_images is for streams", param="partial_images", code="unsupported")
        jobs, backend = body.model_copy(update={"steps": steps}).jobs(), backends[name]
        if body.stream:
            states = limited(backend.stream(jobs[0], body.partial_images or 0))
            # What is refused is refused before the answer begins.
            first = await anext(states)
            return StreamingResponse(events(first, states), media_type="text/event-stream")
        with place(len(jobs)):
            async with asyncio.timeout(limits.seconds):
                drawn = await _together([backend.draw(job) for job in jobs])
        answer: dict[str, Any] = {"created": int(time.time()), "output_format": "png", "data": []}
        for image in drawn:
            if body.response_format == "url":
                if (kept := await asyncio.to_thread(files.write, image.png)) is None:
                    return error_answer(503, "no room for files: ask for b64_json", code="no_room")
                asked = f"{request.base_url.scheme}://{request.base_url.netloc}"
                shown = {"url": f"{public_url or asked}/v1/images/files/{kept}"}
            else:
                shown = {"b64_json": base64.b64encode(image.png).decode()}
            answer["data"].append(shown | _said(image))
        return JSONResponse(answer)

    async def limited(states: AsyncGenerator[Drawn, None]) -> AsyncGenerator[Drawn, None]:
        """The states of a stream, at one place and up to one deadline from the first to the last."""
        deadline = asyncio.get_running_loop().time() + limits.seconds
        with place(1):
            async with aclosing(states):
                while True:
                    async with asyncio.timeout_at(deadline):
                        state = await anext(states, None)
                    if state is None:
                        return
                    yield state

    async def events(first: Drawn, states: AsyncGenerator[Drawn, None]) -> AsyncIterator[str]:
        """OpenAI's events of a stream: previews, each as soon as it is there, then the image."""
        state, index = first, 0
        try:
            async with aclosing(states):
                while state.preview:
                    yield _event("image_generation.partial_image", state, partial_image_index=index)
                    state, index = await anext(states), index + 1
            yield _event("image_generation.completed", state)
        except Exception as error:
            if not isinstance(error, (OverloadedError, TimeoutError)):
                log.exception("a stream failed")
            failed = {"message": "the image could not be drawn", "type": "server_error", "param": None, "code": None}
            yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': failed})}\n\n"

    return app


async def _together(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, at once; where one fails the others are given up, and what it raised is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in asked]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _said(image: Drawn) -> dict[str, Any]:
    """What is told of an image beside its content."""
    return {key: value for key, value in asdict(image).items() if key not in ("png", "preview")} | {
        "size": f"{image.width}x{image.height}"
    }


def _event(kind: str, image: Drawn, **more: Any) -> str:
    said = {"type": kind, "b64_json": base64.b64encode(image.png).decode(), "created_at": int(time.time())}
    said |= _said(image) | {"output_format": "png", "quality": "auto", "background": "opaque"} | more
    return f"event: {kind}\ndata: {json.dumps(said)}\n\n"
