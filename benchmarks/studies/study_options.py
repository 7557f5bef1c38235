"""Options that the studies share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Work = Annotated[Path, typer.Option("--work", help="Folder for students, features and results.")]
Samples = Annotated[int, typer.Option("--samples", min=4, help="Images of each row (N).")]
Sampler = Annotated[str, typer.Option("--sampler", help="ddim, dpm++, unipc or euler.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")]
Runs = Annotated[int, typer.Option("--runs", min=3, help="Timed batches of each row.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, …")]
Configuration = Annotated[
    str, typer.Argument(help="sd15, sd21-base, sdxl, or a folder with a pipeline's configuration.")
]
GradientCheckpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations.")]

TAKES_TRAINING_OPTIONS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands that train: options after `--` go to `boostdiff distill`."""


def numbers(text: str) -> list[float]:
    """`1.5,3,5` to numbers."""
    return [float(part) for part in text.split(",")]
