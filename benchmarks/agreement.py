"""Whether every runner draws the images that torch draws.

    python -m boostdiff.benchmarks.agreement [--student DIR] [--engine DIR] [--count 16] [--steps 20]

On `emoji64` and its held-out prompts: the exported student on each runner that this machine has, and stock diffusers
with the ONNX runner as `pipe.unet`, against the torch runner at the same seeds. Prints a Markdown table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from .. import teacher
from ..engine.draw import DrawConfig, draw
from ..engine.errors import BoostDiffError
from ..engine.manifest import read_manifest
from ..engine.model import ModelFiles, locate
from ..engine.prompts import read_prompts
from ..engine.runners import open_exported

CPU = torch.device("cpu")

RUNNERS = (("onnx", "fp32"), ("onnx", "fp16"), ("compiled", None), ("onnx-tensorrt", None), ("tensorrt", None))
"""With the precision of ONNX Runtime's graphs."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """`(N, H, W, 3)`, float32 from 0 to 255."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).float()


def drawn(files: ModelFiles, config: DrawConfig) -> torch.Tensor:
    """What `boostdiff generate` draws, read back from its files; see `pixels`."""
    with tempfile.TemporaryDirectory() as folder:
        return pixels([Image.open(path) for path in draw(files, config, output=Path(folder))])


def drawn_by_stock_diffusers(files: ModelFiles, config: DrawConfig) -> torch.Tensor:
    """What a stock pipeline draws without guidance, the exported student in the place of its UNet; see `pixels`."""
    pipeline = DiffusionPipeline.from_pretrained(files.folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    manifest = read_manifest(config.engine)
    with open_exported("onnx", folder=config.engine, manifest=manifest, device=CPU, precision="fp32") as runner:
        pipeline.unet = runner
        return pixels(
            pipeline(
                config.prompts,
                num_inference_steps=config.steps,
                guidance_scale=1.0,
                generator=[torch.Generator().manual_seed(config.seed + i) for i in range(len(config.prompts))],
            ).images
        )


def others(
    files: ModelFiles, base: DrawConfig, runners: Sequence[tuple[str, str | None]] = RUNNERS
) -> Iterator[tuple[str, torch.Tensor | str]]:
    """By name, what each other way draws, or why it can't."""
    for runner, precision in runners:
        try:
            yield f"{runner} {precision or ''}".strip(), drawn(files, replace(base, runner=runner, precision=precision))
        except BoostDiffError as error:
            yield runner, str(error)
    yield "stock diffusers, onnx fp32 as `pipe.unet`", drawn_by_stock_diffusers(files, base)


@app.command()
def main(
    student: Annotated[Path, typer.Option(help="Its folder.")] = Path("outputs/student"),
    engine: Annotated[Path, typer.Option(help="The student's export.")] = Path("outputs/engine"),
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the first image.")] = 0,
) -> None:
    """Draw and compare."""
    files = locate(teacher.MODEL_NAME)
    prompts = read_prompts(teacher.HELD_OUT_PROMPTS)[:count]
    base = DrawConfig(prompts=prompts, student=student, engine=engine, steps=steps, seed=seed)
    expected = drawn(files, base)
    print(f"| against torch, {count} images of {steps} steps | largest difference | PSNR, the lowest |")
    print("|---|---|---|")
    for name, got in others(files, base):
        if isinstance(got, str):
            print(f"| {name} | not here: {got} | |")
            continue
        ratios = peak_signal_noise_ratio(got, expected, data_range=255.0, dim=(1, 2, 3), reduction="none")
        print(f"| {name} | {(got - expected).abs().max():.0f}/255 | {ratios.min():.1f} dB |", flush=True)


if __name__ == "__main__":
    app()
