"""Figures of the docs, and others that few need: `python -m boostdiff.benchmarks.studies NAME …`."""

from __future__ import annotations

import typer

from ...engine.terminal import quiet_libraries, run

# Before the imports below, at which libraries warn.
quiet_libraries()

from . import (  # noqa: E402
    few_steps_study,
    full_size,
    guidance_study,
    int8,
    layouts,
    profile,
    seeds,
    serving,
)
from .held_out import TAKES_TRAINING_OPTIONS  # noqa: E402

app = typer.Typer(
    name="studies",
    help="Figures of the docs, and others that few need.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    callback=quiet_libraries,
)
app.command(context_settings=TAKES_TRAINING_OPTIONS)(seeds.seeds)
for study in (
    few_steps_study.few_steps,
    guidance_study.guidance_r2,
    guidance_study.effective_guidance,
    int8.int8,
    profile.profile,
    profile.training_memory,
    layouts.layouts,
    full_size.random_folder,
    full_size.full_size,
    serving.serve,
):
    app.command()(study)

if __name__ == "__main__":
    run(app)
