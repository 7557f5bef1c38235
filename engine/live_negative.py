"""Live negative prompts: a student that takes a prompt and a negative prompt in one pass.

Its cross-attention reads both texts, apart: a = a_n + s (a_c − a_n), where a_c attends to the prompt and a_n to the
negative prompt. The scale s is learned, one per head, and depends on the timestep, since it is read off the UNet's time
embedding. Of a guidance-conditioned student s − 1 grows as w − 1, as what the student has to learn does; scaled after
training (`LiveNegative.scale`), faster.

In a stock diffusers pipeline: `LiveNegative.load(pipe.unet, folder)`, and as `prompt_embeds` the negative prompt's
embeddings and the prompt's, joined along the tokens in this order, with `guidance_scale=1`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file, save_file

from .adapters import Adapter, copy_by_name
from .conditions import BOTH_TEXTS
from .errors import InputError

LIVE_FILE = "negative_attention.safetensors"

INITIAL_SCALE = 1.2
"""s before training, of a range at w = 3: 1 is attention to the prompt alone, more leads away from the other text."""

GAIN = 10.0
"""Factor of what is trained in s: a few numbers that must move far at the learning rate of a whole LoRA."""


class _Shared:
    """What all processors of a UNet share.

    Attributes:
        enabled: whether the UNet is the student; else it attends as the base does.
        time_embedding: the newest, `(B, E)`: attention processors are not given it.
        growth: the newest `growth_at` w, `(B, 1)`, of a guidance-conditioned student, else None.
        rise: s − 1 is multiplied by exp(rise · growth).
    """

    def __init__(self) -> None:
        self.enabled = True
        self.rise = 0.0
        self.time_embedding: torch.Tensor | None = None
        self.growth: torch.Tensor | None = None

    def __call__(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """As a forward hook of the UNet's `time_embedding`."""
        self.time_embedding = output
        embedding = inputs[1] if len(inputs) > 1 else None
        if embedding is None:
            self.growth = None
            return
        # The slowest sine of the guidance embedding, sin((w − 1) / 10).
        slowest = embedding.shape[1] // 2 - 1
        self.growth = 5 * embedding[:, slowest : slowest + 1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the UNet has no use for another's activations, which torch can't copy while they carry gradients.
        return {"enabled": self.enabled, "rise": self.rise, "time_embedding": None, "growth": None}


def growth_at(guidance: float) -> float:
    """What s − 1 grows by with the guidance scale w: 5 sin((w − 1) / 10), about (w − 1) / 2."""
    return 5 * math.sin((guidance - 1) / 10)


class LiveNegativeAttention(torch.nn.Module):
    """Attention processor: cross-attention to two texts.

    Attributes:
        stock: the processor that was there before; decides how attention is computed.
        scale: `(heads,)`, what is added to `INITIAL_SCALE`, over `GAIN`; of a range at w = 3.
        slope: `(heads, E)`, the same per column of the time embedding.
    """

    def __init__(self, attention: Attention, shared: _Shared, width: int) -> None:
        super().__init__()
        self.stock: Any = attention.processor
        self.shared = shared
        device = attention.to_q.weight.device
        self.scale = torch.nn.Parameter(torch.zeros(attention.heads, device=device))
        self.slope = torch.nn.Parameter(torch.zeros(attention.heads, width, device=device))

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `AttnProcessor2_0`, with `encoder_hidden_states` `(B, 2L, D)`: the negative prompt's L tokens come first.

        Raises:
            ValueError: the number of tokens is odd.
        """
        if not self.shared.enabled:
            output: torch.Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return output
        assert encoder_hidden_states is not None
        assert self.shared.time_embedding is not None
        if encoder_hidden_states.shape[1] % 2:
            raise ValueError(BOTH_TEXTS)
        text = attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
        query = _by_head(attn.to_q(hidden_states), attn.heads)
        keys, values = (layer(text).unflatten(1, (2, -1)).unbind(dim=1) for layer in (attn.to_k, attn.to_v))
        negative, prompt = (
            self._attend(attn, query, _by_head(key, attn.heads), _by_head(value, attn.heads))
            for key, value in zip(keys, values, strict=True)
        )
        embedding = torch.nn.functional.silu(self.shared.time_embedding)
        scale = INITIAL_SCALE - 1 + GAIN * (self.scale + embedding @ self.slope.T)
        if (growth := self.shared.growth) is not None:
            scale = growth * scale
            if self.shared.rise:
                scale = torch.exp(self.shared.rise * growth) * scale
        scale = 1 + scale
        attended = negative + scale[:, :, None, None].to(prompt.dtype) * (prompt - negative)
        dropout = attn.to_out[1]
        return dropout(attn.to_out[0](attended.transpose(1, 2).flatten(2))) / attn.rescale_output_factor

    def _attend(self, attn: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Each `(B, heads, …, width of a head)`; by plain matrix products where the stock processor takes them."""
        if isinstance(self.stock, AttnProcessor):
            weights = attn.get_attention_scores(query.flatten(0, 1), key.flatten(0, 1))
            return torch.bmm(weights, value.flatten(0, 1)).reshape(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)


def _by_head(states: torch.Tensor, heads: int) -> torch.Tensor:
    """`(B, N, heads · width)` as `(B, heads, N, width)`."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def attach(unet: UNet2DConditionModel) -> dict[str, LiveNegativeAttention]:
    """Put processors on every cross-attention; by the attention's name.

    Raises:
        InputError: the UNet has none, attends in another mode, or takes the text in elsewhere, too.
    """
    if unet.config.get("addition_embed_type") == "text":
        raise InputError("--negative-prompt live can't be used: this UNet adds its text to the timestep, too")
    shared = _Shared()
    attentions = {n: m for n, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    if not attentions or not all(
        isinstance(m.processor, AttnProcessor | AttnProcessor2_0) for m in attentions.values()
    ):
        raise InputError("--negative-prompt live can't be used: this UNet has no plain cross-attention to the text")
    unet.time_embedding.register_forward_hook(shared)
    width = unet.time_embedding.linear_2.out_features
    processors = {name: LiveNegativeAttention(m, shared, width) for name, m in attentions.items()}
    for name, processor in processors.items():
        attentions[name].set_processor(processor)
    unet.register_to_config(live_negative_prompt=True)
    return processors


class LiveNegative(Adapter):
    """Another adapter, and with it cross-attention to two texts."""

    file = LIVE_FILE

    def __init__(self, unet: UNet2DConditionModel, inner: Adapter) -> None:
        super().__init__(unet)
        self.inner = inner
        self.processors = attach(unet)

    @property
    def shared(self) -> _Shared:
        """What the processors share."""
        return next(iter(self.processors.values())).shared

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {**self.inner.parameters(), **_scales(self.processors)}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.shared.enabled = False
        try:
            with self.inner.disabled():
                yield
        finally:
            self.shared.enabled = True

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the other adapter, and the scales in a file beside it."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in _scales(self.processors).items()}
        if rise := self.shared.rise:
            tensors["rise"] = torch.tensor(rise)
        save_file(tensors, folder / LIVE_FILE)
        return [*self.inner.save(folder, pipeline), folder / LIVE_FILE]

    @staticmethod
    @torch.no_grad()
    def load(unet: UNet2DConditionModel, folder: str | Path) -> None:
        """See `Adapter.load`, of the scales; the other adapter has a file of its own."""
        processors = attach(unet)
        _read(processors, Path(folder))
        for processor in processors.values():
            processor.to(unet.dtype).requires_grad_(False)

    @torch.no_grad()
    def scale(self, factor: float, largest: float | None = None) -> None:
        """Multiply s − 1, at every head and timestep; the other adapter stays as it is."""
        if largest is not None:
            # By the whole factor at the largest guidance scale, by hardly any near 1, where no guidance is missing.
            self.shared.rise += math.log(factor) / growth_at(largest)
            return
        for processor in self.processors.values():
            processor.scale.mul_(factor).add_((factor - 1) * (INITIAL_SCALE - 1) / GAIN)
            processor.slope.mul_(factor)

    def load_for_training(self, folder: Path) -> None:
        self.inner.load_for_training(folder)
        _read(self.processors, folder)


def _read(processors: dict[str, LiveNegativeAttention], folder: Path) -> None:
    tensors = load_file(folder / LIVE_FILE)
    next(iter(processors.values())).shared.rise = float(tensors.pop("rise", 0.0))
    copy_by_name(_scales(processors), tensors)


def _scales(processors: dict[str, LiveNegativeAttention]) -> dict[str, torch.nn.Parameter]:
    return {f"{name}.{key}": p for name, each in processors.items() for key, p in each.named_parameters()}
