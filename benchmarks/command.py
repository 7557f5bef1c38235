"""`boostdiff bench`, and its subcommands `table1`, `sweep` and `compare`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engine import embedded
from ..engine.errors import InputError
from ..engine.files import prepare_output
from ..engine.options import DeviceOption, EngineOption, JsonOption, ModelOption, OutputOption, config_from, options_of
from ..engine.terminal import console, print_json, progress_bar, quiet_libraries
from .config import BenchConfig, Metrics, SweepConfig, Table1Config

if TYPE_CHECKING:
    from .bench import BenchResult

app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")

StudentsOption = Annotated[
    list[Path] | None,
    typer.Option("--student", help="Student folder; repeat it to compare more.", show_default="outputs/student"),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="One prompt per line, or a COCO captions JSON.", show_default="emoji64's held-out prompts"
    ),
]
OUTPUT = Path("outputs/bench")

QUALITY = ("samples", "sampling_batch_size", "alternatives", *(field.name for field in fields(Metrics)))
"""Options that speed alone does not use."""

TRAINED = ("student", "engine", "prompts", "guidance")
"""Options that random weights do not use."""


def _refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options that were given and would not be used.

    Raises:
        InputError: one was given.
    """
    for name in names:
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            option = f"--{name.replace('as_json', 'json').replace('_', '-')}"
            raise InputError(f"{option} {reason}")


def _prompts(model: str, prompts: Path | None) -> list[str]:
    """Prompts of a file; without one, those that the embedded model brings."""
    from ..engine.prompts import read_prompts

    if prompts is None and model != embedded.MODEL_NAME:
        raise InputError("pass --prompts FILE: only the embedded model brings prompts of its own")
    return read_prompts(prompts or embedded.HELD_OUT_PROMPTS)


@app.callback()
@options_of(BenchConfig, Metrics)
def bench(
    context: typer.Context,
    *,
    model: ModelOption = embedded.MODEL_NAME,
    student: StudentsOption = None,
    engine: EngineOption = Path("outputs/engine"),
    output: OutputOption = OUTPUT,
    prompts: PromptsOption = None,
    speed_only: Annotated[bool, typer.Option("--speed-only", help="Leave quality out.")] = False,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Speed from a model's configuration alone: no weights, no student, no engine."
        ),
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Measure the student against the two-pass teacher: speed on every runner here, and image quality."""
    if context.invoked_subcommand:
        _refuse(context, context.params, f"is an option of `bench` alone: put it after `{context.invoked_subcommand}`")
        return
    if random_weights:
        _refuse(context, (*QUALITY, *TRAINED), "has no use with --random-weights, which measures speed alone")
    if speed_only:
        _refuse(context, QUALITY, "has no use with --speed-only")
    quiet_libraries()
    config = config_from(BenchConfig, options, **({"samples": 0} if speed_only or random_weights else {}))
    metrics = Metrics() if not config.samples else config_from(Metrics, options).for_model(model)
    from ..engine.model import locate
    from .bench import bench as measure
    from .bench import bench_random
    from .report.report import REPORT_FILES, replaced_files, terminal_report, write_report
    from .speed.random_weights import locate_configs

    students = student or [Path("outputs/student")]
    with progress_bar("measuring", config.denoised(len(students)) or 1) as advance:

        def report(message: str) -> None:
            advance(0, note=message)

        if random_weights:
            files = locate_configs(model)
            prepare_output(output)
            result: BenchResult | None = bench_random(files, config, device=device, report=report)
        else:
            files, lines = locate(model), _prompts(model, prompts)
            prepare_output(output)
            result = measure(
                files,
                config,
                students=students,
                engine=engine,
                prompts=lines,
                metrics=metrics,
                cache=output / "cache",
                device=device,
                report=report,
                on_images=lambda name, count: advance(count, note=name),
            )
    # Of several processes that were launched, only the first has a result.
    if result:
        with replaced_files(output, REPORT_FILES) as folder:
            write_report(result, folder)
        if as_json:
            print_json(result.as_json())
            return
        console.print(terminal_report(result))
        console.print(f"Report: [bold]{output / 'report.html'}[/]")


def _grid_command(name: str, kind: type[Table1Config] | type[SweepConfig], summary: str) -> None:
    """Register a subcommand that measures a table of distances."""

    @app.command(name, help=summary)
    @options_of(kind, Metrics)
    def measured(
        model: ModelOption = embedded.MODEL_NAME,
        student: StudentsOption = None,
        output: OutputOption = OUTPUT,
        prompts: PromptsOption = None,
        device: DeviceOption = "auto",
        as_json: JsonOption = False,
        **options: Any,
    ) -> None:
        quiet_libraries()
        config, metrics = config_from(kind, options), config_from(Metrics, options).for_model(model)
        from ..engine.model import locate
        from .report.grids import terminal_grid, write_grid
        from .table1 import measure_grid

        students = student or [Path("outputs/student")]
        with progress_bar("measuring", config.denoised(len(students)) or 1) as advance:
            files, lines = locate(model), _prompts(model, prompts)
            prepare_output(output)
            grid = measure_grid(
                files,
                config,
                students=students,
                prompts=lines,
                metrics=metrics,
                cache=output / "cache",
                device=device,
                on_images=lambda name, count: advance(count, note=name),
            )
        if grid is None:
            return
        write_grid(grid, output)
        if as_json:
            print_json(grid.as_json())
            return
        console.print(terminal_grid(grid))
        console.print(f"Table: [bold]{output / f'{grid.name}.html'}[/]")


_grid_command(
    "table1", Table1Config, "The paper's Table 1: distances of teacher and students, over samplers and steps."
)
_grid_command("sweep", SweepConfig, "Distances of teacher and students over guidance scales.")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A report.json of `boostdiff bench`.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two reports."""
    quiet_libraries()
    from .report.compare import compare_reports
    from .report.report import terminal_comparison

    comparison = compare_reports(first, second)
    if as_json:
        print_json(asdict(comparison))
    else:
        console.print(terminal_comparison(comparison))
