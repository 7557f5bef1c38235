"""A model folder of a public model's size with random weights, and a student for it: for export and speed at full size.

    python -m boostdiff.benchmarks.studies.random_folder sd21-base --output DIR

writes `DIR/model`, as `save_pretrained` would, and `DIR/student`, a LoRA that was not trained. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ...distill.adapters import make_adapter
from ...engine.files import sha256_of, staged_folder
from ...engine.model import locate
from ...engine.student import INFO_FILE, StudentInfo
from ...engine.versions import versions
from ..speed.random_weights import locate_configs, random_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def write_model(name: str, output: Path, *, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a pipeline folder with random weights.

    Args:
        name: a folder of `benchmarks/configs`, or any folder with a pipeline's configuration.
        output: the folder to write.
        dtype: of the weights in it.
        seed: of the weights.

    Raises:
        InputError: there is no such configuration, or the output can't be written.
    """
    model = random_model(locate_configs(name), device=torch.device("cpu"), seed=seed)
    with staged_folder(output, replaces="model_index.json") as folder:
        model.pipeline.to(dtype).save_pretrained(folder, safe_serialization=True)


def write_student(model: Path, output: Path, *, rank: int = 8, seed: int = 0) -> StudentInfo:
    """Write a LoRA of random factors for a model folder, described as `distill` describes what it trains.

    Raises:
        InputError: the model can't be used, or the output can't be written.
    """
    files = locate(str(model))
    pipeline = files.family.pipeline_class
    unet = files.empty_unet().to_empty(device="cpu")
    adapter = make_adapter("lora", unet, rank=rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    with staged_folder(output, replaces=INFO_FILE) as folder:
        paths = adapter.save(folder, pipeline)
        info = StudentInfo(
            method="lora",
            guidance=3.0,
            model=files.name,
            unet_sha256=files.unet_sha256(),
            adapter_files={path.name: sha256_of(path) for path in paths},
            trainable_parameters=adapter.count(),
            settings={"rank": rank, "random": True},
            versions=versions(),
        )
        info.write(folder)
    return info


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="sd15, sd21-base, sdxl, or a folder with a pipeline's configuration.")],
    output: Annotated[Path, typer.Option(help="Folder for `model` and `student`.")],
    half: Annotated[bool, typer.Option("--half", help="Write FP16 weights.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of all weights.")] = 0,
) -> None:
    """Write both."""
    write_model(model, output / "model", dtype=torch.float16 if half else torch.float32, seed=seed)
    info = write_student(output / "model", output / "student", seed=seed)
    print(f"{output / 'model'}: random weights; {output / 'student'}: LoRA of {info.trainable_parameters:,} parameters")


if __name__ == "__main__":
    app()
