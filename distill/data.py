"""Where training states come from: online trajectories from prompts, or captioned images.

Everything random is drawn from (seed, counter) pairs, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..engine.errors import InputError
from ..engine.families import TextEmbeddings
from ..engine.files import json_lines
from ..engine.model import Model
from ..engine.prompts import read_prompts
from .objective import NoiseSchedule, ddim_step

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """States to train on.

    Attributes:
        z_t: `(B, C, H, W)` float32 latents.
        t: `(B,)` int64 timesteps.
        text: embeddings of B prompts.
    """

    z_t: torch.Tensor
    t: torch.Tensor
    text: TextEmbeddings


class Source(ABC):
    """A supply of batches."""

    @abstractmethod
    def batch(self, update: int) -> Batch:
        """The states of one update."""

    def advance(self, teacher_x: torch.Tensor) -> None:
        """Told of the teacher's x̂_w `(B, C, H, W)` for the batch just given."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold for this source to go on."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state()`."""


@lru_cache(maxsize=1)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` items, drawn from (seed, epoch) alone."""
    return np.random.default_rng([seed, count, epoch]).permutation(count)


class Trajectories(Source):
    """Online trajectories: the teacher's own sampling runs, trained on as they happen.

    A pool of B trajectories, each with its own step count, phase and position. One teacher evaluation per update
    is both the target for every member and what moves it on by a DDIM step; a finished member is replaced by a
    new one. Step counts and phases are random, so the student is tied to no single sampler setting.
    """

    STEPS = (10, 50)

    def __init__(
        self, model: Model, prompts: list[str], schedule: NoiseSchedule, *, batch_size: int, seed: int
    ) -> None:
        self.model, self.prompts, self.schedule, self.seed = model, prompts, schedule, seed
        self.t = torch.full((batch_size,), -1)
        self.stride = torch.zeros(batch_size)
        self.position = torch.zeros(batch_size)
        self.z_t = torch.zeros(batch_size, *model.latent_shape, device=model.device)
        self.embeddings: torch.Tensor | None = None
        # The empty prompt is a prompt like any other.
        empty = model.family.encode(model.pipeline, [""], unconditional=False)
        self.unconditional = empty.conditional.float()
        self.started = 0
        self._refill(torch.arange(batch_size))

    def _refill(self, members: torch.Tensor) -> None:
        if not len(members):
            return
        chosen = []
        for member in members.tolist():
            random = np.random.default_rng([self.seed, self.started])
            noise = torch.Generator().manual_seed((self.seed << 32) + self.started)
            steps = random.integers(*self.STEPS, endpoint=True)
            stride = len(self.schedule) / steps
            self.stride[member] = stride
            # Phases between "trailing" spacing (from the last timestep) and "leading" (one stride below it).
            self.position[member] = len(self.schedule) - 1 - random.random() * stride
            self.z_t[member] = torch.randn(self.model.latent_shape, generator=noise)
            epoch, index = divmod(self.started, len(self.prompts))
            chosen.append(self.prompts[epoch_order(len(self.prompts), self.seed, epoch)[index]])
            self.started += 1
        embedded = self.model.family.encode(self.model.pipeline, chosen, unconditional=False).conditional.float()
        if self.embeddings is None:
            self.embeddings = embedded.new_zeros(len(self.t), *embedded.shape[1:])
        self.embeddings[members.to(embedded.device)] = embedded

    def batch(self, update: int) -> Batch:
        """See `Source.batch`: the whole pool."""
        assert self.embeddings is not None
        self.t = self.position.round().long()
        return Batch(
            z_t=self.z_t,
            t=self.t.to(self.z_t.device),
            text=TextEmbeddings(conditional=self.embeddings, unconditional=self.unconditional),
        )

    @torch.no_grad()
    def advance(self, teacher_x: torch.Tensor) -> None:
        """Step every member with the teacher; replace those that have arrived."""
        self.position = self.position - self.stride
        t, t_next = (x.to(self.z_t.device) for x in (self.t, self.position.round().long()))
        self.z_t = ddim_step(self.z_t, teacher_x, *self.schedule.at(t), *self.schedule.at(t_next))
        self._refill(torch.nonzero(self.position.round() < 0).flatten())

    def state(self) -> dict[str, torch.Tensor]:
        """See `Source.state`."""
        assert self.embeddings is not None
        return {
            "z_t": self.z_t,
            "stride": self.stride,
            "position": self.position,
            "embeddings": self.embeddings,
            "started": torch.tensor(self.started),
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """See `Source.restore`."""
        where = self.z_t.device
        self.z_t, self.embeddings = state["z_t"].to(where), state["embeddings"].to(where)
        self.stride, self.position = state["stride"], state["position"]
        self.started = int(state["started"])


def find_captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """Pairs of image and caption in a folder, sorted by path.

    Captions stand in `metadata.jsonl` (`{"file_name": …, "text": …}` a line, the imagefolder convention of
    `datasets`) or in a `.txt` beside each image.

    Raises:
        InputError: the folder is missing, or holds no captioned image.
    """
    if not folder.is_dir():
        raise InputError(f"there is no image folder {folder}")
    metadata = folder / "metadata.jsonl"
    pairs = []
    if metadata.is_file():
        for number, row in enumerate(json_lines(metadata), start=1):
            name, text = row.get("file_name"), row.get("text")
            if not isinstance(name, str) or not isinstance(text, str):
                raise InputError(f"{metadata} line {number} lacks file_name or text")
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{metadata} line {number} points outside the folder: {name}")
            if not path.is_file():
                raise InputError(f"{metadata} line {number} names a missing image: {name}")
            pairs.append((path, text.strip()))
    else:
        for path in folder.rglob("*"):
            caption = path.with_suffix(".txt")
            if path.suffix.lower() in IMAGE_SUFFIXES and caption.is_file():
                pairs.append((path, read_prompts(caption)[0]))
    if not pairs:
        raise InputError(f"{folder} holds no captioned images: add metadata.jsonl, or a .txt beside each image")
    return sorted(pairs)


class CaptionedImages(Source):
    """The paper's source: images encoded by the VAE, diffused to a uniformly random timestep."""

    def __init__(
        self,
        model: Model,
        pairs: list[tuple[Path, str]],
        schedule: NoiseSchedule,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.schedule, self.batch_size, self.seed = model, schedule, batch_size, seed
        columns = {"image": [str(path) for path, _ in pairs], "caption": [caption for _, caption in pairs]}
        self.rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        self.paths = [path for path, _ in pairs]

    def batch(self, update: int) -> Batch:
        """See `Source.batch`.

        Raises:
            InputError: an image can't be decoded.
        """
        random = np.random.default_rng([self.seed, update])
        generator = torch.Generator().manual_seed((self.seed << 32) + update)
        chosen = [self._row(update * self.batch_size + i) for i in range(self.batch_size)]
        images = torch.stack([self._pixels(index) for index in chosen]).to(self.model.device)
        text = self.model.family.encode(self.model.pipeline, self.rows.select(chosen)["caption"])
        vae = self.model.pipeline.vae
        with torch.no_grad():
            x = vae.encode(images.to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor
        t = torch.from_numpy(random.integers(len(self.schedule), size=self.batch_size)).to(x.device)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        return Batch(z_t=self.schedule.add_noise(x, noise, t), t=t, text=text.to(torch.float32))

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self.rows))
        return int(epoch_order(len(self.rows), self.seed, epoch)[index])

    def _pixels(self, index: int) -> torch.Tensor:
        try:
            image = self.rows[index]["image"].convert("RGB")
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise InputError(f"can't decode the image {self.paths[index]}: {error}") from None
        vae = self.model.pipeline.vae
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        _, height, width = self.model.latent_shape
        return pixels_of(image, height * scale, width * scale)


def pixels_of(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Resize the shorter side, crop the centre: `(3, height, width)` float32 in [-1, 1]."""
    factor = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
