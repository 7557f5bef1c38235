"""The options of `boostdiff export`: precisions, shapes and plans.

Nothing here imports torch: the help of a command must not wait for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

from ..engine.config import MAX_SIZE
from ..engine.errors import InputError
from ..engine.options import check_options, refuse_unused

LARGE = 1e9
"""Bytes of a UNet in FP32 from which a plan's export leaves the FP32 graph out."""


class Range(NamedTuple):
    """What a TensorRT profile spans: smallest, best and largest."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return ":".join(map(str, self))


def parse_range(text: str | Range) -> Range:
    """`8` or `1:4:16`, or a range: typer parses defaults, too.

    Raises:
        BadParameter: it is neither, or not ascending; typer adds the option's name.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", str(text).strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is neither a number nor MIN:OPT:MAX, such as 1:4:16")
    parsed = Range(*(int(match[i] or match[1]) for i in (1, 2, 3)))
    if not 1 <= parsed.min <= parsed.opt <= parsed.max:
        raise typer.BadParameter(f"{text} must be at least 1 and ascend: MIN:OPT:MAX")
    if parsed.max > MAX_SIZE:
        raise typer.BadParameter(f"{text} must be at most {MAX_SIZE}")
    return parsed


RANGE = {"parser": parse_range, "metavar": "N|MIN:OPT:MAX"}
BATCH = Range(1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How to export; an InputError where a value can't be used, would not be used, or contradicts another.

    Attributes:
        precision: see `precisions`.
        trt_flavour: see `plan.choose_backend`.
        batch: a teacher with batched CFG at batch 8 needs 16.
    """

    precision: Annotated[
        Literal["fp32", "fp16", "both"] | None,
        typer.Option(show_default="fp32; with --trt both, fp16 for large models", help="Precision of the ONNX graphs."),
    ] = None
    trt: Annotated[bool, typer.Option("--trt", help="Also build FP16 TensorRT engines.")] = False
    trt_flavour: Annotated[
        Literal["tensorrt", "tensorrt_rtx"] | None,
        typer.Option(
            show_default="what this machine has",
            help="[bold]tensorrt[/] builds on the GPU that will run it, [bold]tensorrt_rtx[/] anywhere.",
        ),
    ] = None
    batch: Annotated[
        Range,
        typer.Option(
            show_default=str(BATCH),
            help="Batch sizes of the TensorRT engines, in rows of the UNet: a two-pass teacher takes two per image.",
            **RANGE,
        ),
    ] = BATCH
    size: Annotated[
        Range | None,
        typer.Option(show_default="the model's", help="Height and width in pixels; a range lets them vary.", **RANGE),
    ] = None
    diffusers: Annotated[
        bool, typer.Option("--diffusers", help="Also write a whole pipeline for stock diffusers, OUTPUT/diffusers.")
    ] = False

    quantize: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(
            show_default="off",
            help="Also write the UNet in 8 bits: [bold]int8[/] for `--runner onnx --precision int8` on CPUs, "
            "[bold]fp8[/] for the TensorRT engine of the UNet.",
        ),
    ] = None
    calibration_prompts: Annotated[
        Path | None,
        typer.Option(
            show_default="the training prompts of emoji64", help="Prompts whose trajectories set the 8-bit ranges."
        ),
    ] = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.quantize == "int8" and self.precision == "fp16":
            raise InputError("--quantize int8 starts from the FP32 graph: pass --precision both")
        if self.quantize == "fp8" and not self.trt and self.precision not in ("fp16", "both"):
            raise InputError("--quantize fp8 starts from the FP16 graph: pass --trt, or --precision both")
        if not self.quantize:
            refuse_unused(self, "without --quantize", "calibration_prompts")
        if self.trt and self.precision == "fp32":
            raise InputError("--trt builds from FP16 graphs: leave --precision fp32 out, or pass both")
        if not self.trt:
            refuse_unused(self, "without --trt", "trt_flavour", "batch")

    def precisions(self, parameters: int) -> tuple[str, ...]:
        """Precisions to write for a denoiser of so many parameters, the main one first.

        By default fp32; with TensorRT both, or fp16 alone for a denoiser of more than `LARGE` bytes.
        """
        chosen = self.precision
        if chosen is None:
            chosen = ("fp16" if 4 * parameters > LARGE and self.quantize != "int8" else "both") if self.trt else "fp32"
        return ("fp32", "fp16") if chosen == "both" else (chosen,)
