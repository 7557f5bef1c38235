"""The options of `boostdiff distill`: what determines the adapter, and how the run is executed.

Nothing here imports torch: the help of a command must not wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..engine.embedded import TRAIN_PROMPTS
from ..engine.errors import InputError
from ..engine.guiders import GuiderOptions
from ..engine.options import UNRESOLVED, SeedOption, check_options, refuse_unused

PAPER: dict[str, Any] = {
    "updates": 1600,
    "batch_size": 512,
    "reuse": 1,
    "learning_rate": 5e-5,
    "loss_weight": "constant",
}
"""`--preset paper`: BoostDiff's run on Stable Diffusion 2.1 base (474,741 LAION pairs)."""

UPDATES, BATCH_SIZE, LOSS_WEIGHT = 520, 16, "snr"
"""Where neither the user nor the preset says: 8,320 samples, minutes of two CPU cores on `emoji64`."""

REUSE = 2
"""The second time a prediction of the teacher serves as well as a new one: docs/distillation.md, "Recipes"."""

LEARNING_RATES = {"lora": 4e-3, "dora": 4e-3, "bitfit": 1e-2, "soft-prompt": 1e-2}
"""That of LoRA was chosen on `emoji64` at this budget: docs/distillation.md, "Recipes"."""

ADAPTER_SCALES = {"lora": 1.2, "bitfit": 1.4}
NORMS_SCALES = {"lora": 1.1, "bitfit": 1.2}
"""With `--norms`."""

LIVE_SCALE = 1.75
"""All of `emoji64` at one guidance scale: docs/distillation.md, "Adapter scale". All else has 1."""

OTHER_MODELS = 1 / 40
"""Factor of the learning rate for other models than `emoji64`: 1e-4 for LoRA, as is usual for Stable Diffusion."""

LARGEST_LIVE = 15.0
"""Upper end of a live student's range of w: the sine that its scales grow by turns back at 16.7."""
MAX_SCALE = 10_000
"""Of a guidance scale and of LoRA alpha: beyond, numbers overflow in training."""

LIVE = "live"
"""The `--negative-prompt` of a student that takes any."""

RANGE_UPDATES = 4
"""Factor of the updates of a guidance-conditioned student: it learns many scales; figures in docs/distillation.md."""

STAGE_LOSS_WEIGHT: Literal["clamped-snr"] = "clamped-snr"
"""Of the stages of `--few-steps`. Truncated SNR (Salimans & Ho 2022, §4) gives more than half of the loss to the first
step, which changes x̂ most by far."""

STAGE_RATE = 1 / 5
"""Factor of the learning rate in these stages. Two steps of a student differ little from one: at the full rate the
first updates undo more than a short stage learns (docs/experiments.md, "Few steps")."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(GuiderOptions):
    """Everything that determines the trained adapter.

    Attributes:
        guidance: guidance scale w to distill in, above 1; the lower end of a range may be 1.
        guidance_max: upper end of a range that begins at `guidance`; the student is then guidance-conditioned.
        learning_rate: AdamW's peak; linear warm-up over 5% of the updates, then a cosine decay to zero.
        adapter_scale: applied at the end; None for adapters that aren't scaled, or have been.
        precision: that of the forward passes (autocast); adapters are always float32.
    """

    method: Annotated[Literal["lora", "dora", "bitfit", "soft-prompt"], typer.Option(help="Adapter.")] = "lora"
    rank: Annotated[int, typer.Option(min=1, max=4096, help="LoRA and DoRA rank.")] = 8
    alpha: Annotated[
        float | None,
        typer.Option(show_default="the rank", help="LoRA and DoRA alpha; the update is scaled by alpha/rank."),
    ] = None
    targets: Annotated[
        str,
        typer.Option(help="Layers of LoRA and DoRA: attention, transformer, all, or endings of names: to_q,to_v."),
    ] = "attention"
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Learned tokens of a soft prompt.")] = 16
    norms: Annotated[
        bool, typer.Option("--norms", help="Also train the UNet's normalizations, which no LoRA file holds.")
    ] = False
    guidance: float = 3.0
    guidance_max: float | None = None
    negative_prompt: Annotated[
        str,
        typer.Option(
            show_default="none",
            help="Negative prompt to distill in, too; [bold]live[/]: the student takes any, at each image.",
        ),
    ] = ""
    prompts: Annotated[
        Path | None,
        typer.Option(
            show_default="emoji64's own",
            help="File with one prompt per line, JSON lines, CSV, or COCO captions: trains on online trajectories.",
        ),
    ] = None
    images: Annotated[
        str | None,
        typer.Option(
            show_default="none: online trajectories",
            help="Captioned images: a folder, WebDataset tars, Parquet, or a dataset id.",
        ),
    ] = None
    preset: Annotated[
        Literal["paper"] | None,
        typer.Option(show_default="none", help="[bold]paper[/]: 1600 updates of 512 at 5e-5, constant weight."),
    ] = None
    updates: Annotated[
        int,
        typer.Option(
            min=1,
            show_default="520; guidance-conditioned 4 times as many",
            help="Optimizer updates.",
        ),
    ] = UNRESOLVED
    batch_size: Annotated[
        int, typer.Option(min=1, show_default="16", help="Samples per update, over all processes.")
    ] = UNRESOLVED
    reuse: Annotated[
        int,
        typer.Option(
            min=1,
            show_default=f"{REUSE}; 1 for an odd --batch-size",
            help="Updates that each of the teacher's predictions is used in.",
        ),
    ] = UNRESOLVED
    learning_rate: Annotated[
        float,
        typer.Option(
            show_default="4e-3; bitfit, soft-prompt 1e-2; a fortieth for other models than emoji64",
            help="Peak learning rate.",
        ),
    ] = UNRESOLVED
    loss_weight: Annotated[
        Literal["constant", "snr", "truncated-snr", "snr+1", "min-snr", "clamped-snr", "flow"],
        typer.Option(
            show_default="snr; snr+1 with zero terminal SNR; flow for flow matching",
            help="Weight of the x-space loss over noise levels; the paper's is constant.",
        ),
    ] = UNRESOLVED
    adapter_scale: Annotated[
        float,
        typer.Option(
            show_default="emoji64 1.2, with bitfit 1.4, with live 1.75; ranges and other models 1",
            help="Factor, up to 3, on the trained LoRA or BitFit; with a live negative prompt on how far the prompt "
            "leads away from it (at the upper end of a range): a student learns less guidance than its teacher has.",
        ),
    ] = UNRESOLVED
    few_steps: Annotated[
        str | None,
        typer.Option(
            metavar="START:END",
            show_default="none",
            help="Then distill the student progressively, from START DDIM steps to END, halving: 32:4 is 16, 8, 4.",
        ),
    ] = None
    stage_updates: Annotated[
        int, typer.Option(min=1, show_default="520; guidance-conditioned 4 times as many", help="Updates per halving.")
    ] = UNRESOLVED
    start_from: Annotated[
        Path | None,
        typer.Option(show_default="none: one is trained first", help="Student that --few-steps begins with."),
    ] = None
    base_precision: Annotated[
        Literal["int8"] | None,
        typer.Option(
            show_default="that of --precision; on a CPU fp32",
            help="Precision of the frozen linear layers' weights: int8 takes half of bf16's memory.",
        ),
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(show_default="bf16 where the device has it, else fp32", help="Precision of the forward passes."),
    ] = UNRESOLVED
    seed: SeedOption = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used, or would not be used.
        """
        super().__post_init__()
        if not 1 <= self.guidance <= MAX_SCALE or not 1 <= (self.guidance_max or 1) <= MAX_SCALE:
            raise InputError(
                f"--guidance {self.guidance:g} can't be used: it must be a number above 1, at most {MAX_SCALE}; "
                "a range may begin at 1"
            )
        if self.guidance == 1 and self.guidance_max is None:
            raise InputError("--guidance 1 is no guidance, there is nothing to distill: it must be above 1")
        if self.guidance_max is not None and self.guidance_max <= self.guidance:
            raise InputError(f"--guidance {self.guidance:g}:{self.guidance_max:g} is no range: write LOW:HIGH")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise InputError("--learning-rate must lie between 0 and 1")
        if self.alpha is not None and not 0 < self.alpha <= MAX_SCALE:
            raise InputError(f"--alpha must be above 0, and at most {MAX_SCALE}")
        if self.adapter_scale is not None and not 0 < self.adapter_scale <= 3:
            raise InputError("--adapter-scale must be above 0, and at most 3")
        if unscaled := self.unscaled:
            refuse_unused(self, unscaled, "adapter_scale")
        if self.prompts and self.images:
            raise InputError("pass --prompts FILE or --images DIR, not both")
        if self.method not in ("lora", "dora"):
            refuse_unused(self, f"with --method {self.method}", "rank", "alpha", "targets")
        if self.live_negative_prompt and (self.guidance_max or 1) > LARGEST_LIVE:
            raise InputError(
                f"--guidance of a live negative prompt ends at {LARGEST_LIVE:g}, as its scales can't grow on"
            )
        if self.live_negative_prompt and self.method == "soft-prompt":
            raise InputError(
                "--negative-prompt live does not go with --method soft-prompt, whose tokens join the prompt"
            )
        others = "norms" if self.method == "soft-prompt" else "tokens"
        refuse_unused(self, f"with --method {self.method}", others)
        if self.base_precision and (self.method not in ("lora", "bitfit") or self.few_steps):
            with_it = "--few-steps" if self.few_steps else f"--method {self.method}"
            raise InputError(f"--base-precision {self.base_precision} does not go with {with_it}")
        if self.few_steps is None:
            refuse_unused(self, "without --few-steps", "stage_updates", "start_from")
        if self.start_from:
            refuse_unused(self, "with --start-from, which has been trained", "updates", "loss_weight", "preset")
        _ = self.stages

    @property
    def unscaled(self) -> str:
        """Why the adapter isn't scaled at the end, to follow "is not used"; "" where it may be."""
        if not self.live_negative_prompt:
            if self.method not in ADAPTER_SCALES:
                return f"with --method {self.method}"
            if self.guidance_conditioned:
                return "with a range of --guidance"
        return "with --start-from, whose adapter has been scaled" if self.start_from else ""

    @property
    def new_samples(self) -> int:
        """Samples per update that the teacher predicts anew."""
        return self.batch_size // self.reuse

    @property
    def guidance_bounds(self) -> tuple[float, float]:
        """Smallest and largest guidance that is trained."""
        return self.guidance, self.guidance if self.guidance_max is None else self.guidance_max

    @property
    def live_negative_prompt(self) -> bool:
        """Whether the student takes any negative prompt."""
        return self.negative_prompt == LIVE

    @property
    def fixed_negative_prompt(self) -> str:
        """The negative prompt that is distilled in; of a live one its default."""
        return "" if self.live_negative_prompt else self.negative_prompt

    @property
    def stages(self) -> list[int]:
        """Numbers of steps of the few-step students, the last one's last; none without `few_steps`.

        Raises:
            InputError: `few_steps` is no START:END.
        """
        if self.few_steps is None:
            return []
        start, _, end = self.few_steps.partition(":")
        steps, last = (int(part) if part.isdecimal() else 0 for part in (start, end))
        stages = []
        while steps > last > 0 and steps % 2 == 0:
            steps //= 2
            stages.append(steps)
        if not stages or steps != last:
            raise InputError(
                f"--few-steps {self.few_steps} can't be used: write START:END, where START is END doubled once or more "
                "often, such as 32:4"
            )
        return stages

    @property
    def guidance_conditioned(self) -> bool:
        """Whether the student has guidance as an input (w-conditioned, Meng et al. 2023)."""
        return self.guidance_max is not None

    def resolved(
        self, *, in_bfloat16: bool, embedded: bool, flow: bool = False, zero_terminal_snr: bool = False
    ) -> DistillConfig:
        """With what was left out filled in from the preset, the method and the device.

        Args:
            in_bfloat16: whether the device has bfloat16 instructions.
            embedded: whether the model is the one that ships with prompts.
            flow: whether the model is one of flow matching.
            zero_terminal_snr: whether its last timestep has no signal, which "snr" would not train.

        Raises:
            InputError: a batch can't be shared between new and earlier samples.
        """
        updates = UPDATES * (RANGE_UPDATES if self.guidance_conditioned else 1)
        weight = "flow" if flow else "snr+1" if zero_terminal_snr else LOSS_WEIGHT
        scales = NORMS_SCALES if self.norms else ADAPTER_SCALES
        scale = LIVE_SCALE if self.live_negative_prompt else scales.get(self.method, 1.0)
        defaults: dict[str, Any] = {
            "updates": None if self.start_from else updates,
            "stage_updates": updates if self.few_steps else None,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATES[self.method] * (1 if embedded else OTHER_MODELS),
            "loss_weight": None if self.start_from else weight,
            "precision": "bf16" if in_bfloat16 else "fp32",
            "adapter_scale": None if self.unscaled else scale if embedded and not self.guidance_conditioned else 1.0,
            "guider": "cfg",
            **self.guider_settings,
            **(PAPER if self.preset else {}),
        }
        if embedded and self.images is None:
            defaults["prompts"] = TRAIN_PROMPTS
        chosen = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        if chosen.reuse is None:
            chosen = replace(chosen, reuse=math.gcd(REUSE, chosen.batch_size))
        if chosen.batch_size % chosen.reuse:
            raise InputError(f"--batch-size {chosen.batch_size} must be a multiple of --reuse {chosen.reuse}")
        return chosen


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run is executed: all of it may be another when a run is resumed."""

    resume: Annotated[bool, typer.Option("--resume", help="Continue a run, or rescale a finished student.")] = False
    max_bad_samples: Annotated[
        int, typer.Option(min=0, help="Unreadable samples of --images to skip in an epoch before the run stops.")
    ] = 0
    gradient_accumulation_steps: Annotated[
        int, typer.Option(min=1, help="Microbatches per update; more when out of memory.")
    ] = 1
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations, to save memory.")
    ] = False
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: the first update takes minutes, later ones less.")
    ] = False
    cache_text: Annotated[
        Path | None,
        typer.Option(
            show_default="none",
            help="Folder of the prompts' embeddings: made once by the text encoders, which then take no memory.",
        ),
    ] = None
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Updates between checkpoints.")] = 50
    preview_every: Annotated[
        int | None, typer.Option(min=1, show_default="never", help="Updates between preview grids in previews/.")
    ] = None
    log_with: Annotated[
        Literal["tensorboard", "trackio", "wandb"] | None,
        typer.Option(show_default="none", help="Tracker to log to, too."),
    ] = None
    format: Annotated[
        Literal["kohya"] | None,
        typer.Option(show_default="none", help="Also write the LoRA as ComfyUI and A1111 read it."),
    ] = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        check_options(self)


def parse_guidance(text: str) -> tuple[float, float | None]:
    """`3.0` or a range `1.5:7.5`, as (guidance, guidance_max).

    Raises:
        InputError: it is neither.
    """
    low, colon, high = text.partition(":")
    try:
        return float(low), float(high) if colon else None
    except ValueError:
        raise InputError(f"--guidance {text!r} is neither a number nor a range LOW:HIGH") from None


def learning_rate_at(update: int, config: DistillConfig) -> float:
    """Linear warm-up over 5% of the updates, then a cosine decay to zero."""
    warmup = max(1, config.updates // 20)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, config.updates - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
