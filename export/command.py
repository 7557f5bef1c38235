"""`boostdiff export`: parse, configure, one library call, print."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..engine import embedded
from ..engine.options import (
    ENGINE_FOLDER,
    STUDENT_FOLDER,
    DeviceOption,
    JsonOption,
    ModelOption,
    OutputOption,
    StudentOption,
    config_from,
    options_of,
)
from ..engine.terminal import console, next_command, print_json, quiet_libraries
from .config import ExportConfig


@options_of(ExportConfig)
def export(
    model: ModelOption = embedded.MODEL_NAME,
    student: StudentOption = STUDENT_FOLDER,
    output: OutputOption = ENGINE_FOLDER,
    force: Annotated[bool, typer.Option("--force", help="Export again even if nothing has changed.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Merge the student into the denoiser; export the pipeline to ONNX and TensorRT, compared with torch before use."""
    quiet_libraries()
    from ..engine.model import locate
    from .export import export as run

    config, files = config_from(ExportConfig, options), locate(model)
    status = console.status("exporting")

    def report(message: str) -> None:
        # Not before: under it the hub's own bars would not show.
        status.start()
        console.print(message, markup=False)

    try:
        manifest = run(files, config, student=student, output=output, device=device, force=force, report=report)
    finally:
        status.stop()
    if as_json:
        print_json(asdict(manifest))
        return
    following = next_command(
        "bench --steps 20",
        model=(model, embedded.MODEL_NAME),
        student=(student, STUDENT_FOLDER),
        engine=(output, ENGINE_FOLDER),
        prompts=("" if model == embedded.MODEL_NAME else "FILE", ""),
    )
    written, artefacts = escape(str(output)), ", ".join(manifest.artefacts)
    console.print(f"Engine in [bold]{written}[/]: {artefacts}\nNext: [bold]{escape(following)}[/]")
