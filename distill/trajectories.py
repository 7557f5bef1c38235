"""Where training states come from: online trajectories from prompts, or captioned images.

Everything random is drawn from (seed, counter) pairs, so a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..engine.families import PromptEmbeds, TextEmbeddings
from ..engine.model import Model
from .images import BadSample, ImageStream
from .objective import NoiseSchedule, ddim_step, dpm_solver_2m
from .order import Share, epoch_order, noise_of
from .rows import Rows

ENCODED_PIXELS = 2**21
"""What the VAE encodes at once, eight images of 512x512: its activations are hundreds of times their size."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """States to train on.

    Attributes:
        z_t: `(B, C, H, W)` float32 latents.
        t: `(B,)` int64 timesteps.
        text: embeddings of B prompts, float32.
        guidance: `(B,)` guidance scales, float32.
    """

    z_t: torch.Tensor
    t: torch.Tensor
    text: TextEmbeddings
    guidance: torch.Tensor

    def __len__(self) -> int:
        return len(self.t)

    def split(self, parts: int) -> list[Batch]:
        """In up to `parts` batches of about equal size."""
        bounds = [piece for piece in np.array_split(np.arange(len(self)), parts) if len(piece)]
        return [
            Batch(
                z_t=self.z_t[rows.start : rows.stop],
                t=self.t[rows.start : rows.stop],
                text=self.text[rows.start : rows.stop],
                guidance=self.guidance[rows.start : rows.stop],
            )
            for rows in (slice(int(piece[0]), int(piece[-1]) + 1) for piece in bounds)
        ]


class Source(ABC):
    """A supply of batches. What it gives depends on seeds and on the share's batch size, not on the processes."""

    @abstractmethod
    def batch(self, update: int) -> Batch:
        """This process's states of one update."""

    def advance(self, teacher_x: torch.Tensor) -> None:
        """Told of the teacher's x̂_w `(B, C, H, W)` for the batch just given."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold for this source to go on, the same in every process; called in every one."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state()`."""

    def skipped(self) -> Sequence[BadSample]:
        """Samples that were skipped, in all processes; called in every one."""
        return ()


class TextCache:
    """Embeddings of prompts, each computed once, kept on the CPU; the oldest go when memory runs short."""

    def __init__(self, model: Model, limit: int = 2**30) -> None:
        self.model, self.limit, self.bytes = model, limit, 0
        self._kept: OrderedDict[str, PromptEmbeds] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of B prompts, float32, on the model's device.

        One at a time goes through the text encoder: the batch around a prompt changes its last bits, and a resumed run
        must give the bytes of an uninterrupted one.
        """
        for prompt in prompts:
            if prompt not in self._kept:
                embeds = self.model.family.embed(self.model.pipeline, [prompt]).to("cpu")
                self._kept[prompt] = embeds
                self.bytes += sum(tensor.nbytes for tensor in embeds.tensors().values())
        found = PromptEmbeds.cat([self._kept[prompt] for prompt in prompts])
        while self.bytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in oldest.tensors().values())
        return found.to(self.model.device, torch.float32)


def draw_guidance(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A guidance scale, uniform between two bounds."""
    low, high = bounds
    return low + (high - low) * random.random()


class Trajectories(Source):
    """Online trajectories: the teacher's own sampling runs, trained on as they happen.

    A pool of B trajectories, each with its own prompt, guidance, sampler, step count, phase and position. One teacher
    evaluation per update is both the target for every member and what moves it on by a step; a finished member is
    replaced by a new one. Samplers (DDIM and DPM-Solver++ 2M), step counts and phases are random, so the student is
    tied to no single setting.

    Every process keeps the whole pool's book (it follows from seeds) and the latents of its own members.
    """

    STEPS = (4, 16)
    """Fewest and most steps of a trajectory: short ones bring more prompts and noise into a run."""

    def __init__(
        self,
        model: Model,
        prompts: list[str],
        schedule: NoiseSchedule,
        *,
        share: Share,
        seed: int,
        guidance: tuple[float, float],
        negative_prompt: str = "",
    ) -> None:
        self.model, self.prompts, self.schedule, self.seed = model, prompts, schedule, seed
        self.share, self.guidance_bounds = share, guidance
        self.embed = TextCache(model)
        self.unconditional = model.family.embed_negative(model.pipeline, negative_prompt).to(torch.float32)
        size = share.batch_size
        self.number = torch.zeros(size, dtype=torch.int64)
        self.stride, self.position = torch.zeros(size), torch.zeros(size)
        self.t, self.t_previous = torch.full((size,), -1), torch.full((size,), -1)
        self.multistep = torch.zeros(size, dtype=torch.bool)
        self.guidance = torch.zeros(size)
        self.texts = [""] * size
        self.z_t = torch.zeros(len(share.members), *model.latent_shape, device=model.device)
        self.x_previous = torch.zeros_like(self.z_t)
        self.started = 0
        self._refill(range(size))

    def _refill(self, members: Sequence[int]) -> None:
        own = self.share.members
        for member in members:
            self._begin(member, self.started)
            if member in own:
                self.z_t[member - own.start] = noise_of(self.model.latent_shape, self.seed, self.started)
            self.started += 1

    def _begin(self, member: int, number: int) -> None:
        random = np.random.default_rng([self.seed, number])
        stride = len(self.schedule) / random.integers(*self.STEPS, endpoint=True)
        self.number[member] = number
        self.stride[member] = stride
        # Phases between "trailing" spacing (from the last timestep) and "leading" (one stride below it).
        self.position[member] = len(self.schedule) - 1 - random.random() * stride
        self.multistep[member] = bool(random.random() < 0.5)
        self.guidance[member] = draw_guidance(random, self.guidance_bounds)
        self.t_previous[member] = -1
        epoch, index = divmod(number, len(self.prompts))
        self.texts[member] = self.prompts[epoch_order(len(self.prompts), self.seed, epoch)[index]]

    def batch(self, update: int) -> Batch:
        """See `Source.batch`: this process's part of the pool."""
        own, where = self.share.members, self.z_t.device
        rows = slice(own.start, own.stop)
        self.t = self.position.round().long()
        return Batch(
            z_t=self.z_t,
            t=self.t[rows].to(where),
            text=TextEmbeddings(conditional=self.embed(self.texts[rows]), unconditional=self.unconditional),
            guidance=self.guidance[rows].to(where),
        )

    @torch.no_grad()
    def advance(self, teacher_x: torch.Tensor) -> None:
        """Step every member with the teacher; replace those that have arrived."""
        own = self.share.members
        rows = slice(own.start, own.stop)
        self.position = self.position - self.stride
        t_next = self.position.round().long().clamp(min=-1)
        t, before, after, multistep = (
            x[rows].to(self.z_t.device) for x in (self.t, self.t_previous, t_next, self.multistep)
        )
        x = teacher_x
        second_order = multistep & (before >= 0) & (after >= 0)
        if second_order.any():
            x = torch.where(
                second_order[:, None, None, None],
                dpm_solver_2m(teacher_x, self.x_previous, *self.schedule.log_snr(before, t, after)),
                teacher_x,
            )
        self.z_t = ddim_step(self.z_t, x, *self.schedule.at(t), *self.schedule.at(after))
        self.x_previous, self.t_previous = teacher_x, self.t.clone()
        self._refill(torch.nonzero(t_next < 0).flatten().tolist())

    def state(self) -> dict[str, torch.Tensor]:
        """See `Source.state`; what follows from a trajectory's number is left out."""
        return {
            "z_t": self.share.gather(self.z_t),
            "x_previous": self.share.gather(self.x_previous),
            "number": self.number,
            "position": self.position,
            "t_previous": self.t_previous,
            "started": torch.tensor(self.started),
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """See `Source.restore`."""
        for member, number in enumerate(state["number"].tolist()):
            self._begin(member, number)
        own, where = self.share.members, self.z_t.device
        rows = slice(own.start, own.stop)
        self.z_t, self.x_previous = state["z_t"][rows].to(where), state["x_previous"][rows].to(where)
        self.position, self.t_previous = state["position"], state["t_previous"]
        self.started = int(state["started"])


class CaptionedImages(Source):
    """The paper's source: images encoded by the VAE, diffused to a uniformly random timestep."""

    def __init__(
        self,
        model: Model,
        rows: Rows,
        schedule: NoiseSchedule,
        *,
        share: Share,
        seed: int,
        guidance: tuple[float, float],
        negative_prompt: str = "",
        max_bad_samples: int = 0,
    ) -> None:
        self.model, self.schedule, self.share, self.seed = model, schedule, share, seed
        self.guidance_bounds = guidance
        self.embed = TextCache(model)
        self.unconditional = model.family.embed_negative(model.pipeline, negative_prompt).to(torch.float32)
        height, width = image_size(model)
        self.stream = ImageStream(
            rows,
            height=height,
            width=width,
            batch_size=share.batch_size,
            seed=seed,
            max_bad_samples=max_bad_samples,
        )

    def batch(self, update: int) -> Batch:
        """See `Source.batch`.

        Raises:
            InputError: more samples are unreadable than allowed.
        """
        captions, images = self.stream.next_batch(self.share.members)
        vae = self.model.pipeline.vae
        with torch.no_grad():
            encoded = [
                vae.encode(some.to(vae.device, vae.dtype)).latent_dist.mode()
                for some in images.split(max(1, ENCODED_PIXELS // images[0, 0].numel()))
            ]
            x = torch.cat(encoded).float() * vae.config.scaling_factor
        timesteps, scales, noise = [], [], []
        for member in self.share.members:
            number = update * self.share.batch_size + member
            random = np.random.default_rng([self.seed, number])
            timesteps.append(int(random.integers(len(self.schedule))))
            scales.append(draw_guidance(random, self.guidance_bounds))
            noise.append(noise_of(x.shape[1:], self.seed, number))
        t = torch.tensor(timesteps, device=x.device)
        return Batch(
            z_t=self.schedule.add_noise(x, torch.stack(noise).to(x.device), t),
            t=t,
            text=TextEmbeddings(conditional=self.embed(captions), unconditional=self.unconditional),
            guidance=torch.tensor(scales, device=x.device),
        )

    def skipped(self) -> list[BadSample]:
        """See `Source.skipped`.

        Raises:
            InputError: together the processes skipped more than allowed.
        """
        self.stream.know_as_bad(self.share.gather_list(self.stream.bad))
        return self.stream.bad

    def state(self) -> dict[str, torch.Tensor]:
        """See `Source.state`.

        Raises:
            InputError: see `skipped`.
        """
        self.skipped()
        return self.stream.state()

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """See `Source.restore`."""
        self.stream.restore(state)


def image_size(model: Model) -> tuple[int, int]:
    """Height and width in pixels of the images that a model makes."""
    scale = 2 ** (len(model.pipeline.vae.config.block_out_channels) - 1)
    _, height, width = model.latent_shape
    return height * scale, width * scale
