"""What a server's configuration file holds: models, limits, and where images lie for a while.

It is the part `args` of an application in a configuration of Ray Serve: `serve deploy` and KubeRay take it, too.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..engine import embedded
from ..engine.config import EXPORTED
from ..engine.errors import InputError

KEY_VARIABLE = "BOOSTDIFF_API_KEY"
"""The environment variable that holds the key."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSettings(_Settings):
    """One model: an engine, a student in torch, or without either the two-pass teacher in torch.

    Attributes:
        name: name in the API; None takes the model's, without folders.
        engine: folder that `boostdiff export` wrote.
        student: folder that `boostdiff distill` wrote, in torch.
        model: model of the student or the teacher.
        runner: of an engine see `Engine.load`; else one of `generate.IN_TORCH`, "auto" being "torch".
        device: see `Engine.load`.
        precision: of an engine, likewise.
        max_batch: images drawn together; None takes `default_batch_size`.
        deployment: options of Ray Serve's deployment: `num_replicas`, `autoscaling_config`, `ray_actor_options`, …
    """

    name: str | None = Field(None, min_length=1, max_length=200, pattern=r"^[\w./:-]+$")
    engine: str | None = None
    student: str | None = None
    model: str = embedded.MODEL_NAME
    runner: Literal["auto", "torch", "captured", "compiled", "onnx", "tensorrt"] = "auto"
    device: str = "auto"
    precision: Literal["fp32", "fp16"] | None = None
    max_batch: int | None = Field(None, ge=1, le=1024)
    deployment: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if self.engine is not None and (self.student is not None or "model" in self.model_fields_set):
            raise ValueError("an engine includes its student and its model: leave student and model out")
        if self.runner != "auto" and (self.runner in EXPORTED) != (self.engine is not None):
            kinds = "onnx and tensorrt run engines; torch, captured and compiled run students and teachers"
            raise ValueError(f"the runner {self.runner} can't be used here: {kinds}")
        return self


class Limits(_Settings):
    """What one request may ask for.

    Attributes:
        prompt: characters of a prompt.
        images: images of a request, `n`.
        steps: sampling steps.
        body: bytes of a request.
        seconds: seconds from a request to its answer.
        waiting: images being drawn or waited for, over all requests that one API replica holds.
    """

    prompt: Annotated[int, Field(ge=1)] = 1000
    images: Annotated[int, Field(ge=1)] = 8
    steps: Annotated[int, Field(ge=1)] = 100
    body: Annotated[int, Field(ge=1024)] = 2**16
    seconds: Annotated[float, Field(gt=0)] = 120
    waiting: Annotated[int, Field(ge=1)] = 64


class ServerSettings(_Settings):
    """The whole server.

    Attributes:
        models: its models; the first is drawn by where a request names none.
        limits: what a request may ask for.
        storage: folder of images that are answered as a URL; of several nodes a shared one. None takes a temporary one
            of each API replica.
        url_seconds: lifetime of such an image.
        public_url: what the URLs of images begin with, such as "https://images.example.org", where a proxy stands in
            front. None takes what each request asked for.
        loopback: whether the server listens to this machine alone; a key is needed otherwise.
        api_replicas: replicas of what answers requests and hands them to the models.
    """

    models: list[ModelSettings] = Field(min_length=1)
    limits: Limits = Limits()
    storage: str | None = None
    url_seconds: float = Field(3600, gt=0)
    public_url: str | None = None
    loopback: bool = False
    api_replicas: int = Field(1, ge=1)

    @field_validator("public_url")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            # A port that is no number raises when it is read.
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or re.search(r"[\s?#@\\]", value):
            raise ValueError("pass a URL such as https://images.example.org")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _one_storage(self) -> ServerSettings:
        if self.api_replicas > 1 and self.storage is None:
            raise ValueError("api_replicas above 1 need a storage: one would not find an image that another has kept")
        return self


def parse_settings(values: Any) -> ServerSettings:
    """Settings from plain values.

    Raises:
        InputError: a value can't be used.
    """
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        raise InputError(f"the server's settings can't be used: {first_of(error)}") from None


def first_of(error: ValidationError) -> str:
    """The first of pydantic's complaints, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'args'}: {first['msg']}"


def api_key(*, loopback: bool) -> str | None:
    """The key that requests must show.

    Raises:
        InputError: there is none, and others than this machine may ask.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not loopback:
        raise InputError(f"anyone may ask on that address: set {KEY_VARIABLE} to a key, or bind to 127.0.0.1")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
