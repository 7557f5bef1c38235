"""Who works on what, and in which order: the same for any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from accelerate.utils import gather_object


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which members of each batch a process works on.

    Attributes:
        batch_size: states an update, over all processes.
        index: this process.
        count: processes.
    """

    batch_size: int
    index: int = 0
    count: int = 1

    @property
    def members(self) -> range:
        """This process's members, consecutive, sizes differing by one at most."""
        bounds = [self.batch_size * i // self.count for i in (self.index, self.index + 1)]
        return range(*bounds)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """All processes' rows in the batch's order, on the CPU."""
        return torch.cat(gather_object([rows.detach().cpu()])) if self.count > 1 else rows


@lru_cache(maxsize=1)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` items, drawn from (seed, epoch) alone."""
    return np.random.default_rng([seed, count, epoch]).permutation(count)
