"""The command line: registers the commands, and ends with one line where one fails."""

from __future__ import annotations

from typing import Annotated

import typer

from . import __version__
from .benchmarks import command as bench
from .distill.command import distill
from .engine.command import doctor, generate
from .engine.terminal import run
from .export.command import export
from .serve.command import serve

app = typer.Typer(
    name="boostdiff",
    help="Distill classifier-free guidance into one pass: train, merge, export, prove.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"boostdiff {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Distill classifier-free guidance into one pass: train, merge, export, prove."""


app.command()(distill)
app.command()(export)
app.add_typer(bench.app, name="bench")
app.command()(generate)
app.command()(serve)
app.command()(doctor)


def main() -> None:
    """Entry point: errors end as one line on standard error and exit code 1 or 2."""
    run(app)
