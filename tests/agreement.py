"""What each runner draws, as pixels to compare."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from boostdiff.engine.config import EXPORTED, GenerateConfig
from boostdiff.engine.errors import BoostDiffError
from boostdiff.engine.exported import Engine
from boostdiff.engine.generate import draw
from boostdiff.engine.model import ModelFiles
from diffusers import DiffusionPipeline
from PIL import Image

STOCK = "stock diffusers, onnx fp32 as `pipe.unet`"


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """`(N, H, W, 3)`, float32 from 0 to 255."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).float()


def drawn(files: ModelFiles, config: GenerateConfig) -> torch.Tensor:
    """What `boostdiff generate` draws, read back from its files; see `pixels`."""
    with tempfile.TemporaryDirectory() as folder:
        return pixels([Image.open(path) for path in draw(files, config, output=Path(folder))])


def drawn_by_stock_diffusers(files: ModelFiles, config: GenerateConfig, engine: Path) -> torch.Tensor:
    """What a stock pipeline draws without guidance, the exported student in the place of its UNet; see `pixels`."""
    pipeline = DiffusionPipeline.from_pretrained(files.folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with Engine.load(engine, runner="onnx", device="cpu", precision="fp32") as exported:
        pipeline.unet = exported.model.denoiser
        return pixels(
            pipeline(
                config.prompts,
                num_inference_steps=config.steps,
                guidance_scale=1.0,
                generator=[torch.Generator().manual_seed(config.seed + i) for i in range(len(config.prompts))],
            ).images
        )


def others(
    files: ModelFiles, base: GenerateConfig, engine: Path, runners: Sequence[tuple[str, str | None]]
) -> Iterator[tuple[str, torch.Tensor | str]]:
    """By name, what each other runner draws, or why it can't; the precision is that of ONNX Runtime's graphs."""
    for runner, precision in runners:
        try:
            config = replace(base, runner=runner, precision=precision, engine=engine if runner in EXPORTED else None)
            yield f"{runner} {precision or ''}".strip(), drawn(files, config)
        except BoostDiffError as error:
            yield runner, str(error)
    yield STOCK, drawn_by_stock_diffusers(files, base, engine)
