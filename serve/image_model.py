"""A model that draws for many: batches of prompts with a seed each, checked before the first answer.

An image's noise comes from its seed alone, so it does not depend on the images that it was drawn together with.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..engine.errors import BoostDiffError, InputError
from ..engine.exported import Engine
from ..engine.files import is_unicode
from ..engine.generate import DEFAULT_GUIDANCE
from ..engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ..engine.model import Model
from ..engine.options import SAMPLER, STEPS
from ..engine.prompts import truncation_note
from ..engine.runners import Runner
from ..engine.sampling import decode, default_batch_size, initial_noise, sampling, to_pil
from ..engine.schedulers import SAMPLERS, check_steps
from ..engine.student import Distilled

PNG_LEVEL = 1
"""zlib's: its default, 6, takes two to four times as long, for files smaller by a seventh to a fifth."""

CHECK_PROMPTS = ("a photo of a red apple on a table", "a lighthouse at dusk", "two green birds", "a white fish")
CHECK_STEPS = 2
CHECK_LEVELS = 1
"""What an image may differ by, in float32 on a CPU, from the same image drawn alone, in levels of 255."""

CHECK_SHARE = 0.05
"""What images may differ by elsewhere in the mean, in standard deviations of their values.

Kernels of other batch sizes round in other places. Rounding to bfloat16 moves images of `emoji64` by 0.024, to float16
by 0.003; that of another prompt is more than one away.
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to draw, of height and width in pixels; what is None is the model's, or the default.

    `ImageModel.completed` fills in what is compared in `batch_key`.
    """

    prompt: str
    seed: int
    steps: int | None = None
    sampler: str | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """What jobs of one batch have in common."""
        return (self.steps, self.sampler, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is told of an image, or of a preview of it after `step` steps, of width and height in pixels.

    `seconds` are from the start of its batch, of `batch` images, to its end, decoding included; `note` says what of its
    texts was truncated, or is "".
    """

    seed: int
    step: int
    passes: int
    seconds: float
    batch: int
    width: int
    height: int
    note: str = ""
    preview: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture(Facts):
    """An image as it was drawn."""

    image: Image.Image


@dataclass(frozen=True, kw_only=True)
class Drawn(Facts):
    """An image as it is answered."""

    png: bytes


def encoded(picture: Picture) -> Drawn:
    """A picture as PNG. Not for the thread that draws: at 1024 pixels it takes a tenth of a second."""
    content = io.BytesIO()
    picture.image.save(content, format="PNG", compress_level=PNG_LEVEL)
    return Drawn(png=content.getvalue(), **{each.name: getattr(picture, each.name) for each in fields(Facts)})


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a model is and what it takes, as `GET /v1/models` shows it.

    Attributes:
        id: name in the API.
        role: "student" or "teacher".
        runner: what executes the UNet: "onnx", "tensorrt" or "torch".
        passes_per_step: passes of the UNet for each step.
        size: width and height of its images.
        samplers: names that `sampler` takes; the first is the default.
        steps: the only number of `steps` that a few-step student takes; None where any is taken.
        guidance: guidance scale that it draws at by default.
        guidance_range: smallest and largest `guidance`; None where it takes one alone.
        negative_prompt: whether it takes a negative prompt.
        max_batch: images that are drawn together at most.
        checked: what was compared before the first answer, in words.
    """

    id: str
    role: str
    runner: str
    passes_per_step: int
    size: tuple[int, int]
    samplers: tuple[str, ...]
    steps: int | None
    guidance: float
    guidance_range: tuple[float, float] | None
    negative_prompt: bool
    max_batch: int
    checked: str = ""


class ImageModel:
    """An engine, or a student or a teacher in torch, ready to draw."""

    def __init__(
        self,
        *,
        name: str,
        model: Model,
        runner: Runner,
        distilled: Distilled | None,
        engine: Engine | None,
        max_batch: int | None,
    ) -> None:
        """Not to be called: see `open_model`."""
        self._model, self._runner, self._distilled, self._engine = model, runner, distilled, engine
        _, height, width = model.latent_shape
        factor = model.pipeline.vae_scale_factor
        few = distilled.sampler if distilled else None
        # Of the largest images as many must fit as of the others.
        limits = engine.manifest.options["size"] if engine else None
        largest = engine.sized(limits[2], limits[2]) if engine and limits else model
        self.description = Description(
            id=name,
            role="student" if distilled else "teacher",
            runner=runner.name,
            passes_per_step=1 if distilled else 2,
            size=(factor * width, factor * height),
            samplers=tuple(SAMPLERS) if few is None else (few,),
            steps=distilled.steps if distilled else None,
            guidance=distilled.guidance if distilled else DEFAULT_GUIDANCE,
            guidance_range=distilled.guidance_range if distilled else (1.0, 1e4),
            negative_prompt=distilled is None or distilled.live_negative_prompt,
            max_batch=max_batch or default_batch_size(largest),
        )

    def completed(self, job: Job) -> Job:
        """The job with its sampler, steps and size, whether or not it left them out.

        Raises:
            InputError: the model can't draw it; no path is named.
        """
        width, height = self.description.size
        try:
            for text, what in ((job.prompt, "prompt"), (job.negative_prompt or "", "negative prompt")):
                if not is_unicode(text):
                    raise InputError(f"the {what} holds half a character (a lone surrogate)")
            if not job.prompt.strip():
                raise InputError("the prompt is empty")
            sampler, steps = self._sampling(job)
            check_steps(self._model.pipeline.scheduler.config, [sampler], [steps], spacing=self._spacing)
            initial_noise((1, 1, 1), count=1, seed=job.seed)
            self._sized(job)
            self._guidance(job)
            self._negative_prompt(job)
        except InputError as error:
            # Without what to type on the command line; folders are nobody's business here.
            said, _, fact = str(error).replace(f" in {self._model.files.folder}", "").partition(": ")
            fact = fact.partition("; ")[0]
            if fact and not any(typed in fact for typed in ("`", "--", "pass ")):
                said = f"{said}: {fact}"
            raise InputError(said.replace("--", "")) from None
        return replace(job, sampler=sampler, steps=steps, height=job.height or height, width=job.width or width)

    def draw(self, jobs: Sequence[Job]) -> list[Picture]:
        """Draw one batch of jobs that `completed` took and that are of one `batch_key`. Raises as `stream`."""
        (pictures,) = self.stream(jobs)
        return pictures

    def stream(self, jobs: Sequence[Job], previews: int = 0) -> Iterator[list[Picture]]:
        """Draw one batch of jobs that are of one `batch_key`: so many previews of it, evenly spaced, then the images.

        Raises:
            BoostDiffError: latents or images hold NaN or Inf.
        """
        started, first = time.monotonic(), jobs[0]
        model, (sampler, steps) = self._sized(first), self._sampling(first)
        negatives = [negative for job in jobs if (negative := self._negative_prompt(job)) is not None]
        prompts = [job.prompt for job in jobs]
        text = model.family.encode(model.pipeline, prompts, negative_prompt=negatives or None).to(model.denoiser.dtype)
        noise = torch.cat([initial_noise(model.latent_shape, count=1, seed=job.seed) for job in jobs])
        states = sampling(
            self._denoiser(jobs, model),
            text=text,
            noise=noise.to(model.device, model.family.latents_dtype(text.conditional.dtype)),
            scheduler=model.make_scheduler(sampler, spacing=self._spacing),
            steps=steps,
        )
        shown = {round(steps * (i + 1) / (previews + 1)) for i in range(previews)} - {0, steps}
        finite = []
        for step, latents in enumerate(states, start=1):
            finite.append(latents.isfinite().all())
            if step not in shown and step < steps:
                continue
            images = to_pil(decode(model, latents, finite))
            yield [
                Picture(
                    image=image,
                    seed=job.seed,
                    step=step,
                    passes=step * self.description.passes_per_step,
                    seconds=time.monotonic() - started,
                    batch=len(jobs),
                    width=image.width,
                    height=image.height,
                    note=truncation_note(model.pipeline, [job.prompt], "prompts") or "",
                    preview=step < steps,
                )
                for job, image in zip(jobs, images, strict=True)
            ]

    def check_itself(self) -> None:
        """Draw a few images alone and together and compare them; `description.checked` says what was found.

        Raises:
            BoostDiffError: an image depends on its batch, is not finite or shows nothing.
        """
        steps = None if self._spacing else CHECK_STEPS
        jobs = [Job(prompt=prompt, seed=seed, steps=steps) for seed, prompt in enumerate(CHECK_PROMPTS)]
        jobs = jobs[: self.description.max_batch]
        together = _levels(self.draw(jobs))
        alone = np.concatenate([_levels(self.draw([job])) for job in jobs])
        differences = np.abs(together - alone)
        difference, spread = int(differences.max()), float(together.std())
        if spread == 0:
            raise BoostDiffError(f"{self.description.id} draws images of one color")
        exact = self._runner.device.type == "cpu" and self._runner.precision == torch.float32
        if difference > CHECK_LEVELS if exact else differences.mean() > CHECK_SHARE * spread:
            raise BoostDiffError(
                f"images of {self.description.id} depend on the batch that they are drawn in, by "
                f"{difference}/255: serve it with a batch of 1"
            )
        said = f"{len(jobs)} images drawn alone and together differ by {difference}/255 at most"
        self.description = replace(self.description, checked=said)

    @property
    def _spacing(self) -> str | None:
        """Timestep spacing of a few-step student."""
        return self._distilled.timestep_spacing if self._distilled else None

    def _sampling(self, job: Job) -> tuple[str, int]:
        if self._distilled is None:
            return job.sampler or SAMPLER, job.steps or STEPS
        return self._distilled.choose_sampling(job.sampler, job.steps)

    def _sized(self, job: Job) -> Model:
        width, height = self.description.size
        if self._engine is not None:
            return self._engine.sized(job.height, job.width)
        if (job.width or width, job.height or height) != (width, height):
            raise InputError(f"{self.description.id} draws {width}x{height} pixels alone")
        return self._model

    def _guidance(self, job: Job) -> float | None:
        """The scale of one image; None where the student takes none."""
        if self._distilled is not None:
            return self._distilled.choose_guidance(job.guidance)
        scale = DEFAULT_GUIDANCE if job.guidance is None else job.guidance
        if not 1 <= scale <= 1e4:
            raise InputError(f"guidance {scale:g} can't be used, only 1 to 10000")
        return scale

    def _negative_prompt(self, job: Job) -> str | None:
        """The negative prompt of one image; None where the student takes none."""
        if self._distilled is None:
            return job.negative_prompt or ""
        return self._distilled.choose_negative_prompt(job.negative_prompt)

    def _denoiser(self, jobs: Sequence[Job], model: Model) -> Denoiser:
        """One for a batch of images, each at its own scale."""
        scales = [scale for job in jobs if (scale := self._guidance(job)) is not None]
        guidance = torch.tensor(scales, device=model.device) if scales else None
        # An engine has a runner for each size.
        runner = self._runner if self._engine is None else model.denoiser
        if self._distilled is None:
            assert guidance is not None
            return GuidedDenoiser(runner, guidance)
        return SinglePassDenoiser(runner, guidance, live_negative_prompt=self._distilled.live_negative_prompt)


def _levels(pictures: Sequence[Picture]) -> np.ndarray:
    """`(B, H, W, 3)`, 0 to 255, signed, so that they can be subtracted."""
    return np.stack([np.asarray(each.image, dtype=np.int16) for each in pictures])
