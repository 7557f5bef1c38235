"""What stands around the API's application: who may ask, how large a body may be and how long it may take."""

from __future__ import annotations

import asyncio
import hmac
import re
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .settings import is_loopback

OPEN_PATHS = re.compile(r"/|/health|/v1/images/files/[\w-]+\.png")
"""What needs no key: the page, the health, and images under names that can't be guessed."""

BODY_SECONDS = 30.0
"""Seconds from a request's headers to the end of its body."""


def error_answer(status: int, message: str, *, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 408:
        # The rest of its body would be taken for the next request, or waited for.
        headers["Connection"] = "close"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)


@dataclass
class Traffic:
    """Requests of one process.

    Attributes:
        ongoing: those that have not been answered to the end.
        closed: whether further ones are refused, as the server stops.
    """

    ongoing: int = 0
    closed: bool = False


class Guard:
    """Around the application: the key, size and time of bodies, and on the loopback the name that was asked for."""

    def __init__(self, app: Any, *, key: str | None, body: int, loopback: bool, traffic: Traffic) -> None:
        self.app, self.key, self.body, self.loopback, self.traffic = app, key, body, loopback, traffic

    def _refusal(self, scope: Any) -> JSONResponse | None:
        if self.traffic.closed:
            return error_answer(503, "the server is stopping", code="stopping")
        headers = dict(scope["headers"])
        host = re.sub(r":\d*$", "", headers.get(b"host", b"localhost").decode("latin-1")).strip("[]")
        if self.loopback and self.key is None and not is_loopback(host):
            # Another site's name that leads to this machine: its scripts may not draw here (DNS rebinding).
            return error_answer(403, "this server answers requests to localhost only", code="forbidden_host")
        if self.key is not None and not OPEN_PATHS.fullmatch(scope["path"]):
            scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self.key.encode()):
                return error_answer(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return error_answer(400, "Content-Length is not a number")
        return self._too_large() if len(length) > 18 or int(length) > self.body else None

    def _too_large(self) -> JSONResponse:
        return error_answer(413, f"the request has more than {self.body} bytes", code="request_too_large")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await refusal(scope, receive, send)
            return
        received = 0
        deadline: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Any:
            nonlocal received, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request's body took more than {BODY_SECONDS:g} seconds") from None
            if not message.get("more_body"):
                # What follows is that the client leaves, sooner or later.
                deadline = None
            received += len(message.get("body", b""))
            if received > self.body:
                raise HTTPException(413, f"the request has more than {self.body} bytes")
            return message

        self.traffic.ongoing += 1
        try:
            await self.app(scope, limited, send)
        finally:
            self.traffic.ongoing -= 1
