"""The command line: parse, configure, one library call, print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import __version__
from .benchmarks import command as bench
from .engine import embedded
from .engine.errors import InputError
from .engine.terminal import console, is_main_process, print_json, progress_bar, quiet_libraries
from .engine.terminal import run as run_app

app = typer.Typer(
    name="boostdiff",
    help="Distil classifier-free guidance into one pass: train, merge, export, prove.",
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
    """Distil classifier-free guidance into one pass: train, merge, export, prove."""


def _learnt(share: float | None) -> str:
    """The share of guidance that is learnt, to stand before other things; nothing where guidance changes nothing."""
    return "" if share is None else f"guidance learnt {share:.0%}, "


@app.command()
def distill(
    model: ModelOption = embedded.MODEL_NAME,
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("outputs/student"),
    method: Annotated[
        str, typer.Option("--method", help="lora, dora, bitfit, soft-prompt, loha, lokr, oft, hra or ia3.")
    ] = "lora",
    rank: Annotated[int, typer.Option("--rank", help="Rank of LoRA and its kin.")] = 8,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Scale of LoRA, over its rank.", show_default="the rank")
    ] = None,
    targets: Annotated[
        str,
        typer.Option("--targets", help="attention, transformer, or endings of module names: to_q,to_v"),
    ] = "attention",
    tokens: Annotated[int, typer.Option("--tokens", help="Learnt tokens of a soft prompt.")] = 16,
    guidance: Annotated[
        str,
        typer.Option("--guidance", help="Guidance scale w to distil in, or a range LOW:HIGH to take as an input."),
    ] = "3.0",
    negative_prompt: Annotated[
        str, typer.Option("--negative-prompt", help="Distil this negative prompt in, too.")
    ] = "",
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="One prompt a line, or a COCO captions JSON: trains on online trajectories."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", help="Captioned images: a folder, WebDataset tars, Parquet, or a dataset id."),
    ] = None,
    max_bad_samples: Annotated[
        int, typer.Option("--max-bad-samples", help="Unreadable images that are skipped before the run stops.")
    ] = 0,
    updates: Annotated[
        int | None,
        typer.Option(
            "--updates",
            help="Optimizer updates.",
            show_default="260; bitfit, soft-prompt 300; of a range four times as many",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="States an update, over all processes.", show_default="32")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Peak learning rate.", show_default="1e-3; bitfit, soft-prompt 1e-2"),
    ] = None,
    loss_weight: Annotated[
        str | None,
        typer.Option(
            "--loss-weight", help="constant (the paper), snr, truncated-snr, snr+1, min-snr.", show_default="snr"
        ),
    ] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", help="Save an average of the adapter over updates: its decay, as 0.99.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="[bold]paper[/]: 1600 updates of 512 at 5e-5, constant weight."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp32, bf16 or fp16.", show_default="bf16 where the device has it, else fp32"),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int,
        typer.Option(
            "--gradient-accumulation-steps",
            help="Passes that share an update; more by themselves where memory runs out.",
        ),
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations, to save more.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run torch.compile: minutes in the first update, then faster ones.")
    ] = False,
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", help="Updates between checkpoints.")] = 50,
    preview_every: Annotated[
        int | None, typer.Option("--preview-every", help="Draw a grid so often, into previews/.")
    ] = None,
    log_with: Annotated[
        str | None, typer.Option("--log-with", help="Also log to tensorboard, trackio or wandb.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="[bold]kohya[/]: also write the LoRA as ComfyUI and A1111 read it."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run of this output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration; read no weights.")
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train an adapter that makes one pass predict what guided sampling predicts."""
    quiet_libraries()
    from .distill.config import parse_guidance
    from .distill.distill import FORMATS, count_parameters, distil
    from .distill.loop import Observers
    from .distill.presets import resolve_config
    from .engine.compiled import has_bfloat16
    from .engine.model import locate, resolve_device

    low, high = parse_guidance(guidance)
    for name in formats or ():
        if name not in FORMATS:
            raise InputError(f"unknown format {name!r}: choose one of {', '.join(FORMATS)}")
    files = locate(model, weights=not dry_run)
    given = {
        "updates": updates,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "loss_weight": loss_weight,
        "precision": precision,
        "alpha": alpha,
        "ema": ema,
        "guidance_max": high,
    }
    config = resolve_config(
        preset=preset,
        in_bfloat16=has_bfloat16(resolve_device(device)),
        embedded=model == embedded.MODEL_NAME,
        method=method,
        rank=rank,
        targets=targets,
        tokens=tokens,
        guidance=low,
        negative_prompt=negative_prompt,
        prompts=prompts,
        images=images,
        max_bad_samples=max_bad_samples,
        seed=seed,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_,
        checkpoint_every=checkpoint_every,
        **given,
    )
    if dry_run:
        print_json({"model": model, "output": str(output), **config.as_json(), **count_parameters(files, config)})
        return
    with progress_bar(f"distilling {method}", config.updates) as advance:
        observers = Observers(
            # Wrong data shows in the first update: no bar before it.
            on_start=lambda done: advance(done) if done else None,
            on_update=lambda done: advance(
                note=f"loss {done.loss:.3g}, {_learnt(done.guidance_learnt)}"
                f"{done.images_per_second:.1f} images/s, {done.peak_memory / 2**30:.1f} GB"
            ),
            on_note=lambda note: console.print(note, style="yellow", markup=False),
            preview_every=preview_every,
            log_with=log_with,
        )
        info = distil(
            files,
            config,
            output=output,
            device=device,
            resume=resume,
            formats=tuple(formats or ()),
            observers=observers,
        )
    if not is_main_process():
        return
    if skipped := info.result["bad_samples"]:
        console.print(f"{len(skipped)} unreadable samples were skipped; student.json lists them")
    if as_json:
        print_json({"output": str(output), **asdict(info)})
        return
    console.print(
        f"Student of {info.trainable_parameters:,} parameters in [bold]{output}[/] "
        f"({_learnt(info.result['guidance_learnt'])}{info.result['seconds']:.0f} s); "
        f"preview: {output / 'grid.png'}\nNext: [bold]boostdiff export --trt[/]"
    )


@app.command()
def export(
    model: ModelOption = embedded.MODEL_NAME,
    student: StudentOption = Path("outputs/student"),
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("outputs/engine"),
    trt: Annotated[bool, typer.Option("--trt", help="Also build FP16 TensorRT engines.")] = False,
    trt_flavour: Annotated[
        str | None,
        typer.Option(
            "--trt-flavour",
            help="[bold]tensorrt[/] builds on the GPU that will run it, [bold]tensorrt_rtx[/] anywhere.",
            show_default="what this machine has",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="Of the ONNX graphs: fp32, fp16 or both.",
            show_default="fp32; with --trt both, of large models fp16",
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Batch of the TensorRT engines: one, or smallest:best:largest.")
    ] = "1:4:16",
    size: Annotated[
        str | None,
        typer.Option(
            "--size", help="Pixels: one, or smallest:best:largest if it may vary.", show_default="the model's"
        ),
    ] = None,
    refittable: Annotated[
        bool, typer.Option("--refittable", help="Engines whose weights can be replaced; may be a little slower.")
    ] = False,
    workspace: Annotated[
        float | None, typer.Option("--workspace", help="Limit of TensorRT's scratch memory in GB.")
    ] = None,
    diffusers: Annotated[
        bool, typer.Option("--diffusers", help="Also write the merged UNet for UNet2DConditionModel.from_pretrained.")
    ] = False,
    refit: Annotated[
        Path | None,
        typer.Option("--refit", help="Put the weights into the refittable engines of this folder; needs their GPU."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Export again even if nothing has changed.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Merge the student into the UNet and export the pipeline to ONNX and TensorRT, compared with torch before use."""
    quiet_libraries()
    from .engine.model import locate
    from .export.config import ExportConfig, parse_profile
    from .export.export import export as run

    config = ExportConfig(
        precision=precision,
        trt=trt,
        trt_flavour=trt_flavour,
        batch=parse_profile(batch, "--batch"),
        size=None if size is None else parse_profile(size, "--size"),
        refittable=refittable,
        workspace_gb=workspace,
        diffusers=diffusers,
    )
    files = locate(model)
    with console.status("exporting"):
        manifest = run(
            files,
            config,
            student=student,
            output=output,
            device=device,
            force=force,
            refit=refit,
            report=console.print,
        )
    if as_json:
        print_json(asdict(manifest))
        return
    console.print(
        f"Engine in [bold]{output}[/]: {', '.join(manifest.artefacts)}\nNext: [bold]boostdiff bench --steps 20[/]"
    )


app.add_typer(bench.app, name="bench")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw, one image a prompt.")],
    model: ModelOption = embedded.MODEL_NAME,
    student: Annotated[
        Path | None,
        typer.Option(
            "--student",
            help="Folder that `boostdiff distill` wrote; an engine has its own.",
            show_default="outputs/student",
        ),
    ] = None,
    engine: EngineOption = Path("outputs/engine"),
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("outputs/images"),
    use_teacher: Annotated[bool, typer.Option("--teacher", help="Two passes with guidance, no student.")] = False,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Of the teacher or a range student.", show_default="3; a student has its own"),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="Of the teacher; a student has its own.")
    ] = None,
    dial: Annotated[
        float | None,
        typer.Option("--dial", help="Weight of a student of method lora: 0 is no guidance, 1 all that it learnt."),
    ] = None,
    runner: Annotated[
        str,
        typer.Option(
            "--runner",
            help="torch; captured, a CUDA graph of it; compiled, which starts slowly and pays for many images; "
            "or an engine: onnx, onnx-tensorrt, tensorrt.",
        ),
    ] = "torch",
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="Of the onnx runner: fp32 or fp16.", show_default="what the device is faster at"
        ),
    ] = None,
    sampler: SamplerOption = "ddim",
    steps: StepsOption = 20,
    count: Annotated[int, typer.Option("--count", min=1, help="Images of each prompt.")] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="Images made together.", show_default="8, of more than 512 pixels fewer"
        ),
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw images with the student in one pass a step; with [bold]--teacher[/], in two."""
    quiet_libraries()
    from .engine.generate import DrawConfig, draw
    from .engine.model import locate
    from .engine.runners import EXPORTED

    if runner in EXPORTED:
        if use_teacher:
            raise InputError(f"--teacher runs in torch only: an engine holds the student, leave --runner {runner} out")
    elif student is None:
        student = Path("outputs/student")
    config = DrawConfig(
        prompts=[prompt for prompt in prompts for _ in range(count)],
        student=None if use_teacher else student,
        engine=engine,
        runner=runner,
        precision=precision,
        guidance=guidance,
        negative_prompt=negative_prompt,
        dial=dial,
        sampler=sampler,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
    )
    files = None if runner in EXPORTED else locate(model)
    doing = "compiling, then drawing" if runner == "compiled" else "drawing"
    with progress_bar(doing, config.total_steps) as advance:
        paths = draw(files, config, output=output, device=device, on_step=advance)
    if as_json:
        print_json({"images": [str(path) for path in paths]})
        return
    console.print(f"{len(paths)} image{'s' * (len(paths) > 1)} in [bold]{output}[/]: {paths[0].name} …")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine can run, and what to install for the rest."""
    quiet_libraries()
    from .engine.doctor import examine, table

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    Console().print(table(findings))


def main() -> None:
    """Entry point: errors end as one line on standard error and exit code 1 or 2."""
    run_app(app)
