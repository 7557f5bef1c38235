"""Train students from several seeds and judge each against the teacher: mean and standard error.

    python -m boostdiff.benchmarks.seeds --work DIR [--seeds 5] [--samples 1000]

On `emoji64` and its held-out prompts, on torch. Students that are in DIR already are kept, and so are results: a run
that was interrupted goes on. Writes `DIR/seeds.json` and prints a Markdown table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import teacher
from ..engine.files import write_json
from ..engine.guidance import teacher_denoiser
from ..engine.model import load, locate, resolve_device
from ..engine.prompts import read_prompts
from ..engine.runners import TorchRunner
from ..engine.samplers import make_scheduler
from ..engine.student import apply_student
from .features import DISTANCE_NAME, EfficientNetLite0Features, Reference
from .quality import judge
from .sampling import Campaign, Contestant

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

GUIDANCE = 3.0


def train(work: Path, method: str, seed: int, more: list[str]) -> Path:
    """The student's folder; trained by the command line unless it is there."""
    folder = work / f"{method}-{seed}"
    if not folder.exists():
        command = [sys.executable, "-m", "boostdiff", "distill", "--method", method, "--seed", str(seed)]
        command += ["--guidance", str(GUIDANCE), "--output", str(folder), *more]
        subprocess.run(command, check=True)  # noqa: S603
    return folder


def distances(work: Path, rows: dict[str, Path | None], sampler: str, steps: int, samples: int) -> dict[str, float]:
    """The distance to real images of each row: a student's folder, or None for a teacher "teacher W"."""
    stored = work / "seeds.json"
    known: dict[str, float] = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    network, reference = EfficientNetLite0Features(), Reference.load(teacher.REFERENCE)
    prompts = read_prompts(teacher.HELD_OUT_PROMPTS)[:samples]
    found = {}
    for name, folder in rows.items():
        key = f"{name}, {sampler} {steps}, N {samples}"
        if key not in known:
            model = load(locate(teacher.MODEL_NAME), device=resolve_device("auto"))
            runner = TorchRunner(model.unet)
            if folder is not None:
                apply_student(model, folder)
            scale = float(name.split()[1]) if folder is None else 1.0
            contestant = Contestant(
                name=name,
                kind="student",
                steps=steps,
                cost=steps * (1 + (scale > 1)),
                open=partial(teacher_denoiser, runner, scale),
                make_scheduler=partial(make_scheduler, sampler, model.pipeline.scheduler.config),
            )
            network = network.to(model.device)
            campaign = Campaign(model=model, network=network, prompts=prompts, seed=0, batch_size=50)
            quality = judge(campaign, [contestant], reference=reference)
            distance = quality.rows[0].distance
            assert distance is not None
            known[key] = distance
            write_json(stored, known)
        found[name] = known[key]
        print(f"{key}: {found[name]:.1f}", file=sys.stderr, flush=True)
    return found


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    work: Annotated[Path, typer.Option(help="Folder for students and results.")],
    seeds: Annotated[int, typer.Option(min=2, help="Training runs of each method.")] = 5,
    samples: Annotated[int, typer.Option(min=2, help="Images of each student (N).")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "lora,bitfit",
    samplers: Annotated[str, typer.Option(help="Comma-separated.")] = "ddim,dpm++",
) -> None:
    """Measure; options after `--` go to `boostdiff distill`."""
    work.mkdir(parents=True, exist_ok=True)
    students = {
        method: [train(work, method, seed, context.args) for seed in range(seeds)] for method in methods.split(",")
    }
    print(f"| sampler, {steps} steps | student | {DISTANCE_NAME} | teacher w={GUIDANCE:g} | teacher w=1 | recovered |")
    print("|---|---|---|---|---|---|")
    for sampler in samplers.split(","):
        rows: dict[str, Any] = {f"teacher {GUIDANCE:g}": None, "teacher 1": None}
        rows |= {folder.name: folder for folders in students.values() for folder in folders}
        found = distances(work, rows, sampler, steps, samples)
        guided, unguided = found[f"teacher {GUIDANCE:g}"], found["teacher 1"]
        for method, folders in students.items():
            values = [found[folder.name] for folder in folders]
            recovered = [(unguided - value) / (unguided - guided) for value in values]
            error = len(values) ** -0.5
            print(
                f"| {sampler} | {method} | {statistics.mean(values):.1f} ± {statistics.stdev(values) * error:.1f} "
                f"| {guided:.1f} | {unguided:.1f} "
                f"| {statistics.mean(recovered):.0%} ± {statistics.stdev(recovered) * error:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    app()
