"""Features of sampled images, in shards that survive a killed run and are shared out over processes."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...engine.guidance import Denoiser
from ...engine.model import Model
from ...engine.sampling import generate, to_uint8
from .clip_score import ClipScorer
from .features import FeatureNetwork, features_of

SHARD = 200
"""Images that a killed run loses at most."""

_PATIENCE = timedelta(days=30)
"""For the slowest process: shards are long, and the default ends a run after minutes of waiting."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way of sampling to judge.

    Attributes:
        name: of its row.
        kind: "teacher", "unguided", "student", "alternative" or "control".
        steps: sampling steps.
        cost: UNet passes an image.
        open: gives the denoiser; called when its turn comes, as all may share one UNet.
        make_scheduler: gives a fresh scheduler.
        identity: plain JSON values that, with `steps` and the scheduler, tell its images from all others': what `open`
            closes over.
        seed_offset: added to the seed.
        method: of an alternative, see `alternatives.Alternative`.
    """

    name: str
    kind: str
    steps: int
    cost: int
    open: Callable[[], Denoiser]
    make_scheduler: Callable[[], SchedulerMixin]
    identity: dict[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    method: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What is kept of N images.

    Attributes:
        features: `(N, D)` float32.
        clip: `(N,)` float32 CLIP scores; None without a scorer.
        samples: the first few images, uint8 `(n, 3, H, W)`.
    """

    features: torch.Tensor
    clip: torch.Tensor | None
    samples: torch.Tensor


def hash_of(value: Any) -> str:
    """SHA-256 of plain JSON values, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """Everything that all contestants share.

    Attributes:
        model: text encoder, VAE and latents' shape.
        network: features of uint8 images.
        clip: scores images by their prompts, or None.
        prompts: N of them.
        seed: image i starts from the noise of `seed + i`.
        batch_size: images denoised together; divides `shard`.
        negative_prompt: what guidance leads away from.
        cache: folder of the shards; None keeps nothing.
        identity: plain JSON values that tell the model, the network and the machine from others.
        shard: images in a file.
        keep: images to keep of each contestant.
        on_images: told of progress: the row's name and how many images took a step.
    """

    model: Model
    network: FeatureNetwork
    clip: ClipScorer | None = None
    prompts: list[str]
    seed: int
    batch_size: int
    negative_prompt: str = ""
    cache: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    shard: int = SHARD
    keep: int = 12
    on_images: Callable[[str, int], None] = lambda name, count: None

    def starts(self) -> range:
        """The first image of each shard."""
        return range(0, len(self.prompts), self.shard)

    def sampled(self, contestant: Contestant) -> Sampled:
        """The contestant's images, shard by shard from the cache, or drawn now and put there."""
        parts = [self._shard(contestant, start) for start in self.starts()]
        return Sampled(
            features=torch.cat([part["features"] for part in parts]),
            clip=torch.cat([part["clip"] for part in parts]) if self.clip else None,
            samples=parts[0]["samples"],
        )

    def fill(self, contestants: Sequence[Contestant], processes: PartialState) -> Campaign:
        """Draw the shards of all contestants that the cache lacks, each in one process; ends when all have.

        The processes part here.

        Returns:
            The campaign, silent about progress that was told now.
        """
        count = processes.num_processes
        # What one process does stands for what all do.
        told = replace(self, on_images=lambda name, images: self.on_images(name, count * images))
        missing = [
            (contestant, start)
            for contestant in contestants
            for start in self.starts()
            if self._read(self._key(contestant, start)) is None
        ]
        # All must have looked before the first shard is written, or the lists would differ.
        processes.wait_for_everyone()
        with processes.split_between_processes(missing) as mine:
            for contestant, start in mine:
                told._shard(contestant, start)
        processes.wait_for_everyone()
        # A process that ends in a group may abort at its exit.
        processes.destroy_process_group()
        return replace(self, on_images=lambda name, images: None)

    def _key(self, contestant: Contestant, start: int) -> dict[str, Any]:
        prompts = self.prompts[start : start + self.shard]
        scheduler = contestant.make_scheduler()
        # Private entries are diffusers' notes, some in an order that changes from process to process.
        settings = {name: repr(value) for name, value in scheduler.config.items() if not name.startswith("_")}
        return self.identity | {
            "contestant": contestant.identity,
            "scheduler": [type(scheduler).__name__, hash_of(settings)],
            "steps": contestant.steps,
            "seed": self.seed + contestant.seed_offset,
            "range": [start, start + len(prompts)],
            "prompts": hash_of(prompts),
            "negative_prompt": self.negative_prompt,
            "batch_size": self.batch_size,
            "keep": self.keep,
            "features": self.network.sha256,
            "clip": self.clip.sha256 if self.clip else None,
        }

    def _shard(self, contestant: Contestant, start: int) -> dict[str, torch.Tensor]:
        key = self._key(contestant, start)
        stored = self._read(key)
        if stored is not None:
            self.on_images(contestant.name, len(stored["features"]) * contestant.steps)
            return stored
        drawn = self._draw(contestant, start)
        self._write(key, drawn)
        return drawn

    def _draw(self, contestant: Contestant, start: int) -> dict[str, torch.Tensor]:
        prompts = self.prompts[start : start + self.shard]
        text = self.model.family.encode(self.model.pipeline, prompts, negative_prompt=self.negative_prompt)
        images = to_uint8(
            generate(
                self.model,
                contestant.open(),
                text=text,
                make_scheduler=contestant.make_scheduler,
                steps=contestant.steps,
                seed=self.seed + contestant.seed_offset + start,
                batch_size=self.batch_size,
                on_step=partial(self.on_images, contestant.name),
            )
        )
        tensors = {
            "features": features_of(self.network, images),
            "samples": images[: max(0, self.keep - start)].clone(memory_format=torch.contiguous_format),
        }
        return tensors | ({"clip": self.clip.scores(images, prompts)} if self.clip else {})

    def _path(self, key: dict[str, Any]) -> Path | None:
        return None if self.cache is None else self.cache / f"{hash_of(key)[:32]}.safetensors"

    def _read(self, key: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        path = self._path(key)
        if path is None:
            return None
        # A file that a crash of the machine left damaged is drawn again.
        with suppress(OSError, SafetensorError):
            with safe_open(path, framework="pt") as file:
                if json.loads((file.metadata() or {}).get("key", "null")) == key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return None

    def _write(self, key: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Whole or not at all, also where another run writes the same shard."""
        path = self._path(key)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            save_file(tensors, unfinished, metadata={"key": json.dumps(key, sort_keys=True)})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def launched_processes(device: torch.device) -> PartialState | None:
    """The processes of `accelerate launch` or `torchrun`; None for one that stands alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    return PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
