"""`boostdiff generate` and `boostdiff doctor`: parse, configure, one library call, print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import embedded
from .config import GenerateConfig
from .errors import BoostDiffError, InputError
from .options import DeviceOption, JsonOption, config_from, options_of
from .terminal import console, print_json, progress_bar, quiet_libraries
from .versions import is_installed, to_install

if TYPE_CHECKING:
    from .shards import Job


@options_of(GenerateConfig)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw, one image per prompt.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", show_default="none", help="File of prompts: one a line, JSON lines, CSV or COCO captions."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(show_default="outputs/images; outputs/shards", help="Folder to write."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=10**6, help="Images per prompt.")] = 1,
    shard_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**6,
            show_default="PNG files; 1000 with --ray",
            help="Write WebDataset shards of so many images; shards that are there are not drawn again.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            show_default="none",
            help="Draw shards over a Ray cluster: auto or HOST:PORT; local starts Ray here.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**4, show_default="one per GPU, or per machine", help="Processes of --ray that draw."
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Draw images with the student in one pass per step; with [bold]--teacher[/], in two."""
    quiet_libraries()
    from .generate import device_for, draw, resolve
    from .model import locate
    from .prompts import read_prompts
    from .shards import Job

    if not prompts and prompt_file is None:
        raise InputError("there is nothing to draw: pass prompts, or a file of them with --prompts")
    if prompts and prompt_file is not None:
        raise InputError("pass prompts or --prompts FILE, not both")
    if workers is not None and address is None:
        raise InputError("--workers is for --ray")
    if address is not None and not is_installed("ray"):
        raise BoostDiffError(f"Ray is not installed: {to_install('serve')}")
    texts = prompts or read_prompts(prompt_file or Path())
    config = config_from(GenerateConfig, options, prompts=[prompt for prompt in texts for _ in range(count)])
    files = None if config.on_engine else locate(embedded.MODEL_NAME if config.model is None else config.model)
    config = resolve(files, config)
    if files is not None and not address:
        # Shards are compared with the model's weights before any is drawn.
        device_for(config.runner, files.family, device)
    if address is not None or shard_size is not None:
        job = Job(
            files=files,
            config=config,
            output=output or Path("outputs/shards"),
            device=device,
            shard_size=shard_size or 1000,
        )
        _generate_shards(job, address=address, workers=workers, as_json=as_json)
        return
    output = output or Path("outputs/images")
    action = "compiling, then drawing" if config.runner == "compiled" else "drawing"
    notes: list[str] = []
    with progress_bar(action, config.total_steps) as advance:
        paths = draw(files, config, output=output, device=device, on_step=advance, on_note=notes.append)
    for note in notes:
        console.print(note, style="yellow", markup=False)
    if as_json:
        print_json({"images": [str(path) for path in paths], "notes": notes})
        return
    folder = escape(str(output))
    console.print(f"{len(paths)} image{'s' * (len(paths) > 1)} in [bold]{folder}[/]: {escape(paths[0].name)} …")


def _generate_shards(job: Job, *, address: str | None, workers: int | None, as_json: bool) -> None:
    from .shards import draw_shards, prepared

    with prepared(job) as shards, progress_bar("drawing", job.config.total_steps) as advance:

        def on_shard(shard: int) -> None:
            advance(job.steps_in(shard))

        for shard in set(range(len(job))) - set(shards):
            on_shard(shard)
        if address is None or not shards:
            truncated = draw_shards(job, shards, advance) if shards else 0
        else:
            from .ray_workers import draw_on_cluster

            truncated = draw_on_cluster(job.absolute(), shards, address=address, workers=workers, on_shard=on_shard)
    if truncated:
        note = f"{truncated} of the prompts drawn are cut: they have more tokens than the text encoder takes"
        console.print(note, style="yellow")
    if as_json:
        paths = [str(job.path(shard)) for shard in range(len(job))]
        print_json({"shards": paths, "drawn": len(shards), "cut": truncated})
        return
    images = f"{len(job.config.prompts)} images in {len(job)} shards"
    console.print(f"{images} in [bold]{escape(str(job.output))}[/], {len(shards)} of them drawn now")


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine can run, and what to install for the rest."""
    quiet_libraries()
    from .doctor import examine, table

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    Console(emoji=False).print(table(findings))
