"""Where training states come from: what all sources have in common.

Everything random is drawn from (seed, counter) pairs, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..engine.conditions import PromptEmbeds, TextEmbeddings
from ..engine.model import Model
from .text_store import TextStore

if TYPE_CHECKING:
    from .negatives import NegativePrompts


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

    def split(self, parts: int) -> list[Batch]:
        """In up to `parts` batches, whose sizes differ by one at most."""
        pieces = [piece for piece in np.array_split(np.arange(len(self)), parts) if len(piece)]
        return [self[int(piece[0]) : int(piece[-1]) + 1] for piece in pieces]

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(
            z_t=self.z_t[rows],
            t=self.t[rows],
            prompts=self.prompts[rows],
            negative_prompts=self.negative_prompts[rows],
            text=self.text[rows],
            guidance=self.guidance[rows],
            teacher_x=None if self.teacher_x is None else self.teacher_x[rows],
        )


class Source(ABC):
    """A supply of batches. What it gives depends on seeds and on the share's batch size, not on the processes.

    Attributes:
        embed: embeds prompts.
        negatives: draws and embeds negative prompts.
    """

    embed: TextCache
    negatives: NegativePrompts

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


class TextCache:
    """Embeddings of prompts (or negative prompts), each computed once, kept on the CPU in at most `limit` bytes."""

    def __init__(
        self, model: Model, *, negative: bool = False, limit: int = 2**30, store: TextStore | None = None
    ) -> None:
        """Embed by the model's text encoders, or read from a store that has been filled."""
        self.model = model
        family, pipeline = model.family, model.pipeline
        if store is not None:
            # Few, as reading one again is cheap.
            self._embedded = lru_cache(maxsize=100)(lambda prompt: store.read(prompt, negative=negative))
            return
        numbers = sum(math.prod(shape) for shape in family.prompt_shapes(pipeline).values())
        # One at a time goes through the text encoder: the batch around a prompt changes its last bits, and a resumed
        # run must give the bytes of an uninterrupted one.
        self._embedded = lru_cache(maxsize=max(1, limit // (4 * numbers)))(
            lambda prompt: (
                family.embed_negative(pipeline, prompt) if negative else family.embed(pipeline, [prompt])
            ).to("cpu")
        )

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of B prompts, float32, on the model's device."""
        found = PromptEmbeds.cat([self._embedded(prompt) for prompt in prompts])
        return found.to(self.model.device, torch.float32)


def draw_guidance(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A guidance scale, uniform between two bounds."""
    low, high = bounds
    return low + (high - low) * random.random()
