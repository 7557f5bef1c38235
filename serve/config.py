"""The options of `boostdiff serve`.

Nothing here imports Ray or FastAPI: the help of a command must not wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..engine import embedded
from ..engine.config import EXPORTED
from ..engine.errors import InputError
from ..engine.options import ENGINE_FOLDER, check_options, refuse_unused

IMPORT_PATH = "boostdiff.serve.deployment:build"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What to serve, and where; an InputError where a value can't be used, or would not be used."""

    config: Annotated[
        Path | None,
        typer.Option(show_default="none", help="YAML of Ray Serve that says all of this for several models."),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(show_default="start one here", help="Ray cluster to serve on: auto or HOST:PORT."),
    ] = None
    engine: Annotated[
        Path | None, typer.Option(show_default=str(ENGINE_FOLDER), help="Folder that `boostdiff export` wrote.")
    ] = None
    student: Annotated[
        Path | None,
        typer.Option(show_default="none", help="Folder that `boostdiff distill` wrote: serve it in torch, no engine."),
    ] = None
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Also serve the two-pass teacher in torch, to compare with.")
    ] = False
    model: Annotated[
        str | None,
        typer.Option(
            show_default="emoji64", help="Model of a teacher, or of a student in torch; an engine includes its own."
        ),
    ] = None
    runner: Annotated[
        Literal["auto", "onnx", "tensorrt", "torch", "captured", "compiled"] | None,
        typer.Option(
            show_default="tensorrt where it runs, else onnx; torch",
            help="What executes the engine: onnx, tensorrt; or --student, and a teacher beside it: torch, captured (a "
            "CUDA graph of it), compiled (torch.compile, slow to start).",
        ),
    ] = None
    precision: Annotated[
        Literal["fp32", "fp16"] | None,
        typer.Option(show_default="what the device is faster at", help="Precision of the onnx runner."),
    ] = None
    replicas: Annotated[int, typer.Option(min=1, max=1024, help="Processes that draw, of each model.")] = 1
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, max=1024, show_default="8, fewer above 512 pixels", help="Images drawn together."),
    ] = None
    max_steps: Annotated[int, typer.Option(min=1, help="Sampling steps that a request may ask for.")] = 100
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Images drawn or waited for; a request beyond them is answered with 503.")
    ] = 64
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up.")] = 120.0
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but the loopback (localhost) needs BOOSTDIFF_API_KEY.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000
    public_url: Annotated[
        str | None,
        typer.Option(show_default="what a request asked for", help="What image URLs begin with, behind a proxy."),
    ] = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.config is not None:
            others = [name for name in vars(self) if name not in ("config", "address")]
            refuse_unused(self, "with --config, whose file says it", *others)
        if self.student is not None:
            refuse_unused(self, "with --student, which runs in torch", "engine", "precision")
            if self.runner in EXPORTED:
                raise InputError(
                    f"--runner {self.runner} runs engines: pass torch, captured or compiled with --student"
                )
        elif self.runner not in (None, "auto", *EXPORTED):
            raise InputError(f"--runner {self.runner} runs students in torch: pass --student, or onnx or tensorrt")
        elif not self.teacher:
            refuse_unused(self, "without --student or --teacher: an engine holds its model", "model")

    def settings(self, *, deployment: dict[str, Any]) -> dict[str, Any]:
        """As the YAML's `args` would say it; `deployment` is what each replica takes of the machine."""
        common: dict[str, Any] = {
            "max_batch": self.max_batch,
            "deployment": {**deployment, "num_replicas": self.replicas},
        }
        in_torch: dict[str, Any] = common | ({} if self.model is None else {"model": absolute(self.model)})
        if self.student is not None:
            in_torch |= {"runner": self.runner or "auto"}
            models = [in_torch | {"student": str(self.student.resolve())}]
        else:
            engine = (self.engine or ENGINE_FOLDER).resolve()
            models = [common | {"engine": str(engine), "runner": self.runner or "auto", "precision": self.precision}]
        limits = {"steps": self.max_steps, "waiting": self.max_waiting, "seconds": self.timeout}
        models += [in_torch] if self.teacher else []
        return {"models": models, "limits": limits, "public_url": self.public_url}


def absolute(model: str) -> str:
    """A model as replicas find it, which run in folders of their own; the embedded one and hub ids stay."""
    return str(Path(model).resolve()) if model != embedded.MODEL_NAME and Path(model).is_dir() else model


def read_config(values: Any, path: Path) -> tuple[dict[str, Any], str, int]:
    """The settings of a configuration of Ray Serve, its host and its port.

    Raises:
        InputError: it holds another application, or what is not read here.
    """
    applications = values.get("applications") if isinstance(values, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise InputError(f"{path} is no configuration of Ray Serve with one application")
    application, http = applications[0], values.get("http_options", {})
    args = application.get("args")
    if application.get("import_path") != IMPORT_PATH or not isinstance(args, dict) or not isinstance(http, dict):
        raise InputError(f"{path} must have an application of import_path {IMPORT_PATH} with args")
    unread = (values.keys() - {"applications", "http_options"}) | (application.keys() - {"import_path", "name", "args"})
    # A key of YAML may be a number.
    unread = {str(name) for name in unread} | {f"http_options.{name}" for name in http.keys() - {"host", "port"}}
    if unread:
        raise InputError(
            f"{path} has {', '.join(sorted(unread))}, which is not read here: leave it out (options of deployments "
            "belong to args.models), or pass the file to Ray's `serve deploy`"
        )
    host, port = http.get("host", "127.0.0.1"), http.get("port", 8000)
    if not isinstance(host, str) or type(port) is not int or not 1 <= port <= 65535:
        raise InputError(f"the http_options in {path} can't be used: pass a host and a port")
    return args, host, port
