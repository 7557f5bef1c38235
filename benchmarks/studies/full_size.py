"""Speed, training and export on one GPU at a public model's size, with random weights, stage by stage."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...distill.config import PAPER
from ...engine import embedded
from ...engine.errors import InputError
from ...engine.files import check_output, read_json, sha256_of, staged_folder, write_json
from ...engine.guidance_input import make_adapter
from ...engine.model import locate, resolve_device
from ...engine.options import DeviceOption, SeedOption
from ...engine.student import INFO_FILE, StudentInfo
from ...engine.versions import versions
from ..config import parse_batch_sizes
from ..report.tables import Table
from ..speed.device import hardware
from ..speed.random_weights import PUBLIC, locate_configs, random_model
from .held_out import Configuration, Runs, Steps, usable_work

STAGES = ("speed", "layouts", "folder", "training", "export", "engine", "compiled-training", "compiled")
"""Names of the measurements, in the order in which they can run."""

SETTINGS = "full-size.json"
"""In both folders: what the results in them are of."""

TRAINED_PASSES = 4
"""UNet passes of one sample's FLOPs: the teacher's two, the student's, and the backward pass to the activations, as
the weights themselves get no gradient."""


def random_folder(
    model: Configuration,
    output: Annotated[Path, typer.Option(help="Folder for `model` and `student`.")],
    half: Annotated[bool, typer.Option("--half", help="Write FP16 weights.")] = False,
    guidance: Annotated[float, typer.Option(help="Guidance scale w that the student states, above 1.")] = 3.0,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """A model folder of a public model's size with random weights, and a student for it, a LoRA that was not trained.

    For export and speed at full size; nothing is downloaded. A random model hardly heeds its prompt, so that 8 bits,
    which are judged by the guidance term, need a scale like 1000 here.
    """
    if not 1 < guidance < math.inf:
        raise InputError("--guidance must be above 1")
    configs, target = locate_configs(model), resolve_device(device)
    for name, marker in (("model", "model_index.json"), ("student", INFO_FILE)):
        check_output(output / name, replaces=marker)
    made = random_model(configs, device=target, seed=seed)
    with staged_folder(output / "model", replaces="model_index.json") as folder:
        made.pipeline.to(torch.float16 if half else torch.float32).save_pretrained(folder, safe_serialization=True)
    files = locate(str(output / "model"))
    adapter = make_adapter("lora", files.empty_denoiser().to_empty(device="cpu"), rank=8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    with staged_folder(output / "student", replaces=INFO_FILE) as folder:
        paths = adapter.save(folder, files.family.pipeline_class)
        StudentInfo(
            method="lora",
            guidance=guidance,
            model=files.name,
            denoiser_sha256=files.denoiser_sha256(),
            adapter_files={path.name: sha256_of(path) for path in paths},
            trainable_parameters=adapter.count(),
            settings={"rank": 8, "random": True},
            versions=versions(),
        ).write(folder)
    print(f"{output / 'model'}: random weights; {output / 'student'}: LoRA of {adapter.count():,} parameters")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One measurement.

    Attributes:
        command: arguments of this Python.
        done_file: the file that is there when it is finished.
    """

    command: list[str]
    done_file: Path

    def run(self, name: str, seconds: float | None = None) -> str | None:
        """Run it if it is not finished, for so many seconds at most; why it failed, or None."""
        if self.done_file.exists():
            print(f"{name}: finished before", flush=True)
            return None
        began, shown = time.monotonic(), f"`python -m {shlex.join(self.command)}`"
        print(f"{name}: {shown}", flush=True)
        try:
            code = subprocess.run([sys.executable, "-m", *self.command], check=False, timeout=seconds).returncode  # noqa: S603
        except subprocess.TimeoutExpired:
            return f"longer than {seconds:g} s: {shown}"
        print(f"{name}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
        return f"exit code {code} of {shown}" if code else None


def stages(
    *, model: str, work: Path, output: Path, device: str, batch_sizes: str, steps: int, runs: int, updates: int
) -> dict[str, Stage]:
    """All of them, by name, in the order in which they can run; for the arguments see `full_size`."""
    folder, engine, table = work / "folder", work / "engine", output / "layouts.md"
    studies, timed = "boostdiff.benchmarks.studies", ["--steps", f"{steps}", "--runs", f"{runs}"]
    inputs = ["--model", f"{folder / 'model'}", "--prompts", f"{embedded.HELD_OUT_PROMPTS}"]
    student = ["--model", f"{folder / 'model'}", "--student", f"{folder / 'student'}"]
    random = ["--model", model, "--random-weights", "--batch-sizes"]
    half = ["--precision", "fp16"] if resolve_device(device).type == "cuda" else []

    def stage(target: Path, done_file: Path, *words: str) -> Stage:
        return Stage(command=[*words, "--output", f"{target}", "--device", device], done_file=done_file)

    def bench(name: str, *options: str) -> Stage:
        words = ("boostdiff", "bench", "--sampler", "dpm++", *timed, *options)
        return stage(output / name, output / name / "report.json", *words)

    def training(name: str, *options: str) -> Stage:
        few = ("--preset", "paper", "--updates", f"{updates}", "--gradient-accumulation-steps", "32")
        return stage(work / name, work / name / INFO_FILE, "boostdiff", "distill", *inputs, *few, *options)

    exported = [*inputs, "--student", f"{folder / 'student'}", "--engine", f"{engine}", "--speed-only"]
    return {
        "speed": bench("speed", *random, batch_sizes, "--no-compile"),
        "layouts": stage(table, table, studies, "layouts", model),
        "folder": stage(folder, folder / "student" / INFO_FILE, studies, "random-folder", model, "--half"),
        "training": training("training"),
        "export": stage(engine, engine / "manifest.json", "boostdiff", "export", *student, *half),
        "engine": bench("engine", *exported, "--batch-sizes", batch_sizes, "--no-compile"),
        "compiled-training": training("compiled-training", "--compile"),
        "compiled": bench("compiled", *random, "8", "--compile"),
    }


def training_row(name: str, info: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """The paper's run by the pace of a few updates in `student.json`, and a report's speed, for FLOPs and the peak."""
    result, paper = info["result"], PAPER
    seconds = paper["batch_size"] / result["images_per_second"]
    rate = paper["batch_size"] * TRAINED_PASSES * speed["flops"]["denoiser"] / seconds / 1e12
    shares = [f"{seconds * paper['updates'] / 3600:.1f}", f"{rate / max(speed['peaks'].values()):.0%}"]
    return [name, f"{seconds:.1f}", *shares, f"{result['peak_memory'] / 2**30:.1f}"]


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    described = hardware(device)
    return str(described.get("gpu", described["cpu"]))


def summary(planned: dict[str, Stage], failed: dict[str, str], *, model: str, device: torch.device) -> str:
    """Markdown of what is there: where the results are, the pace of the training, and what failed."""
    done = {name: stage.done_file for name, stage in planned.items() if stage.done_file.exists()}
    lines = [f"# {model} on {device_name(device)}\n"]
    lines += [f"- {name}: {path}" for name, path in done.items()]
    lines += [f"- {name} failed: {reason}" for name, reason in failed.items()]
    if "speed" in done:
        speed, paper = read_json(done["speed"])["speed"], PAPER
        trainings = [name for name in ("training", "compiled-training") if name in done]
        rows = [training_row(name, read_json(done[name]), speed) for name in trainings]
        headings = [f"{paper['updates']} updates of {paper['batch_size']} samples", "seconds per update"]
        headings += ["hours for all", "share of the highest GEMM peak", "peak memory, GiB"]
        lines += ["", Table(headings=headings, cells=rows).markdown()] if rows else []
    return "\n".join(lines) + "\n"


def full_size(
    work: Annotated[
        Path, typer.Option(help="Folder for weights, students and engines: some 10 GB.", callback=usable_work)
    ],
    model: Annotated[str, typer.Option(help=f"{', '.join(PUBLIC)}, or a pipeline folder.")] = "sd21-base",
    only: Annotated[
        str | None, typer.Option(help=f"Stages, comma-separated: {', '.join(STAGES)}.", show_default="all")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="For results.", show_default="results in --work")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Images per batch.")] = "1,2,4,8,16",
    steps: Steps = 20,
    runs: Runs = 7,
    updates: Annotated[int, typer.Option(min=2, help="Training updates; the first is not timed.")] = 3,
    seconds: Annotated[int | None, typer.Option(min=1, help="Time limit per stage.", show_default="none")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Speed, training and export at a public model's size, on random weights: no download, no network.

    Each stage is a command that is printed and can be run alone: `speed`, `layouts`, `folder` (`random-folder`, which
    the next need), `training` (a few updates of the paper's preset), `export`, `engine`, and last, as `torch.compile`
    takes minutes per graph, `compiled-training` and `compiled`. A stage whose results are there is not run again, and
    one that fails keeps none of the others from running. `summary.md` is written anew after each.
    """
    target = resolve_device(device)
    parse_batch_sizes(batch_sizes)
    locate_configs(model)
    output = output or work / "results"
    planned = stages(
        model=model,
        work=work,
        output=output,
        device=device,
        batch_sizes=batch_sizes,
        steps=steps,
        runs=runs,
        updates=updates,
    )
    wanted = list(planned) if only is None else only.split(",")
    if unknown := set(wanted) - set(planned):
        raise InputError(f"unknown stage {unknown.pop()!r}: choose from {', '.join(planned)}")
    check_output(output)
    written = ("summary.md", "layouts.md")
    if not (output / SETTINGS).exists() and (there := next((n for n in written if (output / n).exists()), None)):
        raise InputError(f"the output {output} holds a {there} of something else: choose another --output")
    settings = {"model": model, "steps": steps, "runs": runs, "updates": updates, "batch_sizes": batch_sizes}
    settings["device"] = device_name(target)
    for begun in (work / SETTINGS, output / SETTINGS):
        if begun.exists() and (before := read_json(begun)) != settings:
            # Before there was a device, nobody wrote down which it was.
            measured_on = before.pop("device", "a device that is not named")
            options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in before.items())
            raise InputError(
                f"{begun.parent} holds results of {options} on {measured_on}: pass these again, or another folder"
            )
    for folder in (work, output):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, settings)
    failed: dict[str, str] = {}
    for name in (name for name in planned if name in wanted):
        if reason := planned[name].run(name, seconds):
            failed[name] = reason
        # After each: what ends the script must not take the results along.
        text = summary(planned, failed, model=model, device=target)
        (output / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{output / 'summary.md'}")
    if failed:
        raise typer.Exit(1)
