"""Where training states come from: what all sources have in common.

Everything random is drawn from (seed, counter) pairs, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..engine.conditions import TextEmbeddings
from ..engine.model import Model
from .negatives import NegativePrompts
from .objective import NoiseSchedule
from .order import Share
from .text_store import TextCache, TextStore


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Noisy latents to train on.

    Attributes:
        z_t: `(B, C, H, W)` float32 latents.
        t: `(B,)` int64 indices of timesteps in the `NoiseSchedule`.
        prompts: B texts.
        negative_prompts: likewise; see `NegativePrompts.draw`.
        text: embeddings of both, float32.
        guidance: `(B,)` guidance scales, float32.
        teacher_x: targets `(B, C, H, W)`, once they are there.
    """

    z_t: torch.Tensor
    t: torch.Tensor
    prompts: Sequence[str]
    negative_prompts: Sequence[str]
    text: TextEmbeddings
    guidance: torch.Tensor
    teacher_x: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.t)

    def split(self, microbatches: int) -> list[Batch]:
        """In up to so many microbatches, whose sizes differ by one at most."""
        pieces = [piece for piece in np.array_split(np.arange(len(self)), microbatches) if len(piece)]
        return [self[int(piece[0]) : int(piece[-1]) + 1] for piece in pieces]

    def __getitem__(self, rows: slice) -> Batch:
        taken: dict[str, Any] = {name: None if each is None else each[rows] for name, each in vars(self).items()}
        return Batch(**taken)


class Source(ABC):
    """A supply of batches. What it gives depends on seeds and on the share's batch size, not on the processes."""

    def __init__(
        self,
        model: Model,
        schedule: NoiseSchedule,
        *,
        share: Share,
        seed: int,
        guidance: tuple[float, float],
        negatives: NegativePrompts | None = None,
        store: TextStore | None = None,
    ) -> None:
        """Guidance scales are drawn between the two; texts are embedded by the model, or read from a store."""
        self.model, self.schedule, self.share, self.seed = model, schedule, share, seed
        self.guidance_bounds = guidance
        self.embed = TextCache(model, store=store)
        self.negatives = negatives or NegativePrompts(model)

    def text(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> TextEmbeddings:
        """Embeddings of a batch's texts."""
        return TextEmbeddings(
            conditional=self.embed(prompts), unconditional=self.negatives.embeddings(negative_prompts)
        )

    @abstractmethod
    def batch(self, update: int) -> Batch:
        """This process's samples of one update."""

    def advance(self, teacher_x: torch.Tensor) -> None:
        """Take the teacher's x̂_w `(B, C, H, W)` for the last batch."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold for this source to continue, the same in every process; called in every one."""
        return {}

    def notes(self) -> Counter[str]:
        """How many samples were left out or are used in part, by reason, in all processes; called in every one."""
        return Counter()

    def restore(self, state: dict[str, torch.Tensor], notes: Counter[str]) -> None:
        """Continue from `state()` and `notes()`."""


def draw_guidance(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A guidance scale, uniform between two bounds."""
    low, high = bounds
    return low + (high - low) * random.random()
