"""What the studies share: options, Markdown tables, and the embedded model's held-out prompts.

What is sampled is kept in a study's folder: one that was interrupted goes on.
"""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ...distill.command import distill
from ...engine import embedded
from ...engine.errors import BoostDiffError, InputError
from ...engine.files import check_output, read_json, write_json
from ...engine.model import ModelFiles, locate
from ...engine.options import SAMPLER, STEPS, check_not_empty
from ...engine.prompts import read_prompts
from ...engine.schedulers import check_steps
from ...engine.student import read_student
from ..config import BenchConfig, Metrics, comma_separated
from ..quality.samples import SampleCache
from ..session import Session, with_sampling
from ..speed.random_weights import PUBLIC


def usable_work(folder: Path) -> Path:
    """A study's folder, refused before any work if nothing can be written there."""
    check_output(folder, option="--work")
    return folder


Work = Annotated[Path, typer.Option("--work", help="Folder for students and sampled features.", callback=usable_work)]
Samples = Annotated[int, typer.Option("--samples", min=4, help="Images per row (N).")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")]
Runs = Annotated[int, typer.Option("--runs", min=3, help="Timed batches per row.")]
Scales = Annotated[str, typer.Option("--scales", help="Guidance scales of guidance-conditioned students.")]
Configuration = Annotated[
    str, typer.Argument(help=f"{', '.join(PUBLIC)}, or a folder with a pipeline's configuration.")
]

scales_of = comma_separated("--scales", float, "1.5,3,5", least=1)

TAKES_TRAINING_OPTIONS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands that train: options after `--` go to `boostdiff distill`."""


def check_training(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """The settings that `boostdiff distill` would train with, by its dry run, in this process; none if it has trained.

    Raises:
        InputError: it would refuse them.
    """
    if folder.exists():
        return {}
    app, words = typer.Typer(pretty_exceptions_enable=False), ["--output", str(folder), *options]
    app.command()(distill)
    check_not_empty(app, words)
    with redirect_stdout(io.StringIO()) as shown:
        app([*words, "--dry-run"], standalone_mode=False)
    settings: dict[str, Any] = json.loads(shown.getvalue())
    return settings


def trained(folder: Path, options: Sequence[str]) -> Path:
    """A student's folder; unless it is there, `boostdiff distill` is run with these options.

    The options are kept beside the folder; a student without them was put there by hand, and is taken as it is.

    Raises:
        InputError: the student there was trained with others.
        BoostDiffError: the training failed, and has said why.
    """
    record = folder.with_name(f"{folder.name}.options.json")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Before the student: a run that is killed in between trains again.
        write_json(record, {"options": list(options)})
        command = [sys.executable, "-m", "boostdiff", "distill", "--output", str(folder), *options]
        code = subprocess.run(command, check=False).returncode  # noqa: S603
        if code:
            record.unlink(missing_ok=True)
            raise BoostDiffError(f"`boostdiff {shlex.join(command[3:])}` failed with exit code {code}")
    elif record.exists() and (known := read_json(record)["options"]) != list(options):
        raise InputError(f"{folder} was trained with {shlex.join(known)}: pass these again, or another --work")
    return folder


def check_prompts(count: int, option: str = "--samples") -> list[str]:
    """The held-out prompts, which must be so many."""
    prompts = read_prompts(embedded.HELD_OUT_PROMPTS)
    if len(prompts) < count:
        raise InputError(f"{option} {count} needs as many prompts: there are {len(prompts)}")
    return prompts


def check_plan(config: BenchConfig, students: Sequence[Path] = (), *, model: str = embedded.MODEL_NAME) -> ModelFiles:
    """The model of a study; what can be refused of it, its students and its sampling is refused without any work."""
    files = locate(model)
    check_prompts(config.samples)
    infos = [read_student(folder, files, instead="another folder") for folder in students]
    config = with_sampling(config, students)
    spacing = next((info.timestep_spacing for info in infos if info.steps is not None), config.timestep_spacing)
    check_steps(files.scheduler_config, [str(config.sampler or SAMPLER)], [config.steps or STEPS], spacing=spacing)
    return files


@contextmanager
def held_out(
    students: Sequence[Path], config: BenchConfig, *, work: Path | None = None, model: str = embedded.MODEL_NAME
) -> Iterator[tuple[Session, SampleCache]]:
    """The embedded model and students on the same held-out prompts, seeds and noise, and the cache of their samples.

    `model` is another one in its place, made for the same captions.
    """
    files, config = check_plan(config, students, model=model), with_sampling(config, students)
    prompts, metrics = read_prompts(embedded.HELD_OUT_PROMPTS), Metrics().for_model(embedded.MODEL_NAME)
    with Session.open(files, config, students=students, guidance=None, prompts=prompts, device="auto") as session:
        session = session.at(str(config.sampler), config.steps or STEPS)
        yield session, session.sample_cache(metrics, folder=work and work / "features")
