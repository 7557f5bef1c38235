"""Who works on what, in which order and with which noise: the same for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which members of each batch a process works on.

    Attributes:
        batch_size: samples per update, over all processes.
        rank: index of this process.
        world_size: number of processes.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def members(self) -> range:
        """This process's members, consecutive, sizes differing by one at most."""
        return range(*(self.batch_size * i // self.world_size for i in (self.rank, self.rank + 1)))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All processes' rows in the batch's order; of several processes on the CPU."""
        return torch.cat(gather_object([rows.detach().cpu()])) if self.world_size > 1 else rows

    def gather_list(self, items: list[T]) -> list[T]:
        """All processes' items, in the processes' order; they must pickle."""
        return gather_object(items) if self.world_size > 1 else items


def reduce_together(accelerator: Accelerator, tensors: Sequence[torch.Tensor], reduction: str) -> None:
    """Make each tensor its "sum" or "mean" over all processes, in one exchange; `Accelerator.reduce` makes one each."""
    flat = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction=reduction)
    for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))


@lru_cache(maxsize=1)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` items, drawn from (seed, epoch) alone."""
    return np.random.default_rng([seed, count, epoch]).permutation(count)


def noise_of(shape: Sequence[int], seed: int, number: int) -> torch.Tensor:
    """Standard normal float32 noise of a shape, drawn from (seed, number) alone.

    By numpy: torch's CPU generator reads only the lower 32 bits of its seed, too few for a pair.
    """
    # The third number parts these draws from those of `default_rng([seed, number])`.
    return torch.from_numpy(np.random.default_rng([seed, number, 1]).standard_normal(tuple(shape), dtype=np.float32))
