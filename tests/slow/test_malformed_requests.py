"""Thousands of requests that are wrong in ways that a seed decides: none may end in a 500, or show a path.

`REQUESTS=500` tries fewer. They reach the application as ASGI gives them, with headers that no client would send.
"""

import asyncio
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra dev has it")

from boostdiff.serve.api import ImagesRequest, make_app
from boostdiff.serve.loading import open_model
from boostdiff.serve.local import LocalBackend
from boostdiff.serve.settings import Limits, ModelSettings
from boostdiff.serve.url_files import UrlFiles

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("REQUESTS", "10000"))
NUMBERS: list[Any] = [-1, 0, 1, 2, 2**31, 2**62, 2**63, 2**64, 10**40, -(10**40), 1.5, 1e308, None, True]
TEXTS: list[Any] = [
    "",
    " ",
    "1",
    "a red cat",
    "auto",
    "url",
    "b64_json",
    "ddim",
    "euler",
    "tiny",
    "16x16",
    "0x0",
    "-1x5",
]
ODD: list[Any] = ["99999x99999", "16x16\n", "../../etc/passwd", "%s%n{0}", "\x00", "\u202e", "😀" * 40, "x" * 3000]
NESTED: list[Any] = [[], {}, [1], {"a": 1}, ["a red cat"], [[[[]]]]]
VALUES = [*NUMBERS, *TEXTS, *ODD, *NESTED]
FILES = "/v1/images/files/"
PATHS = ["/", "/health", "/metrics", "/v1/models", f"{FILES}x.png", f"{FILES}..%2f", "/openapi.json", "//", "/\xff"]
TYPES = [b"application/json; charset=utf-16", b"text/plain", b"multipart/form-data", b"", b"\xff\xfe", b"a/b/c"]
HEADERS = [b"host", b"authorization", b"content-length", b"content-encoding", b"transfer-encoding", b"range", b"cookie"]
RAW = [
    b"",
    b"\xff",
    b"0",
    b"-1",
    b"9" * 21,
    b"Bearer \xff",
    b"gzip",
    b"chunked",
    b"localhost",
    b"a b",
    b"[::1",
    b"x" * 5000,
]
WHOLE = [b"", b"null", b"NaN", b'"\\ud800"', b'{"prompt": "\\udfff"}', b"[" * 1500, b'{"a":' * 300]


def body_of(chance: random.Random) -> bytes:
    """A request's body: fields of odd values, of a byte changed, cut off, or no JSON at all."""
    fields: dict[str, Any] = {"prompt": "a red cat", "steps": 1}
    for name in chance.sample([*ImagesRequest.model_fields, "unknown"], chance.randint(0, 4)):
        fields[name] = chance.choice(VALUES)
    content = json.dumps(fields, ensure_ascii=chance.random() < 0.5).encode()
    match chance.randint(0, 9):
        case 0:
            return content[: chance.randrange(len(content))]
        case 1:
            position = chance.randrange(len(content))
            return content[:position] + chance.randbytes(chance.randint(1, 4)) + content[position + 1 :]
        case 2:
            return chance.choice(WHOLE)
        case 3:
            return content.decode().encode(chance.choice(["utf-16", "utf-32", "utf-8-sig"]))
    return content


def request_of(chance: random.Random) -> tuple[dict[str, Any], bytes]:
    body, plain = body_of(chance), chance.random() < 0.8
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json" if plain else chance.choice(TYPES))]
    if not plain:
        headers += [(chance.choice(HEADERS), chance.choice(RAW)) for _ in range(chance.randint(0, 3))]
    path = "/v1/images/generations" if chance.random() < 0.9 else chance.choice(PATHS)
    method = "POST" if chance.random() < 0.9 else chance.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "X" * 50])
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": chance.choice([b"", b"", b"a=%ff&b"]),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    return scope, body


async def answer_of(app: Any, scope: dict[str, Any], body: bytes, parts: int) -> tuple[int, bytes]:
    """Status and content; the body comes in so many parts."""
    size = len(body) // parts + 1
    chunks = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in chunks]
    messages[-1]["more_body"] = False
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_malformed_requests(engines: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(ModelSettings(engine=str(engines["lora"]), runner="onnx", device="cpu", name="tiny"))
    limits = Limits(prompt=500, images=2, steps=3, body=4000)
    app = make_app({"tiny": LocalBackend(model)}, limits=limits, files=UrlFiles(tmp_path, seconds=60))
    chance, seen = random.Random(0), Counter[int]()

    async def all_of_them() -> None:
        for number in range(COUNT):
            scope, body = request_of(chance)
            status, content = await answer_of(app, scope, body, parts=chance.randint(1, 3))
            seen[status] += 1
            shown = f"request {number}: {scope} {body[:200]!r} gave {content[:300]!r}"
            assert status < 500, shown
            if status >= 400 and scope["method"] != "HEAD":
                assert not any(word in content for word in (b"Traceback", b".py", bytes(tmp_path.parent))), shown
                assert json.loads(content)["error"].keys() == {"message", "type", "param", "code"}, shown
        # It is alive, and draws.
        plain = json.dumps({"prompt": "a red cat", "steps": 1}).encode()
        scope |= {"method": "POST", "path": "/v1/images/generations"}
        scope["headers"] = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        status, content = await answer_of(app, scope, plain, 1)
        assert status == 200
        assert json.loads(content)["data"][0]["b64_json"]

    asyncio.run(all_of_them())
    print(dict(seen))
    # All kinds of answers were seen.
    assert {200, 400, 404, 405, 413} <= seen.keys()
