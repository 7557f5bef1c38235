"""Whether images have the background that their captions name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .palette import background_of, named_background


def backgrounds(prompts: Sequence[str], images: torch.Tensor) -> torch.Tensor:
    """Of uint8 images `(N, 3, H, W)`, `(N,)` int8: 1 over the background that the prompt names, 0 over another.

    −1 where the prompt names none.
    """
    found = torch.full((len(prompts),), -1, dtype=torch.int8)
    named = [(i, name) for i, prompt in enumerate(prompts) if (name := named_background(prompt))]
    if named:
        seen = background_of(images[[i for i, _ in named]].permute(0, 2, 3, 1).numpy())
        for (index, name), got in zip(named, seen, strict=True):
            found[index] = got == name
    return found
