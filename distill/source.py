"""Where training states come from: what all sources have in common.

Everything random is drawn from (seed, counter) pairs, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engine.families import PromptEmbeds, TextEmbeddings
from ..engine.model import Model


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Noisy latents to train on.

    Attributes:
        z_t: `(B, C, H, W)` float32 latents.
        t: `(B,)` int64 timesteps.
        text: embeddings of B prompts, float32.
        guidance: `(B,)` guidance scales, float32.
    """

    z_t: torch.Tensor
    t: torch.Tensor
    text: TextEmbeddings
    guidance: torch.Tensor

    def __len__(self) -> int:
        return len(self.t)

    def split(self, parts: int) -> list[Batch]:
        """In up to `parts` batches of about equal size."""
        bounds = [piece for piece in np.array_split(np.arange(len(self)), parts) if len(piece)]
        return [
            Batch(
                z_t=self.z_t[rows.start : rows.stop],
                t=self.t[rows.start : rows.stop],
                text=self.text[rows.start : rows.stop],
                guidance=self.guidance[rows.start : rows.stop],
            )
            for rows in (slice(int(piece[0]), int(piece[-1]) + 1) for piece in bounds)
        ]


class Source(ABC):
    """A supply of batches. What it gives depends on seeds and on the share's batch size, not on the processes."""

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
    """Embeddings of prompts, each computed once, kept on the CPU; the oldest go when memory runs short."""

    def __init__(self, model: Model, limit: int = 2**30) -> None:
        self.model, self.limit, self.bytes = model, limit, 0
        self._kept: OrderedDict[str, PromptEmbeds] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of B prompts, float32, on the model's device.

        One at a time goes through the text encoder: the batch around a prompt changes its last bits, and a resumed run
        must give the bytes of an uninterrupted one.
        """
        for prompt in prompts:
            if prompt not in self._kept:
                embeds = self.model.family.embed(self.model.pipeline, [prompt]).to("cpu")
                self._kept[prompt] = embeds
                self.bytes += sum(tensor.nbytes for tensor in embeds.tensors().values())
        found = PromptEmbeds.cat([self._kept[prompt] for prompt in prompts])
        while self.bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in oldest.tensors().values())
        return found.to(self.model.device, torch.float32)


def draw_guidance(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A guidance scale, uniform between two bounds."""
    low, high = bounds
    return low + (high - low) * random.random()
