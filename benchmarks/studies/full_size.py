"""Everything that is claimed of a GPU, at a public model's size and on random weights, stage by stage."""

from __future__ import annotations

import datetime
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...distill.config import PRESETS
from ...engine import embedded
from ...engine.errors import InputError
from ...engine.files import read_json, write_json
from ...engine.manifest import read_manifest
from ...engine.model import resolve_device
from ...engine.runners import EXPORTED, available_runners
from ..config import parse_batch_sizes
from ..report.tables import NOTHING
from ..speed.device import hardware
from .study_options import Device, Runs, Steps

STUDIES = ["boostdiff.benchmarks.studies"]

RESULTS = Path(__file__).parents[1] / "results"

TRAINING: dict[str, list[str]] = {"training": [], "compiled-training": ["--compile"]}
"""Stages that train, and the options that tell them apart."""

TRAINED_PASSES = 4
"""UNet passes of one state's operations: the teacher's two, the student's, and its way back to the activations, as the
weights themselves get no gradient."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One measurement.

    Attributes:
        command: arguments of this Python.
        proof: the file that is there when it is finished.
        hindrance: why it would be in vain, or None; asked before it begins.
    """

    command: Sequence[str]
    proof: Path
    hindrance: Callable[[], str | None] = lambda: None


def no_exported_runner(engine: Path, device: torch.device) -> str | None:
    """Why an exported engine can be run by nothing here, or None."""
    try:
        reasons = available_runners(read_manifest(engine), device, EXPORTED)
    except InputError as error:
        return str(error)
    if None in reasons.values():
        return None
    return "no runner of exported graphs: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def stages(
    *,
    model: str,
    work: Path,
    output: Path,
    device: str,
    batch_sizes: str,
    few_batch_sizes: str,
    steps: int,
    runs: int,
    updates: int,
    parts: int,
) -> dict[str, Stage]:
    """All of them, by name, in the order in which they can run.

    Args:
        model: a name in `benchmarks/configs`, or a folder with a configuration.
        work: for weights, students and engines.
        output: for results.
        device: "auto", "cpu", "cuda", …
        batch_sizes: images made together, "1,2,4,8,16".
        few_batch_sizes: where each takes minutes, for `profile` and `compiled`.
        steps: sampling steps.
        runs: timed batches of each row.
        updates: of the training.
        parts: passes that share an update, `--gradient-accumulation-steps`.
    """
    folder, student, engine = work / "folder", work / "folder" / "student", work / "engine"
    common = ["--device", device]
    bench = ["boostdiff", "bench", "--speed-only", "--sampler", "dpm++", "--steps", f"{steps}", "--runs", f"{runs}"]
    bench += common
    every, few = ["--batch-sizes", batch_sizes], ["--batch-sizes", few_batch_sizes]
    random = ["--model", model, "--random-weights"]
    prompts = ["--prompts", str(embedded.HELD_OUT_PROMPTS)]
    trained = ["boostdiff", "distill", "--model", str(folder / "model"), *prompts, "--preset", "paper", *common]
    trained += ["--updates", f"{updates}", "--gradient-accumulation-steps", f"{parts}"]
    profiled = [
        *STUDIES,
        "profile",
        model,
        *few,
        "--steps",
        f"{steps}",
        "--runners",
        "torch,captured",
    ]
    ours = ["--model", str(folder / "model"), "--student", str(student)]
    export = ["boostdiff", "export", *ours, "--output", str(engine), *common]
    export += ["--precision", "fp16"] if resolve_device(device).type == "cuda" else []

    def to(name: str) -> list[str]:
        return ["--output", str(output / name)]

    def trained_with(name: str) -> Stage:
        return Stage(
            command=[*trained, "--output", str(work / name), *TRAINING[name]], proof=work / name / "student.json"
        )

    return {
        "speed": Stage(
            command=[*bench, *random, *every, "--no-compile", *to("speed")],
            proof=output / "speed" / "report.json",
        ),
        "profile": Stage(
            command=[*profiled, "--runs", f"{runs}", "--json", str(output / "profile.json"), *common],
            proof=output / "profile.json",
        ),
        "folder": Stage(
            command=[*STUDIES, "random-folder", model, "--half", "--output", str(folder)],
            proof=student / "student.json",
        ),
        "training": trained_with("training"),
        "export": Stage(command=export, proof=engine / "manifest.json"),
        "engine": Stage(
            command=[*bench, *ours, *every, *prompts, "--engine", str(engine), "--no-compile", *to("engine")],
            proof=output / "engine" / "report.json",
            hindrance=lambda: no_exported_runner(engine, resolve_device(device)),
        ),
        "compiled-training": trained_with("compiled-training"),
        "compiled": Stage(
            command=[*bench, *random, *few, "--compile", *to("compiled")],
            proof=output / "compiled" / "report.json",
        ),
    }


def run(name: str, stage: Stage, limit: float | None = None) -> str | None:
    """Run a stage that is not finished; why it failed, or None.

    Args:
        name: of the stage.
        stage: to run.
        limit: seconds after which it is ended.
    """
    if stage.proof.exists():
        print(f"{name}: finished before", flush=True)
        return None
    if reason := stage.hindrance():
        return reason
    began, told = time.monotonic(), f"`python -m {shlex.join(stage.command)}`"
    print(f"{name}: {told}", flush=True)
    try:
        code = subprocess.run([sys.executable, "-m", *stage.command], check=False, timeout=limit).returncode  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"{told} was ended after {limit:g} s"
    print(f"{name}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
    return f"exit code {code} of {told}" if code else None


def ratios(report: Mapping[str, Any], batch_size: int) -> dict[str, str]:
    """By what is compared with what, the median of the rounds' ratios with its interval; whole images.

    Args:
        report: of `boostdiff bench`.
        batch_size: one that was measured.
    """
    speed = report["speed"]
    students = [row for row in speed["rows"] if row["mode"] == "student" and row["batch_size"] == batch_size]
    best = max(students, key=lambda row: row["images_per_second"]["value"])

    def over(slower: str) -> str:
        student = {"runner": best["runner"], "mode": "student"}
        wanted = ({"runner": slower, "mode": "teacher"}, student, "images", batch_size)
        for ratio in speed["ratios"]:
            if (ratio["slower"], ratio["faster"], ratio["part"], ratio["batch_size"]) == wanted:
                estimate = ratio["estimate"]
                return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
        return NOTHING

    share = best["peak_share"]
    return {
        "the student's best runner": best["runner"],
        "teacher with batched guidance, the same runner": over(best["runner"]),
        "stock diffusers, eager, with guidance": over("stock diffusers"),
        "teacher through torch.compile, with guidance": over("compiled"),
        "the student's UNet, share of the GEMM peak": NOTHING if share is None else f"{share:.0%}",
    }


def trained_students(planned: Mapping[str, Stage]) -> dict[str, Any]:
    """`student.json` of the training stages that are finished, by stage."""
    return {name: read_json(planned[name].proof) for name in TRAINING if planned[name].proof.exists()}


def training(info: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, float]:
    """The paper's run by the pace of a few updates.

    Args:
        info: a student's `student.json`.
        report: of `boostdiff bench` on the same device, for operations and the peak.

    Returns:
        Seconds an update, hours of the whole preset, peak memory in bytes, and the share of the GEMM peak.
    """
    result, paper = info["result"], PRESETS["paper"]
    seconds = paper["batch_size"] / result["images_per_second"]
    operations = paper["batch_size"] * TRAINED_PASSES * report["speed"]["flops"]["unet"]
    return {
        "seconds_per_update": seconds,
        "hours_of_preset": seconds * paper["updates"] / 3600,
        "peak_memory": result["peak_memory"],
        "peak_share": operations / seconds / 1e12 / max(report["speed"]["peaks"].values()),
    }


def summary(planned: Mapping[str, Stage], failed: Mapping[str, str], *, model: str, device: torch.device) -> str:
    """Markdown of what is there: the ratios at each batch size, the training, and what failed."""
    described = hardware(device)
    lines = [f"# {model} on {described.get('gpu', described['cpu'])}", ""]
    for name in ("speed", "engine", "compiled"):
        if not planned[name].proof.exists():
            continue
        report = read_json(planned[name].proof)
        sizes = sorted({row["batch_size"] for row in report["speed"]["rows"] if row["mode"] == "student"})
        columns = {size: ratios(report, size) for size in sizes}
        lines += [
            f"## {name}",
            "",
            f"How many times as fast the student is as …; {report['provenance']['config']['steps']} steps.",
        ]
        lines += ["", f"| batch | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
        for row in columns[sizes[0]]:
            lines.append(f"| {row} | {' | '.join(columns[size][row] for size in sizes)} |")
        peaks = ", ".join(f"{dtype} {peak:.4g}" for dtype, peak in report["speed"]["peaks"].items())
        lines += ["", f"GEMM peak in this run, TFLOP/s: {peaks}.", ""]
    students = trained_students(planned)
    if students and planned["speed"].proof.exists():
        lines += [
            "## training",
            "",
            f"The paper's run, {PRESETS['paper']['updates']} updates of {PRESETS['paper']['batch_size']} states.",
            "",
            "| | s an update | hours for all | share of the highest GEMM peak | peak memory, GiB |",
            "|---|---|---|---|---|",
        ]
        for name, info in students.items():
            pace = training(info, read_json(planned["speed"].proof))
            lines.append(
                f"| {name} | {pace['seconds_per_update']:.1f} "
                f"| {pace['hours_of_preset']:.1f} | {pace['peak_share']:.0%} | {pace['peak_memory'] / 2**30:.1f} |"
            )
        lines.append("")
    lines += [f"- {name} failed: {reason}" for name, reason in failed.items()]
    return "\n".join(lines).rstrip() + "\n"


def results_folder(device: torch.device) -> Path:
    """`benchmarks/results/<gpu>-<date>`."""
    described = hardware(device)
    name = re.sub(r"[^a-z0-9]+", "-", described.get("gpu", described["cpu"]).lower()).strip("-")
    return RESULTS / f"{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


def full_size(
    work: Annotated[Path, typer.Option(help="Folder for weights, students and engines: some 10 GB.")],
    model: Annotated[str, typer.Option(help="sd15, sd21-base, sdxl, or a pipeline folder.")] = "sd21-base",
    only: Annotated[str | None, typer.Option(help="Stages, comma-separated.  [default: all]")] = None,
    output: Annotated[Path | None, typer.Option(help="For results.  [default: by GPU and date]")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Images made together.")] = "1,2,4,8,16",
    few_batch_sizes: Annotated[str, typer.Option(help="The same of the stages profile and compiled.")] = "1,8",
    steps: Steps = 20,
    runs: Runs = 7,
    updates: Annotated[int, typer.Option(min=2, help="Of the training; the first is not timed.")] = 3,
    accumulate: Annotated[int, typer.Option(min=1, help="Passes that share a training update.")] = 32,
    limit: Annotated[float | None, typer.Option(min=1, help="Seconds that a stage may take.")] = None,
    device: Device = "auto",
) -> None:
    """Everything that is claimed of a GPU, at a public model's size and on random weights: no download, no network.

    Eight stages, each a command of its own that is printed and can be run alone: `speed` (`boostdiff bench
    --random-weights --no-compile`), `profile` (the study), `folder` (the study `random-folder`, which the next need),
    `training` (`boostdiff distill --preset paper`, a few updates), `export` (`boostdiff export`) and `engine`
    (`boostdiff bench` with the exported graphs); and last, as `torch.compile` takes minutes for each graph,
    `compiled-training` (with `--compile`) and `compiled` (`boostdiff bench --compile`, at few batch sizes).

    A stage whose results are there is not run again, and one that fails, or takes longer than `--limit` seconds, keeps
    none of the others from running. `summary.md` has the ratios that matter, from whatever is there, and is written
    anew after each stage. Large files stay in the work folder; results go to `benchmarks/results/<gpu>-<date>/` of the
    source tree, or to `--output`.
    """
    target = resolve_device(device)
    for sizes in (batch_sizes, few_batch_sizes):
        parse_batch_sizes(sizes)
    output = output or results_folder(target)
    planned = stages(
        model=model,
        work=work,
        output=output,
        device=device,
        batch_sizes=batch_sizes,
        few_batch_sizes=few_batch_sizes,
        steps=steps,
        runs=runs,
        updates=updates,
        parts=accumulate,
    )
    wanted = list(planned) if only is None else only.split(",")
    if unknown := set(wanted) - set(planned):
        raise InputError(f"unknown stage {unknown.pop()!r}: choose from {', '.join(planned)}")
    for folder in (work, output):
        folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for name in (name for name in planned if name in wanted):
        if reason := run(name, planned[name], limit):
            failed[name] = reason
        if students := trained_students(planned):
            write_json(output / "training.json", students)
        # After each: what ends the script must not take the results along.
        text = summary(planned, failed, model=model, device=target)
        (output / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{output / 'summary.md'}")
    if failed:
        raise typer.Exit(1)
