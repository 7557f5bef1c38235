"""The command line: parse, configure, one library call, print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .distill.command import distill
from .engine import embedded
from .engine.command import doctor, generate
from .engine.errors import InputError
from .engine.terminal import console, print_json, progress_bar, quiet_libraries
from .engine.terminal import run as run_app
from .export.command import export

app = typer.Typer(
    name="boostdiff",
    help="Distill classifier-free guidance into one pass: train, merge, export, prove.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
ModelOption = Annotated[
    str, typer.Option("--model", help="The embedded model [bold]emoji64[/], a diffusers folder or a hub id.")
]
StudentOption = Annotated[Path, typer.Option("--student", help="Folder that `boostdiff distill` wrote.")]
EngineOption = Annotated[Path, typer.Option("--engine", help="Folder that `boostdiff export` wrote.")]
SamplerOption = Annotated[str, typer.Option("--sampler", help="ddim, dpm++, unipc or euler.")]
StepsOption = Annotated[int, typer.Option("--steps", help="Sampling steps.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


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


@app.command()
def bench(
    model: ModelOption = embedded.MODEL_NAME,
    student: Annotated[
        list[Path] | None,
        typer.Option("--student", help="Student folder; repeat it to compare more.", show_default="outputs/student"),
    ] = None,
    engine: EngineOption = Path("outputs/engine"),
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("outputs/bench"),
    steps: StepsOption = 20,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Of a range student.", show_default="what the student has learnt")
    ] = None,
    sampler: SamplerOption = "ddim",
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            "--batch-sizes",
            "--batch-size",
            help="Images made together for speed, such as 1,2,4,8,16.",
            show_default="on a CPU 8, else these",
        ),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", help="Timed batches of each.")] = 5,
    samples: Annotated[int, typer.Option("--samples", help="Images a row for quality (N).")] = 200,
    speed_only: Annotated[bool, typer.Option("--speed-only", help="Leave quality out.")] = False,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Speed from a model's configuration alone: no student, no engine."),
    ] = False,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Also run torch.compile.",
            show_default="on CUDA, and for small models on CPUs with bfloat16",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            "--captions",
            help="One prompt a line, or a COCO captions JSON.",
            show_default="emoji64's held-out prompts",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Folder of real images.", show_default="emoji64's own features"),
    ] = None,
    reference_size: Annotated[
        int | None,
        typer.Option("--reference-size", help="Cut real images of mixed sizes to one square of so many pixels."),
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option("--inception-weights", help="Weights of torch-fidelity's InceptionV3: FID in place of FD."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option("--clip", help="CLIP model, a folder or a hub id: adds CLIP scores.")
    ] = None,
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="Also judge what saves passes without training.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A.json B.json", help="Show what differs between two reports; measure none."),
    ] = None,
    table1: Annotated[
        bool, typer.Option("--table1", help="The paper's Table 1 in place of the report: distances, no speed.")
    ] = False,
    table1_samplers: Annotated[str, typer.Option("--table1-samplers", help="Its samplers.")] = "ddim,dpm++,unipc,euler",
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="Guidance scales, as 1,2,3,5: distances at each, no speed.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure the student against the two-pass teacher: speed on every runner here, and image quality."""
    quiet_libraries()
    from .benchmarks.bench import bench as run
    from .benchmarks.bench import bench_random
    from .benchmarks.config import BenchConfig, parse_batch_sizes
    from .benchmarks.quality.metrics import Metrics
    from .benchmarks.report.compare import compare_reports
    from .benchmarks.report.grids import terminal_grids, write_grids
    from .benchmarks.report.report import (
        REPORT_FILES,
        replaced_files,
        terminal_comparison,
        terminal_report,
        write_report,
    )
    from .benchmarks.speed.random_weights import locate_configs
    from .benchmarks.table1 import GridConfig, measure_grids, parse_sweep
    from .engine.files import prepare_output
    from .engine.model import locate
    from .engine.prompts import read_prompts

    if compare:
        differences = compare_reports(*compare)
        if as_json:
            print_json(asdict(differences))
        else:
            console.print(terminal_comparison(differences))
        return
    config = BenchConfig(
        steps=steps,
        sampler=sampler,
        batch_sizes=parse_batch_sizes(batch_sizes),
        runs=runs,
        samples=0 if speed_only else samples,
        seed=seed,
        guidance=guidance,
        compile=compile_,
        alternatives=alternatives,
    )
    students = student or [Path("outputs/student")]
    metrics = Metrics(
        # The embedded model's own statistics are of EfficientNet's features.
        reference=reference or (embedded.REFERENCE if model == embedded.MODEL_NAME and not inception_weights else None),
        reference_size=reference_size,
        inception_weights=inception_weights,
        clip=clip,
    )
    grids = None
    if table1 or sweep:
        if random_weights or alternatives:
            raise InputError("--table1 and --sweep go neither with --random-weights nor with --alternatives")
        samplers = tuple(table1_samplers.split(","))
        grids = GridConfig(table1=table1, samplers=samplers, sweep=parse_sweep(sweep))
    result, tables = None, None
    total = grids.denoised(config, len(students)) if grids else config.denoised(len(students))
    with progress_bar("measuring", total or 1) as advance:

        def report(message: str) -> None:
            advance(0, note=message)

        if random_weights:
            files = locate_configs(model)
            prepare_output(output)
            result = bench_random(files, config, device=device, report=report)
        else:
            files = locate(model)
            if model == embedded.MODEL_NAME:
                prompts = prompts or embedded.HELD_OUT_PROMPTS
            if prompts is None:
                raise InputError("pass --prompts FILE: only the embedded model brings prompts of its own")
            lines = read_prompts(prompts)
            prepare_output(output)
            shared: dict[str, Any] = {
                "students": students,
                "prompts": lines,
                "metrics": metrics,
                "cache": output / "cache",
                "device": device,
                "on_images": lambda name, count: advance(count, note=name),
            }
            if grids:
                tables = measure_grids(files, grids, config, **shared)
            else:
                result = run(files, config, engine=engine, report=report, **shared)
    # Of several processes that were launched, all but the first have neither.
    if tables:
        write_grids(tables, output)
        if as_json:
            print_json({table.name: table.as_json() for table in tables})
            return
        console.print(terminal_grids(tables))
        console.print(f"Tables: [bold]{', '.join(str(output / f'{table.name}.html') for table in tables)}[/]")
    if result:
        with replaced_files(output, REPORT_FILES) as folder:
            write_report(result, folder)
        if as_json:
            print_json(result.as_json())
            return
        console.print(terminal_report(result))
        console.print(f"Report: [bold]{output / 'report.html'}[/]")


app.command()(generate)
app.command()(doctor)


def main() -> None:
    """Entry point: errors end as one line on standard error and exit code 1 or 2."""
    run_app(app)
