"""`boostdiff bench`, and its subcommands `table1`, `sweep`, `compose` and `compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..engine import embedded
from ..engine.errors import InputError
from ..engine.files import check_output
from ..engine.options import (
    ENGINE_FOLDER,
    STUDENT_FOLDER,
    DeviceOption,
    EngineOption,
    JsonOption,
    ModelOption,
    OutputOption,
    config_from,
    options_of,
)
from ..engine.terminal import console, print_json, progress_bar, quiet_libraries
from .config import BenchConfig, ComposeConfig, Metrics, SamplingConfig, SweepConfig, Table1Config

app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")

StudentsOption = Annotated[
    list[Path] | None,
    typer.Option("--student", help="Student folder; repeat it to compare more.", show_default=str(STUDENT_FOLDER)),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="File of prompts: one per line, JSON lines, CSV or COCO captions.",
        show_default="emoji64's held-out prompts",
    ),
]
OUTPUT = Path("outputs/bench")

QUALITY = ("samples", "sampling_batch_size", "alternatives", *(field.name for field in fields(Metrics)))
"""Options that speed alone does not use."""

TRAINED = ("student", "engine", "precision", "prompts", "guidance")
"""Options that random weights do not use."""


def _refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options that were given and would not be used."""
    for name in names:
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            option = f"--{name.replace('as_json', 'json').replace('_', '-')}"
            raise InputError(f"{option} {reason}")


def _measure(
    verb: Callable[..., Any],
    config: SamplingConfig,
    *,
    model: str,
    students: list[Path] | None,
    prompts: Path | None,
    output: Path,
    written: Sequence[str],
    **more: Any,
) -> Any:
    """Call `bench`, `measure_grid` or `compose` under a progress bar; `written` names the files of its result."""
    from ..engine.model import locate
    from ..engine.prompts import read_prompts
    from .report.output_folder import check_replaceable
    from .session import with_sampling

    students, files = students or [STUDENT_FOLDER], locate(model)
    # An engine may run in two precisions.
    compared = len(students) + 2 * len(more.get("engines", ()))
    if prompts is None and model != embedded.MODEL_NAME:
        raise InputError("pass --prompts FILE: only the embedded model comes with prompts")
    lines = read_prompts(prompts or embedded.HELD_OUT_PROMPTS)
    check_output(output)
    check_replaceable(output, written)
    config = with_sampling(config, students)
    with progress_bar("measuring", config.image_steps(compared) or 1) as advance:
        return verb(
            files,
            config,
            students=students,
            prompts=lines,
            cache=output / "cache",
            report=lambda message: advance(0, note=message),
            on_images=lambda name, count: advance(count, note=name),
            **more,
        )


def _show(result: Any, rendered: Callable[[Any], Any], what: str, written: Path, *, as_json: bool) -> None:
    """Print a result: what of prompts and reference was not used, its tables, and where it was written; or its JSON."""
    if as_json:
        print_json(result.as_json())
        return
    for note in result.provenance["notes"]:
        console.print(note, style="yellow", markup=False)
    console.print(rendered(result))
    console.print(f"{what}: [bold]{escape(str(written))}[/]")


@app.callback()
@options_of(BenchConfig, Metrics)
def bench(
    context: typer.Context,
    *,
    model: ModelOption = embedded.MODEL_NAME,
    student: StudentsOption = None,
    engine: EngineOption = ENGINE_FOLDER,
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
        _refuse(context, (*QUALITY, "seed"), "has no use with --speed-only")
    quiet_libraries()
    config = config_from(BenchConfig, options, **({"samples": 0} if speed_only or random_weights else {}))
    from .bench import bench as measure
    from .bench import bench_random
    from .report.output_folder import REPORT_FILES, check_replaceable
    from .report.report import terminal_report, write_report

    if random_weights:
        from .speed.random_weights import locate_configs

        with progress_bar("measuring", 1) as advance:
            files = locate_configs(model)
            check_output(output)
            check_replaceable(output, REPORT_FILES)
            result = bench_random(files, config, device=device, report=lambda message: advance(0, note=message))
    else:
        metrics = config_from(Metrics, options).for_model(model) if config.samples else Metrics()
        more: dict[str, Any] = {"engine": engine, "metrics": metrics, "device": device, "written": REPORT_FILES}
        result = _measure(measure, config, model=model, students=student, prompts=prompts, output=output, **more)
    # Of several processes that were launched, only the first has a result.
    if result:
        write_report(result, output)
        _show(result, terminal_report, "Report", output / "report.html", as_json=as_json)


def _grid_command(name: str, settings: type[Table1Config] | type[SweepConfig], summary: str) -> None:
    """Register a subcommand that measures a table of distances."""

    @app.command(name, help=summary)
    @options_of(settings, Metrics)
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
        config = config_from(settings, options)
        from .report.grids import terminal_grid, write_grid
        from .report.output_folder import files_of
        from .table1 import measure_grid

        metrics = config_from(Metrics, options).for_model(model)
        more: dict[str, Any] = {"metrics": metrics, "device": device, "written": files_of(name)}
        grid = _measure(measure_grid, config, model=model, students=student, prompts=prompts, output=output, **more)
        if grid:
            write_grid(grid, output)
            _show(grid, terminal_grid, "Table", output / f"{grid.name}.html", as_json=as_json)


_grid_command(
    "table1", Table1Config, "The paper's Table 1: distances of teacher and students, over samplers and steps."
)
_grid_command("sweep", SweepConfig, "Distances of teacher and students over guidance scales.")


@app.command()
@options_of(ComposeConfig, Metrics)
def compose(
    model: ModelOption = embedded.MODEL_NAME,
    student: StudentsOption = None,
    engine: Annotated[
        list[Path] | None,
        typer.Option("--engine", help="Engine folder of one of the students; repeat it for more.", show_default="none"),
    ] = None,
    output: OutputOption = OUTPUT,
    prompts: PromptsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """What to take: quality beside time per image, over steps, students, engines and what needs no training."""
    quiet_libraries()
    config = config_from(ComposeConfig, options)
    metrics, engines = config_from(Metrics, options).for_model(model), engine or []
    from .compose import compose as measure
    from .report.composed import NAME, terminal_composed, write_composed
    from .report.output_folder import files_of

    more: dict[str, Any] = {"engines": engines, "metrics": metrics, "device": device, "written": files_of(NAME)}
    result = _measure(measure, config, model=model, students=student, prompts=prompts, output=output, **more)
    write_composed(result, output)
    _show(result, terminal_composed, "Table", output / "compose.html", as_json=as_json)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A report.json of `boostdiff bench`.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two reports."""
    quiet_libraries()
    from .report.compare import compare_reports, terminal_comparison

    comparison = compare_reports(first, second)
    if as_json:
        print_json(asdict(comparison))
    else:
        console.print(terminal_comparison(comparison))
