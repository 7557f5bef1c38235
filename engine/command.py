"""`boostdiff generate` and `boostdiff doctor`: parse, configure, one library call, print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import embedded
from .config import GenerateConfig
from .options import DeviceOption, JsonOption, OutputOption, config_from, options_of
from .terminal import console, print_json, progress_bar, quiet_libraries


@options_of(GenerateConfig)
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw, one image per prompt.")],
    output: OutputOption = Path("outputs/images"),
    count: Annotated[int, typer.Option(min=1, max=10**6, help="Images per prompt.")] = 1,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Draw images with the student in one pass per step; with [bold]--teacher[/], in two."""
    quiet_libraries()
    from .generate import draw, resolve
    from .model import locate

    config = config_from(GenerateConfig, options, prompts=[prompt for prompt in prompts for _ in range(count)])
    files = None if config.on_engine else locate(embedded.MODEL_NAME if config.model is None else config.model)
    config = resolve(files, config)
    action = "compiling, then drawing" if config.runner == "compiled" else "drawing"
    notes: list[str] = []
    with progress_bar(action, config.total_steps) as advance:
        paths = draw(files, config, output=output, device=device, on_step=advance, on_note=notes.append)
    for note in notes:
        console.print(note, style="yellow", markup=False)
    if as_json:
        print_json({"images": [str(path) for path in paths], "notes": notes})
        return
    console.print(f"{len(paths)} image{'s' * (len(paths) > 1)} in [bold]{output}[/]: {paths[0].name} …")


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine can run, and what to install for the rest."""
    quiet_libraries()
    from .doctor import examine, table

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    Console().print(table(findings))
