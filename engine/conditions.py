"""What a denoiser is told beside latents and timestep: prompts as named tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class PromptEmbeds:
    """B encoded prompts as named tensors, `(B, …)`, by the names that diffusers gives the denoiser's inputs.

    Every family has `encoder_hidden_states` `(B, L, D)`, one vector per token. Others have masks `(B, L)` of the
    tokens, or one vector per prompt.
    """

    def __init__(self, **tensors: torch.Tensor) -> None:
        """Take over the tensors, by name."""
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    @property
    def encoder_hidden_states(self) -> torch.Tensor:
        """`(B, L, D)`."""
        return self._tensors["encoder_hidden_states"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings; masks keep their own."""
        return self.encoder_hidden_states.dtype

    def __getitem__(self, index: slice | torch.Tensor) -> PromptEmbeds:
        return self.map(lambda tensor: tensor[index])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, by name."""
        return dict(self._tensors)

    def replaced(self, **tensors: torch.Tensor) -> PromptEmbeds:
        """The same with other tensors in place of some."""
        return PromptEmbeds(**self._tensors | tensors)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PromptEmbeds:
        """The function's result for every tensor."""
        return PromptEmbeds(**{name: function(tensor) for name, tensor in self._tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbeds:
        """As `torch.Tensor.to`, for all; a mask of whole numbers keeps its dtype."""
        moved = self.map(lambda tensor: tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor)
        device = moved.encoder_hidden_states.device
        return moved.map(lambda tensor: tensor.to(device))

    def expand(self, count: int) -> PromptEmbeds:
        """One prompt's embeddings for `count` images, without a copy."""
        return self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    @classmethod
    def cat(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Several in one batch; shorter texts are padded with zeros, which their masks say, too."""
        return cls(**{name: _padded([part._tensors[name] for part in parts]) for name in parts[0]._tensors})


def _padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors `(B, L, …)` of several lengths L, one below the other."""
    if tensors[0].ndim < 2 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat(
        [
            torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, longest - tensor.shape[1]))
            for tensor in tensors
        ]
    )


@dataclass(frozen=True, kw_only=True)
class TextEmbeddings:
    """Embeddings of B prompts and, for guidance, of what it leads away from.

    Attributes:
        conditional: embeddings of the prompts (c), a batch of B.
        unconditional: embeddings of the empty or a negative prompt (∅), a batch of 1, or of B negative prompts; None
            without guidance.
    """

    conditional: PromptEmbeds
    unconditional: PromptEmbeds | None

    def __len__(self) -> int:
        return len(self.conditional)

    def __getitem__(self, index: slice | torch.Tensor) -> TextEmbeddings:
        unconditional = self.unconditional
        if unconditional is not None and len(unconditional) > 1:
            unconditional = unconditional[index]
        return TextEmbeddings(conditional=self.conditional[index], unconditional=unconditional)

    def joined(self) -> PromptEmbeds:
        """Both along the tokens, `(B, 2L, D)`, the unconditional first: what a student of live negative prompts reads.

        All else, such as SDXL's pooled embedding, is the prompts'.
        """
        assert self.unconditional is not None, "encoded without the unconditional prompt"
        negative = self.unconditional.expand(len(self)).encoder_hidden_states
        tokens = torch.cat([negative, self.conditional.encoder_hidden_states], dim=1)
        return self.conditional.replaced(encoder_hidden_states=tokens)

    def both(self) -> PromptEmbeds:
        """A batch of 2B: ∅ B times, then the prompts."""
        assert self.unconditional is not None, "encoded without the unconditional prompt"
        return PromptEmbeds.cat([self.unconditional.expand(len(self)), self.conditional])

    def to(self, *args: Any, **kwargs: Any) -> TextEmbeddings:
        """As `torch.Tensor.to`, for both."""
        return TextEmbeddings(
            conditional=self.conditional.to(*args, **kwargs),
            unconditional=None if self.unconditional is None else self.unconditional.to(*args, **kwargs),
        )


BOTH_TEXTS = "a student of live negative prompts takes both texts as one: torch.cat([negative, prompt], dim=1)"


def is_live(denoiser_config: Any) -> bool:
    """Whether a denoiser of this configuration takes `TextEmbeddings.joined`; see `live_negative`."""
    return bool(denoiser_config.get("live_negative_prompt"))
