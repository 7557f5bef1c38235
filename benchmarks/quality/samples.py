"""What is kept of sampled images, in shards that survive a killed run and are divided among processes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...engine.errors import BoostDiffError
from ...engine.files import give_modes, hash_of, sha256_of
from ...engine.guidance import Denoiser
from ...engine.model import Model
from ...engine.sampling import batches, to_uint8
from .clip_score import ClipScorer
from .features import FeatureNetwork, features_of
from .reference import Reference

SHARD = 200
"""Images per file: a killed run loses no more."""

_PACKAGE = Path(__file__).parents[2]
_SOURCES = (
    "engine/**/*.py",
    "export/*.py",
    "benchmarks/quality/*.py",
    "benchmarks/session.py",
    "benchmarks/speed/fastest.py",
)
"""Code that decides images and their features: export makes the graphs that ONNX Runtime draws by."""

_TIMEOUT = timedelta(days=30)
"""How long the slowest process is waited for: shards take long, and the default is minutes."""


@cache
def code_sha256(package: Path = _PACKAGE) -> str:
    """SHA-256 of the code that decides images and their features, in a clone as in an installed package."""
    paths = sorted({path for pattern in _SOURCES for path in package.glob(pattern)})
    return hash_of([[path.relative_to(package).as_posix(), sha256_of(path)] for path in paths])


@dataclass(frozen=True, kw_only=True)
class SamplingVariant:
    """A combination of UNet, guidance and sampler that images are sampled with.

    Attributes:
        name: row label.
        role: "teacher", "unguided", "student", "alternative" or "reseeded".
        guidance: guidance scale w; of a student, the one that it was distilled at or is given.
        cost: UNet passes per image.
        open: gives the denoiser; called just before sampling, as variants may share one UNet.
        make_scheduler: gives a fresh scheduler.
        identity: plain JSON values that, with `steps` and the scheduler, determine its images.
        method: method of a training-free baseline, see `baselines.Baseline`.
    """

    name: str
    role: str
    guidance: float
    sampler: str
    steps: int
    cost: int
    open: Callable[[], Denoiser]
    make_scheduler: Callable[[], SchedulerMixin]
    identity: dict[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    method: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What is kept of N images: features `(N, D)`, `color_statistics`, CLIP scores `(N,)`, and the first few images."""

    features: torch.Tensor
    colors: torch.Tensor
    clip: torch.Tensor | None
    samples: torch.Tensor


COLORS = ("luminance", "saturation", "contrast")
COLOR_BATCH = 8


def color_statistics(images: torch.Tensor) -> torch.Tensor:
    """`COLORS` of uint8 images `(N, 3, H, W)`, `(N, 3)` float32 from 0 to 100.

    Mean luma (Rec. 709 weights, on gamma-encoded values), mean HSV saturation, and the standard deviation of luma.
    """
    # A few at a time: the float images of a shard would take gigabytes.
    return torch.cat([_colors_of_batch(batch) for batch in images.split(COLOR_BATCH)])


def _colors_of_batch(images: torch.Tensor) -> torch.Tensor:
    rgb = images.float() / 255
    luma = torch.einsum("nchw,c->nhw", rgb, rgb.new_tensor([0.2126, 0.7152, 0.0722])).flatten(1)
    highest = rgb.amax(dim=1)
    saturation = ((highest - rgb.amin(dim=1)) / highest.clamp_min(1e-6)).flatten(1)
    return 100 * torch.stack([luma.mean(dim=1), saturation.mean(dim=1), luma.std(dim=1, unbiased=False)], dim=1)


@dataclass(frozen=True, kw_only=True)
class SampleCache:
    """Samples variants on the same prompts, seeds and noise, and keeps what is measured of their images.

    Attributes:
        model: text encoder, VAE and latent shape.
        network: features of uint8 images.
        clip: caption scorer, or None.
        reference: real images that samples are compared with, or None.
        seed: image i starts from the noise of `seed + i`.
        batch_size: images denoised together.
        folder: folder of the shards; None keeps nothing on disk.
        identity: plain JSON values that determine model, network and machine.
        keep: images kept per variant.
        on_images: progress callback: row name, and number of images that took a step.
    """

    model: Model
    network: FeatureNetwork
    clip: ClipScorer | None = None
    reference: Reference | None = None
    prompts: list[str]
    seed: int
    batch_size: int
    negative_prompt: str = ""
    folder: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    shard: int = SHARD
    keep: int = 12
    on_images: Callable[[str, int], None] = lambda name, count: None

    def starts(self) -> range:
        """The first image of each shard."""
        return range(0, len(self.prompts), self.shard)

    def sampled(self, variant: SamplingVariant) -> Sampled:
        """What is kept of a variant's images, shard by shard from the folder, or sampled now and put there."""
        parts = [self._shard(variant, start) for start in self.starts()]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "samples"}
        return Sampled(clip=joined.pop("clip", None), samples=parts[0]["samples"], **joined)

    def fill(self, variants: Sequence[SamplingVariant], processes: PartialState) -> SampleCache:
        """Sample the missing shards of all variants, each in one process; then the process group ends.

        The cache that is returned has no progress callback, as all progress was reported here.
        """
        count = processes.num_processes
        # Each process reports for all of them.
        reporting = replace(self, on_images=lambda name, images: self.on_images(name, count * images))
        missing = [
            (variant, start)
            for variant in variants
            for start in self.starts()
            if self._read(self._key(variant, start)) is None
        ]
        # All must have looked before the first shard is written, or the lists would differ.
        processes.wait_for_everyone()
        with processes.split_between_processes(missing) as mine:
            for variant, start in mine:
                reporting._shard(variant, start)
        processes.wait_for_everyone()
        # A process that ends in a group may abort at its exit.
        processes.destroy_process_group()
        return replace(self, on_images=lambda name, images: None)

    def _key(self, variant: SamplingVariant, start: int) -> dict[str, Any]:
        prompts = self.prompts[start : start + self.shard]
        scheduler = variant.make_scheduler()
        # Private entries are internal to diffusers; the order of some changes from process to process.
        settings = {name: repr(value) for name, value in scheduler.config.items() if not name.startswith("_")}
        return self.identity | {
            "variant": variant.identity,
            "scheduler": [type(scheduler).__name__, hash_of(settings)],
            "steps": variant.steps,
            "seed": self.seed + variant.seed_offset,
            "range": [start, start + len(prompts)],
            "prompts": hash_of(prompts),
            "negative_prompt": self.negative_prompt,
            "batch_size": self.batch_size,
            "keep": self.keep,
            "features": self.network.sha256,
            "clip": self.clip.sha256 if self.clip else None,
            "code": code_sha256(),
        }

    def _shard(self, variant: SamplingVariant, start: int) -> dict[str, torch.Tensor]:
        key = self._key(variant, start)
        if stored := self._read(key):
            self.on_images(variant.name, len(stored["features"]) * variant.steps)
            return stored
        sampled = self._sample(variant, start)
        self._write(key, sampled)
        return sampled

    def _sample(self, variant: SamplingVariant, start: int) -> dict[str, torch.Tensor]:
        prompts = self.prompts[start : start + self.shard]
        text = self.model.family.encode(self.model.pipeline, prompts, negative_prompt=self.negative_prompt)
        drawn = batches(
            self.model,
            variant.open(),
            text=text,
            make_scheduler=variant.make_scheduler,
            steps=variant.steps,
            seed=self.seed + variant.seed_offset + start,
            batch_size=self.batch_size,
            on_step=partial(self.on_images, variant.name),
        )
        # Batch by batch: as floats a shard would take four times as much.
        images = torch.cat([to_uint8(batch) for batch in drawn])
        tensors = {
            "features": features_of(self.network, images),
            "colors": color_statistics(images),
            "samples": images[: max(0, self.keep - start)].clone(memory_format=torch.contiguous_format),
        }
        return tensors | ({"clip": self.clip.scores(images, prompts)} if self.clip else {})

    def _path(self, key: dict[str, Any]) -> Path | None:
        return None if self.folder is None else self.folder / f"{hash_of(key)[:32]}.safetensors"

    def _read(self, key: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        path = self._path(key)
        if path is None:
            return None
        # A file that a crash left damaged is sampled again.
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
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            save_file(tensors, Path(folder) / path.name, metadata={"key": json.dumps(key, sort_keys=True)})
            give_modes(Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)


def launched_processes(device: torch.device) -> PartialState | None:
    """The processes of `accelerate launch` or `torchrun`; None for a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    return PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT)


@contextmanager
def bounded_memory(batch_size: int) -> Iterator[None]:
    """Say what to do where memory does not suffice to sample so many images together."""
    try:
        yield
    except torch.OutOfMemoryError:
        smaller = f"pass --sampling-batch-size {batch_size // 2}, " if batch_size > 1 else ""
        raise BoostDiffError(
            f"out of memory while sampling {batch_size} images together: {smaller}stop what else uses the device, or "
            "pass another --device"
        ) from None
