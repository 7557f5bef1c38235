"""What `boostdiff bench` and its subcommands measure: each option is a field here, and written once.

Nothing at the top of this module imports torch: the help of a command must not wait for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..engine import embedded
from ..engine.errors import InputError
from ..engine.options import (
    STEPS,
    MaxAutotuneOption,
    SamplerOption,
    SeedOption,
    SpacingOption,
    StudentsSamplerOption,
    StudentsStepsOption,
    check_options,
    refuse_unused,
)

if TYPE_CHECKING:
    import torch


SAMPLER_NAMES = {"ddim": "DDIM", "dpm++": "DPM-Solver++", "unipc": "UniPC", "euler": "Euler"}


GuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale w, for guidance-conditioned students.", show_default="the scale that was distilled"
    ),
]


def comma_separated(
    option: str, convert: Callable[[str], Any], example: str, least: float | None = None
) -> Callable[[Any], Any]:
    """A parser of an option's `1,2,4` to a tuple, each value once; what is no text is taken as it is.

    `least` is the smallest number that can be used; then none may be infinite or NaN, either.
    """

    def parse(text: Any) -> Any:
        try:
            values = tuple(dict.fromkeys(map(convert, text.split(",")))) if isinstance(text, str) else text
        except ValueError:
            raise InputError(f"{option} {text!r} is no comma-separated list such as {example}") from None
        if least is not None and isinstance(text, str) and not all(least <= value < math.inf for value in values):
            raise InputError(f"{option} must be at least {least:g}, as in {option} {example}")
        return values

    return parse


parse_batch_sizes = comma_separated("--batch-sizes", int, "1,2,4", least=1)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(ABC):
    """What all that sample images share; `samples` 0 samples none."""

    samples: Annotated[int, typer.Option(help="Images per row, for quality (N).")] = 200
    seed: SeedOption = 0
    timestep_spacing: SpacingOption = None
    sampling_batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images denoised together for quality; the teacher's UNet sees twice as many.",
            show_default="8 up to 512 pixels, 2 at 1024",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.samples < 0 or self.samples == 1:
            instead = ", or --speed-only" if isinstance(self, BenchConfig) else ""
            raise InputError(f"--samples {self.samples} has no distribution: pass at least 2{instead}")
        check_options(self)

    @abstractmethod
    def image_steps(self, students: int) -> int:
        """Denoising steps of single images, of all rows together at most, with so many students."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(SamplingConfig):
    """`boostdiff bench`: speed, and quality at one setting of the sampler."""

    steps: StudentsStepsOption = None
    sampler: StudentsSamplerOption = None
    guidance: GuidanceOption = None
    batch_sizes: Annotated[
        Sequence[int] | None,
        typer.Option(
            parser=parse_batch_sizes,
            metavar="N,N,…",
            help="Batch sizes that speed is measured at.",
            show_default="8 on a CPU and for torch.compile, else 1,2,4,8,16",
        ),
    ] = None
    runs: Annotated[
        int, typer.Option(min=3, help="Timed batches per variant, 3 or more; the intervals reach 95% with 6.")
    ] = 5
    compile: Annotated[
        bool | None,
        typer.Option(
            help="Also time torch.compile. On a GPU it takes minutes per batch size.",
            show_default="for small models on CPUs with bfloat16, and with --max-autotune",
        ),
    ] = None
    max_autotune: MaxAutotuneOption = False
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(
            show_default="fp32 or fp16, what the device is faster at", help="Precision of the onnx runner's UNet."
        ),
    ] = None
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="Also evaluate what saves passes without training.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_sizes is not None and min(self.batch_sizes, default=0) < 1:
            raise InputError("--batch-sizes must be at least 1, as in --batch-sizes 1,2,4")
        if self.compile is False:
            refuse_unused(self, "with --no-compile", "max_autotune")
        if self.alternatives and not self.samples:
            raise InputError("--alternatives evaluates quality: leave --speed-only out")
        if self.alternatives and self.steps == 1:
            raise InputError("--alternatives needs --steps of at least 2: with one, no pass can be saved")

    def image_steps(self, students: int) -> int:
        steps = self.steps or STEPS
        return self.samples * ((students + 3) * steps + _swept_steps(self, steps))

    def batch_sizes_on(self, device: torch.device) -> tuple[int, ...]:
        """The batch sizes to measure on a device, ascending."""
        default = (8,) if device.type == "cpu" else (1, 2, 4, 8, 16)
        return tuple(sorted(set(self.batch_sizes or default)))

    def compiled_batch_sizes(self) -> tuple[int, ...] | None:
        """The batch sizes to measure `torch.compile` at, each of which is compiled for; None for all."""
        return None if self.batch_sizes else (8,)


def _swept_steps(config: BenchConfig | ComposeConfig, steps: int) -> int:
    """Of all training-free baselines at so many steps' cost, at most; 0 if they are not asked for."""
    from .quality.baselines import SPACINGS, candidates

    spacings = (None,) if config.timestep_spacing else SPACINGS
    swept = candidates(steps=steps, guidance=1.0, spacings=spacings) if config.alternatives else []
    return sum(one.steps for one in swept)


@dataclass(frozen=True, kw_only=True)
class Table1Config(SamplingConfig):
    """`boostdiff bench table1`: distances over samplers and steps."""

    samplers: Annotated[
        Sequence[str],
        typer.Option(
            parser=comma_separated("--samplers", str, "ddim,dpm++"),
            metavar="NAME,NAME,…",
            help="Samplers, a column each per number of steps.",
        ),
    ] = tuple(SAMPLER_NAMES)
    steps: Annotated[
        Sequence[int],
        typer.Option(parser=comma_separated("--steps", int, "20,50"), metavar="N,N,…", help="Sampling steps."),
    ] = (20, 50)
    guidance: GuidanceOption = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for sampler in self.samplers:
            if sampler not in SAMPLER_NAMES:
                raise InputError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLER_NAMES)}")
        if min(self.steps, default=0) < 1:
            raise InputError("--steps must be at least 1")

    def image_steps(self, students: int) -> int:
        return self.samples * (students + 2) * len(self.samplers) * sum(self.steps)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SamplingConfig):
    """`boostdiff bench sweep`: distances over guidance scales."""

    guidance: Annotated[
        Sequence[float],
        typer.Option(
            parser=comma_separated("--guidance", float, "1,2,3,5"), metavar="W,W,…", help="Guidance scales w, from 1."
        ),
    ] = (1.0, 2.0, 3.0, 5.0)
    steps: StudentsStepsOption = None
    sampler: StudentsSamplerOption = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for scale in self.guidance:
            if not 1 <= scale < float("inf"):
                raise InputError(f"--guidance {scale:g} can't be used: guidance must be at least 1")

    def image_steps(self, students: int) -> int:
        return self.samples * len(self.guidance) * (students + 1) * (self.steps or STEPS)


@dataclass(frozen=True, kw_only=True)
class ComposeConfig(SamplingConfig):
    """`boostdiff bench compose`: quality beside time, over numbers of steps and runners."""

    steps: Annotated[
        Sequence[int],
        typer.Option(
            parser=comma_separated("--steps", int, "20,10,5", least=1),
            metavar="N,N,…",
            help="Sampling steps; all is compared with the guided teacher in the most.",
        ),
    ] = (20, 10, 5)
    sampler: SamplerOption = "ddim"
    guidance: GuidanceOption = None
    runs: Annotated[int, typer.Option(min=3, help="Timed batches per row; the intervals reach 95% with 6.")] = 5
    runner: Annotated[
        Literal["torch", "captured", "compiled"] | None,
        typer.Option(
            help="What executes the rows that are no engines': torch, captured (a CUDA graph of it), compiled "
            "(torch.compile).",
            show_default="torch on a GPU; small models on a CPU: compiled where it has bfloat16, else ONNX Runtime",
        ),
    ] = None
    max_autotune: MaxAutotuneOption = False
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="Also what saves passes without training, in the most steps.")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 4:
            raise InputError("--samples must be at least 4: intervals need as many")
        if min(self.steps, default=0) < 1:
            raise InputError("--steps must be at least 1")
        if self.alternatives and max(self.steps) == 1:
            raise InputError("--alternatives needs --steps of at least 2: with one, no pass can be saved")

    def image_steps(self, students: int) -> int:
        most = max(self.steps)
        return self.samples * ((students + 1) * sum(self.steps) + most + _swept_steps(self, most))


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What images are compared by."""

    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of real images: adds distances to them.", show_default="emoji64's real images"),
    ] = None
    reference_size: Annotated[
        int | None,
        typer.Option(help="Cut the real images to squares of this many pixels.", show_default="images as they are"),
    ] = None
    inception_weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights of torch-fidelity's InceptionV3: FID in place of FD on EfficientNet-Lite0.",
            show_default="none",
        ),
    ] = None
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP model, a folder or a hub id: adds the CLIP score.", show_default="emoji64's caption model"
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.reference is not None and not self.reference.exists():
            raise InputError(f"there is no reference folder {self.reference}")
        if self.reference_size is not None and self.reference_size < 8:
            raise InputError("--reference-size must be at least 8 pixels")
        if self.reference_size is not None and (self.reference is None or self.reference.is_file()):
            raise InputError("--reference-size cuts real images: pass their folder with --reference")
        if self.inception_weights is not None and not self.inception_weights.is_file():
            raise InputError(f"there is no file of Inception weights {self.inception_weights}")
        if self.inception_weights is not None and self.reference is None:
            raise InputError("FID is a distance to real images: pass --reference DIR with --inception-weights")

    def for_model(self, model: str) -> Metrics:
        """With what the embedded model brings, where nothing else is named."""
        if model != embedded.MODEL_NAME:
            return self
        clip = self.clip or str(embedded.CAPTION_MODEL)
        return replace(self, reference=self.reference or embedded.REFERENCE, clip=clip)
