"""Negative prompts to train with: one for all samples, or for a student that takes any a random one for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engine.conditions import PromptEmbeds
from ..engine.model import Model
from .text_store import TextCache, TextStore

COMMON = (
    "blurry",
    "low quality, worst quality",
    "deformed, disfigured, bad anatomy, extra limbs",
    "text, watermark, signature",
    "oversaturated, overexposed",
    "cropped, out of frame",
    "grainy, noise, jpeg artifacts",
    "monochrome, dull colors",
)
"""As people write them for Stable Diffusion."""

EMPTY, WHOLE, WORDS = 0.5, 0.15, 0.25
"""Shares of empty negative prompts, of other prompts, and of a few words of another prompt; the rest are `COMMON`."""

LONGEST = 4
"""Words of a part of another prompt."""


class NegativePrompts:
    """What guidance leads away from.

    Attributes:
        live: whether each sample has its own, drawn at random.
    """

    def __init__(
        self, model: Model, negative_prompt: str = "", *, live: bool = False, store: TextStore | None = None
    ) -> None:
        self.live = live
        self._embed = TextCache(model, negative=True, store=store)
        self._fixed = self._embed([negative_prompt])

    def draw(self, random: np.random.Generator, prompts: Sequence[str]) -> str:
        """One for a sample; where it is the same for all, nothing is drawn.

        Args:
            random: source of all choices.
            prompts: other prompts of the data.
        """
        if not self.live:
            return ""
        share = random.random()
        if share < EMPTY:
            return ""
        if share >= EMPTY + WHOLE + WORDS:
            return COMMON[random.integers(len(COMMON))]
        prompt = prompts[int(random.integers(len(prompts)))]
        words = prompt.split()
        if share < EMPTY + WHOLE or len(words) < 2:
            return prompt
        count = int(random.integers(1, min(LONGEST, len(words) - 1), endpoint=True))
        first = int(random.integers(len(words) - count, endpoint=True))
        return " ".join(words[first : first + count]).strip(",.;: ")

    def embeddings(self, texts: Sequence[str]) -> PromptEmbeds:
        """Of what `draw` gave for B samples, float32: a batch of B, or of 1 where it is the same for all."""
        return self._embed(texts) if self.live else self._fixed
