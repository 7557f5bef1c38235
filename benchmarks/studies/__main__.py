"""What produced a figure of the docs: `python -m boostdiff.benchmarks.studies NAME …`."""

from __future__ import annotations

import typer

from ...engine.terminal import quiet_libraries, run
from ..speed.random_weights import random_folder
from . import full_size, guidance_study, profile, seeds
from .study_options import TAKES_TRAINING_OPTIONS

app = typer.Typer(
    name="studies",
    help="What produced a figure of the docs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    callback=quiet_libraries,
)
for study in (seeds.seeds, guidance_study.guidance_curve, guidance_study.guidance_parts):
    app.command(context_settings=TAKES_TRAINING_OPTIONS)(study)
app.command()(guidance_study.prediction_error)
app.command()(full_size.full_size)
app.command()(profile.profile)
app.command()(profile.training_memory)
app.command()(random_folder)

if __name__ == "__main__":
    run(app)
