"""`boostdiff distill`: parse, configure, one library call, print."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..engine import embedded
from ..engine.options import (
    STUDENT_FOLDER,
    DeviceOption,
    JsonOption,
    ModelOption,
    OutputOption,
    config_from,
    options_of,
)
from ..engine.terminal import console, is_main_process, next_command, print_json, progress_bar, quiet_libraries
from .config import DistillConfig, RunConfig, parse_guidance


@options_of(DistillConfig, RunConfig)
def distill(
    model: ModelOption = embedded.MODEL_NAME,
    output: OutputOption = STUDENT_FOLDER,
    guidance: Annotated[
        str,
        typer.Option(
            metavar="W|LOW:HIGH",
            help="Guidance scale w to distill in, or the range of a guidance-conditioned student.",
        ),
    ] = str(DistillConfig.guidance),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration; read no weights.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Train an adapter that makes one pass predict what guided sampling predicts."""
    quiet_libraries()
    from ..engine.files import check_output
    from ..engine.model import locate, resolve_device
    from ..engine.student import INFO_FILE
    from .distill import distill as train
    from .distill import dry_run as resolved_settings
    from .distill import resolve
    from .few_steps import STAGES
    from .loop import Observers, UpdateReport
    from .run_folder import PREVIEW_FILE, refuse_loss_of_files, refuse_loss_of_inputs

    low, high = parse_guidance(guidance)
    config = config_from(DistillConfig, options, guidance=low, guidance_max=high)
    execution = config_from(RunConfig, options)
    files = locate(model, weights=not dry_run)
    target = resolve_device(device)
    resolved = resolve(config, files, target)
    if dry_run:
        check_output(output, replaces=INFO_FILE)
        refuse_loss_of_inputs(output, resolved, execution)
        if not execution.resume:
            refuse_loss_of_files(output)
        print_json({"model": model, "output": str(output), **resolved_settings(files, resolved, execution, target)})
        return
    updates = (resolved.updates or 0) + len(resolved.stages) * (resolved.stage_updates or 0)
    with progress_bar(f"distilling {resolved.method}", updates) as advance:

        def show(done: UpdateReport) -> None:
            speed = f"{done.images_per_second:.1f} images/s, {done.peak_memory / 2**30:.1f} GB"
            stage = f"{done.steps} steps: " if done.steps else ""
            advance(note=f"{stage}loss {done.loss:.3g}, {_explained(done.guidance_r2)}{speed}")

        observers = Observers(
            # Wrong data shows in the first update: no bar before it.
            on_start=lambda done: advance(done) if done else None,
            on_update=show,
            on_note=lambda note: console.print(note, style="yellow", markup=False),
        )
        # Not resolved: which options were given matters to a run that has ended.
        info = train(files, config, execution, output=output, device=device, observers=observers)
    if not is_main_process():
        return
    if as_json:
        print_json({"output": str(output), **asdict(info)})
        return
    following = next_command("export --trt", model=(model, embedded.MODEL_NAME), student=(output, STUDENT_FOLDER))
    preview = f"; preview: {escape(str(output / PREVIEW_FILE))}" if (output / PREVIEW_FILE).exists() else ""
    # Of few steps that of the last stage is one part; stages from before there was such a figure have none.
    seconds = sum(each.get("seconds") or 0 for each in info.result.get(STAGES, [info.result]))
    console.print(
        f"Student of {info.trainable_parameters:,} parameters in [bold]{escape(str(output))}[/] "
        f"({_explained(info.result.get('guidance_r2'))}{seconds:.0f} s){preview}\n"
        f"Next: [bold]{escape(following)}[/]"
    )


def _explained(r2: float | None) -> str:
    """R² of the guidance term, to stand before other things; nothing where guidance changes nothing."""
    return "" if r2 is None else f"R² {r2:.2f}, "
