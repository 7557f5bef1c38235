"""What the studies share: options, Markdown tables, and the embedded model's held-out prompts.

What is sampled is kept in a study's folder: one that was interrupted goes on.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ...engine import embedded
from ...engine.errors import InputError
from ...engine.files import read_json, write_json
from ...engine.model import locate
from ...engine.options import STEPS
from ...engine.prompts import read_prompts
from ..config import BenchConfig, Metrics, comma_separated
from ..quality.samples import SampleCache
from ..session import Session, with_sampling

Work = Annotated[Path, typer.Option("--work", help="Folder for students and sampled features.")]
Samples = Annotated[int, typer.Option("--samples", min=4, help="Images per row (N).")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")]
Runs = Annotated[int, typer.Option("--runs", min=3, help="Timed batches per row.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, …")]
Scales = Annotated[str, typer.Option("--scales", help="Guidance scales of guidance-conditioned students.")]
Configuration = Annotated[
    str, typer.Argument(help="sd15, sd21-base, sdxl, or a folder with a pipeline's configuration.")
]

scales_of = comma_separated("--scales", float, "1.5,3,5")

TAKES_TRAINING_OPTIONS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands that train: options after `--` go to `boostdiff distill`."""


def trained(folder: Path, options: Sequence[str]) -> Path:
    """A student's folder; unless it is there, `boostdiff distill` is run with these options.

    The options are kept beside the folder; a student without them was put there by hand, and is taken as it is.
    """
    record = folder.with_name(f"{folder.name}.options.json")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Before the student: a run that is killed in between trains again.
        write_json(record, {"options": list(options)})
        command = [sys.executable, "-m", "boostdiff", "distill", "--output", str(folder), *options]
        subprocess.run(command, check=True)  # noqa: S603
    elif record.exists() and (known := read_json(record)["options"]) != list(options):
        raise InputError(f"{folder} was trained with {shlex.join(known)}: pass these again, or another --work")
    return folder


@contextmanager
def held_out(
    students: Sequence[Path], config: BenchConfig, *, work: Path | None = None, model: str = embedded.MODEL_NAME
) -> Iterator[tuple[Session, SampleCache]]:
    """The embedded model and students on the same held-out prompts, seeds and noise, and the cache of their samples.

    `model` is another one in its place, made for the same captions.
    """
    config = with_sampling(config, students)
    prompts, metrics = read_prompts(embedded.HELD_OUT_PROMPTS), Metrics().for_model(embedded.MODEL_NAME)
    files = locate(model)
    with Session.open(files, config, students=students, guidance=None, prompts=prompts, device="auto") as session:
        session = session.at(str(config.sampler), config.steps or STEPS)
        yield session, session.sample_cache(metrics, folder=work and work / "features")
