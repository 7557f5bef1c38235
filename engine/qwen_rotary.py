"""Qwen-Image's rotary embeddings as ONNX graphs can have them: without complex numbers, for texts of any length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.transformers import transformer_qwenimage


@contextmanager
def rotary_for_graphs(denoiser: Any) -> Iterator[None]:
    """While a graph is traced, what diffusers computes in complex numbers is computed in real ones, of angles."""
    if not torch.compiler.is_exporting():
        yield
        return
    functions: dict[str, Any] = {"apply_rotary_emb_qwen": _rotated, "compute_text_seq_len_from_mask": _length}
    rope = denoiser.pos_embed
    with patch.multiple(transformer_qwenimage, **functions), patch.object(rope, "forward", partial(_angles, rope)):
        yield


def _length(text: torch.Tensor, mask: torch.Tensor) -> tuple[int, None, torch.Tensor]:
    """As `compute_text_seq_len_from_mask`, without the length of each text, which nothing reads and tracing fixes."""
    return text.shape[1], None, mask.bool()


def _angles(rope: Any, shapes: Any, *, max_txt_seq_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """As `QwenEmbedRope.forward`, the angles: of the image's tokens `(HW, D / 2)` and of the text's `(L, D / 2)`."""
    _, height, width = shapes[0][0]
    rates = [1 / rope.theta ** (torch.arange(0, d, 2, device=device).float() / d) for d in rope.axes_dim]
    # Rows and columns are counted from the middle, and the text from the longer one's end.
    rows = (torch.arange(height, device=device) - (height - height // 2))[:, None, None] * rates[1]
    columns = (torch.arange(width, device=device) - (width - width // 2))[None, :, None] * rates[2]
    image = [torch.zeros(1, 1, len(rates[0]), device=device), rows, columns]
    positions = torch.sym_max(height // 2, width // 2) + torch.arange(max_txt_seq_len, device=device)
    of_image = torch.cat([angles.expand(height, width, -1) for angles in image], dim=2).flatten(0, 1)
    return of_image, positions[:, None] * torch.cat(rates)


def _rotated(x: torch.Tensor, angles: torch.Tensor, use_real: bool = False) -> torch.Tensor:
    """As `apply_rotary_emb_qwen`: pairs of numbers of x `(B, L, heads, D)` turned by their angles `(L, D / 2)`."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(3).type_as(x)
