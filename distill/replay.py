"""Samples of earlier updates with their targets: the student is trained on each several times.

A teacher's prediction costs two passes, and stays right, as the teacher does not change; only the student's pass on it
must be made anew. Kept and drawn as in experience replay (Lin 1992, "Self-Improving Reactive Agents").
"""

from __future__ import annotations

import json
from collections import deque
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from .order import Share
from .source import Batch, Source

BYTES, FEWEST = 2**30, 8
"""What is kept in main memory, over all processes: 8,192 samples of 512 pixels, 2,048 of 1024; and at least 8 updates.

With few samples the student forgets the earlier ones (docs/experiments.md, "Trials of recipes").
"""

TENSORS = ("z_t", "t", "guidance", "teacher_x")
PREFIX = "replay_"
"""Before the names of tensors in a checkpoint."""


class _Past(NamedTuple):
    """What is kept of one update: a tensor `(B, …)` for each of `TENSORS`, and texts. Their embeddings are larger."""

    tensors: dict[str, torch.Tensor]
    prompts: list[str]
    negative_prompts: list[str]


def _kept(batch: Batch) -> _Past:
    # Sources go on writing to what they gave. In the layout that a checkpoint gives back: of others, other kernels
    # round otherwise.
    layout = torch.contiguous_format
    tensors = {name: getattr(batch, name).to("cpu", copy=True, memory_format=layout) for name in TENSORS}
    return _Past(tensors, list(batch.prompts), list(batch.negative_prompts))


class Replay:
    """Each member of a batch brings `uses − 1` of its own past along, drawn at random: each is used `uses` times.

    The past stays with the process that the member belongs to, and what is drawn follows from seeds: it is the same for
    any number of processes.
    """

    def __init__(self, share: Share, *, uses: int, seed: int) -> None:
        self.share, self.uses, self.seed = share, uses, seed
        self._past: deque[_Past] = deque()

    def extended(self, batch: Batch, source: Source, update: int) -> Batch:
        """The batch, and behind it what its members bring along: `uses` times as many; at the first update, themselves.

        Args:
            batch: this process's samples of an update, with targets.
            source: where they come from.
            update: its number.
        """
        if self.uses == 1:
            return batch
        known = self._past or [_kept(batch)]
        drawn = [
            np.random.default_rng([self.seed, update, member, 3]).integers(len(known), size=self.uses - 1)
            for member in self.share.members
        ]
        tensors = {name: [getattr(batch, name)] for name in TENSORS}
        prompts, negatives = list(batch.prompts), list(batch.negative_prompts)
        for column in zip(*drawn, strict=True):
            for row, index in enumerate(column):
                past = known[index]
                for name, found in tensors.items():
                    found.append(past.tensors[name][row : row + 1].to(found[0].device))
                prompts.append(past.prompts[row])
                negatives.append(past.negative_prompts[row])
        return Batch(
            **{name: torch.cat(found) for name, found in tensors.items()},
            prompts=prompts,
            negative_prompts=negatives,
            text=source.text(prompts, negatives),
        )

    def add(self, batch: Batch) -> None:
        """Keep a batch with targets, and forget the oldest."""
        if self.uses == 1:
            return
        self._past.append(_kept(batch))
        update = 8 * batch.z_t[0].numel() * self.share.batch_size
        while len(self._past) > max(FEWEST, BYTES // update):
            self._past.popleft()

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint, the same in every process; called in every one."""
        if not self._past:
            return {}
        tensors = {
            f"{PREFIX}{name}": self.share.gather(torch.stack([past.tensors[name] for past in self._past], dim=1))
            for name in TENSORS
        }
        gathered = self.share.gather_list([(past.prompts, past.negative_prompts) for past in self._past])
        count = len(self._past)
        # Update by update, all processes' members in their order.
        texts = [[list(chain(*kind)) for kind in zip(*gathered[i::count], strict=True)] for i in range(count)]
        encoded = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)
        return tensors | {f"{PREFIX}texts": encoded}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        self._past.clear()
        if f"{PREFIX}texts" not in state:
            return
        own = slice(self.share.members.start, self.share.members.stop)
        tensors = {name: state[f"{PREFIX}{name}"][own] for name in TENSORS}
        texts = json.loads(bytes(state[f"{PREFIX}texts"].tolist()))
        for index, (prompts, negatives) in enumerate(texts):
            past = {name: tensor[:, index] for name, tensor in tensors.items()}
            self._past.append(_Past(past, prompts[own], negatives[own]))
