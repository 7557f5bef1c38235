"""The options of `boostdiff generate`: what to draw, and with what.

Nothing here imports torch: the help of a command must not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from .errors import InputError
from .guiders import GuiderOptions
from .options import (
    ENGINE_FOLDER,
    STEPS,
    STUDENT_FOLDER,
    MaxAutotuneOption,
    SeedOption,
    SpacingOption,
    StudentsSamplerOption,
    StudentsStepsOption,
    check_text,
    refuse_unused,
)

EXPORTED = ("onnx", "tensorrt")
"""Runners that execute an exported engine."""

MAX_SIZE = 2**14
"""Pixels of an image's side, or images of a plan: beyond it memory ends, not always with a word."""

PIXEL_MULTIPLE = 8
"""Stock pipelines draw heights and widths that are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(GuiderOptions):
    """What to draw, and with what; an InputError where a value can't be used, or would not be used.

    Attributes:
        prompts: one per image; image i starts from the noise of `seed + i`.
    """

    prompts: list[str]
    model: Annotated[
        str | None,
        typer.Option(
            show_default="emoji64",
            help="The embedded model [bold]emoji64[/], a diffusers folder or a hub id; an engine includes it.",
        ),
    ] = None
    student: Annotated[
        Path | None,
        typer.Option(
            show_default=str(STUDENT_FOLDER), help="Folder that `boostdiff distill` wrote; an engine includes it."
        ),
    ] = None
    engine: Annotated[
        Path | None,
        typer.Option(show_default=str(ENGINE_FOLDER), help="Folder that `boostdiff export` wrote, for its runners."),
    ] = None
    teacher: Annotated[bool, typer.Option("--teacher", help="Two passes with guidance, no student.")] = False
    guidance: Annotated[
        float | None,
        typer.Option(
            show_default="3; the student's",
            help="Guidance scale w of the teacher or a guidance-conditioned student.",
        ),
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            show_default="none; the student's",
            help="Negative prompt of the teacher, or of a student of live negative prompts.",
        ),
    ] = None
    lora_scale: Annotated[
        float | None,
        typer.Option(
            show_default="1",
            help="LoRA scale of a plain LoRA student, 0 to 2: 0 is no guidance, 1 what it learned, above 1 more.",
        ),
    ] = None
    runner: Annotated[
        Literal["torch", "captured", "compiled", "onnx", "tensorrt"],
        typer.Option(
            help="torch; captured: a CUDA graph of it; compiled: torch.compile, slow to start, pays for many images; "
            "or an engine's: onnx, tensorrt."
        ),
    ] = "torch"
    max_autotune: MaxAutotuneOption = False
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "fp8"] | None,
        typer.Option(
            show_default="fp32 or fp16, what the device is faster at", help="Precision of the onnx runner's UNet."
        ),
    ] = None
    sampler: StudentsSamplerOption = None
    steps: StudentsStepsOption = None
    timestep_spacing: SpacingOption = None
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, show_default="8, fewer above 512 pixels", help="Images denoised together."),
    ] = None
    height: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_SIZE, show_default="the model's", help="Height of the images in pixels."),
    ] = None
    width: Annotated[
        int | None, typer.Option(min=1, max=MAX_SIZE, show_default="the model's", help="Width of the images in pixels.")
    ] = None
    seed: SeedOption = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance is not None and not 1 <= self.guidance < float("inf"):
            raise InputError(f"--guidance {self.guidance:g} can't be used: it must be at least 1")
        if self.lora_scale is not None and not 0 <= self.lora_scale <= 2:
            raise InputError("--lora-scale must lie between 0 and 2")
        for prompt in self.prompts:
            check_text(prompt)
            if not prompt.strip():
                raise InputError("a prompt is empty")
        if self.on_engine and self.teacher:
            raise InputError(f"--teacher runs in torch only: an engine holds the student, not --runner {self.runner}")
        if self.on_engine:
            refuse_unused(self, f"with --runner {self.runner}, whose engine holds the model", "model")
        else:
            refuse_unused(self, f"with --runner {self.runner}", "engine")
        if self.teacher:
            refuse_unused(self, "with --teacher", "student", "lora_scale")
            if self.guidance == 1:
                refuse_unused(self, "with --guidance 1, which is one pass", "negative_prompt", "guider")
        if self.runner != "torch":
            refuse_unused(self, f"with --runner {self.runner}, where the LoRA is merged", "lora_scale")
        if self.runner != "compiled":
            refuse_unused(self, f"with --runner {self.runner}: it is for --runner compiled", "max_autotune")
        if self.runner != "onnx":
            refuse_unused(self, f"with --runner {self.runner}: it is for ONNX Runtime's graphs", "precision")

    @property
    def on_engine(self) -> bool:
        """Whether an exported engine draws."""
        return self.runner in EXPORTED

    @property
    def total_steps(self) -> int:
        """Denoising steps over all images."""
        return len(self.prompts) * (self.steps or STEPS)
