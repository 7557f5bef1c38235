"""What determines a distillation, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.adapters import METHODS
from ..engine.errors import InputError
from .objective import LOSS_WEIGHTS

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that determines the trained adapter.

    Attributes:
        method: a name in `METHODS`.
        rank: of the low-rank methods.
        alpha: of LoRA and its kin; None takes the rank.
        targets: a key of `adapters.TARGETS`, or comma-separated endings of module names.
        tokens: of a soft prompt.
        guidance: the guidance scale w to distil in, above 1; a range may begin at 1.
        guidance_max: the other end of a range that begins at `guidance`; the student then takes w as an input.
        negative_prompt: what guidance leads away from.
        prompts: one prompt a line; the source is then online trajectories.
        images: captioned images as `image_files.open_images` takes them; the source is then diffused images.
        max_bad_samples: unreadable ones that are skipped before the run stops.
        updates: optimizer steps.
        batch_size: states an update, over all processes.
        learning_rate: peak of AdamW's; linear warm-up over 5% of the updates, then a cosine decay to zero.
        loss_weight: a key of `LOSS_WEIGHTS`.
        seed: of everything random.
        precision: of the forward passes: "fp32", "bf16" or "fp16" (autocast); adapters are float32 always.
        gradient_accumulation_steps: passes that share one update's states, to save memory; where it does not suffice
            they become more.
        gradient_checkpointing: compute activations again in the backward pass, to save more.
        compile: run the UNet through `torch.compile`.
        checkpoint_every: updates between checkpoints.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: str = "attention"
    tokens: int = 16
    guidance: float = 3.0
    guidance_max: float | None = None
    negative_prompt: str = ""
    prompts: Path | None = None
    images: str | None = None
    max_bad_samples: int = 0
    updates: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3
    loss_weight: str = "snr"
    seed: int = 0
    precision: str = "fp32"
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("loss weight", self.loss_weight, tuple(LOSS_WEIGHTS)),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in choices:
                raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
        for scale in (self.guidance, self.guidance_max):
            if scale is not None and (not scale >= 1 or math.isinf(scale)):
                raise InputError(f"--guidance {scale:g} can't be distilled: it must be at least 1")
        if self.guidance == 1 and self.guidance_max is None:
            raise InputError("--guidance 1 is no guidance, there is nothing to distil: it must be above 1")
        if self.guidance_max is not None and self.guidance_max <= self.guidance:
            raise InputError(f"--guidance {self.guidance:g}:{self.guidance_max:g} is no range: write LOW:HIGH")
        for name in ("rank", "tokens", "updates", "batch_size", "checkpoint_every", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        if self.max_bad_samples < 0:
            raise InputError("--max-bad-samples can't be negative")
        if not 0 < self.learning_rate < 1:
            raise InputError("--learning-rate must lie between 0 and 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InputError("--alpha must be above 0")
        if self.prompts and self.images:
            raise InputError("pass --prompts FILE or --images DIR, not both")

    @property
    def guidance_bounds(self) -> tuple[float, float]:
        """Smallest and largest guidance that is trained."""
        return self.guidance, self.guidance if self.guidance_max is None else self.guidance_max

    @property
    def takes_guidance(self) -> bool:
        """Whether the student has guidance as an input."""
        return self.guidance_max is not None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


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
