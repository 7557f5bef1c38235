"""Places, deadlines and what is given up, by a backend that draws when it is told to."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from boostdiff.engine.errors import InputError

pytest.importorskip("fastapi", reason="the extra dev has it")

from boostdiff.serve.api import OverloadedError, make_app
from boostdiff.serve.image_model import Description, Drawn, Job
from boostdiff.serve.settings import Limits
from boostdiff.serve.url_files import UrlFiles

URL = "/v1/images/generations"


class Steady:
    """Draws when it is told to, and counts what was given up."""

    def __init__(self) -> None:
        self.go, self.given_up = asyncio.Event(), 0

    async def describe(self) -> Description:
        raise OverloadedError

    def image(self, *, preview: bool) -> Drawn:
        common = {"seed": 0, "step": 1, "passes": 1, "seconds": 0.1, "batch": 1, "width": 16, "height": 16}
        return Drawn(png=b"x", preview=preview, **common)

    async def draw(self, job: Job) -> Drawn:
        if job.seed == 2:
            raise InputError("this seed can't be drawn")
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return self.image(preview=False)

    async def stream(self, job: Job, previews: int) -> AsyncGenerator[Drawn, None]:
        try:
            yield self.image(preview=True)
            await self.go.wait()
            yield self.image(preview=False)
        except (asyncio.CancelledError, GeneratorExit):
            self.given_up += 1
            raise


class Asked:
    """A request that was sent to an application: what came back so far, as ASGI says it."""

    def __init__(self, app: Any, **fields: Any) -> None:
        self.messages: list[dict[str, Any]] = []
        self.body, self.sent = json.dumps({"prompt": "a", **fields}).encode(), False
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": headers}
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "scheme": "http"}
        self.task = asyncio.ensure_future(app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if self.sent:
            await asyncio.Event().wait()
        self.sent = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def __str__(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()

    async def until(self, said: str) -> None:
        async with asyncio.timeout(20):
            while said not in str(self):
                await asyncio.sleep(0.001)

    async def status(self) -> int:
        await self.task
        return self.messages[0]["status"]


class Unfinished(Asked):
    """A request whose client never sends the end of its body."""

    async def receive(self) -> dict[str, Any]:
        return await super().receive() | {"more_body": True}


def steady_app(tmp_path: Path, **limits: Any) -> tuple[Steady, Any]:
    backend = Steady()
    return backend, make_app({"x": backend}, limits=Limits(**limits), files=UrlFiles(tmp_path, seconds=1))


def test_a_preview_is_sent_at_once_and_its_stream_keeps_its_place(tmp_path: Path) -> None:
    async def talk() -> None:
        backend, app = steady_app(tmp_path, waiting=1)
        stream = Asked(app, stream=True, partial_images=1)
        await stream.until("image_generation.partial_image")
        assert await Asked(app).status() == 503
        backend.go.set()
        await stream.until("image_generation.completed")
        assert '"preview"' not in str(stream)
        await stream.task
        assert await Asked(app).status() == 200

    asyncio.run(talk())


def test_a_body_has_a_deadline_and_what_is_drawn_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boostdiff.serve.guard.BODY_SECONDS", 0)

    async def talk() -> None:
        backend, app = steady_app(tmp_path)
        unfinished = Unfinished(app)
        async with asyncio.timeout(20):
            assert await unfinished.status() == 408
        assert (b"connection", b"close") in unfinished.messages[0]["headers"]
        assert json.loads(str(unfinished))["error"]["message"] == "the request's body took more than 0 seconds"
        drawn = Asked(app)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not drawn.task.done()
        backend.go.set()
        assert await drawn.status() == 200

    asyncio.run(talk())


def test_a_stream_has_one_deadline(tmp_path: Path) -> None:
    async def talk() -> None:
        backend, app = steady_app(tmp_path, waiting=1, seconds=0.2)
        stream = Asked(app, stream=True, partial_images=1)
        await stream.task
        assert "event: error" in str(stream)
        assert backend.given_up == 1
        backend.go.set()
        assert await Asked(app).status() == 200

    asyncio.run(talk())


def test_a_client_that_leaves_its_stream_gives_back_the_place(tmp_path: Path) -> None:
    async def talk() -> None:
        backend, app = steady_app(tmp_path, waiting=1)
        stream = Asked(app, stream=True, partial_images=1)
        await stream.until("image_generation.partial_image")
        stream.task.cancel()
        with suppress(asyncio.CancelledError):
            await stream.task
        await asyncio.sleep(0)
        assert backend.given_up == 1
        backend.go.set()
        assert await Asked(app).status() == 200

    asyncio.run(talk())


def test_the_images_beside_one_that_fails_are_given_up(tmp_path: Path) -> None:
    async def talk() -> None:
        backend, app = steady_app(tmp_path)
        failed = Asked(app, n=4, seed=0)
        assert await failed.status() == 400
        assert "this seed can't be drawn" in str(failed)
        assert backend.given_up == 3
        late = Asked(steady_app(tmp_path, seconds=0.1)[1], n=2, seed=0)
        assert await late.status() == 503

    asyncio.run(talk())
