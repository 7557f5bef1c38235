"""An exported student in Python: `Engine.load("outputs/engine")("a prompt", steps=20, seed=0)`.

The pipeline runs from the engine folder; text encoders that are not exported (see `Family.exported_text_encoders`) run
in torch, from the folder of the model that the engine was made from.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from transformers import CLIPTokenizer

from .conditions import TextEmbeddings
from .config import EXPORTED
from .errors import BoostDiffError, InputError
from .exported_parts import ExportedTextEncoder, ExportedVaeDecoder, text_in_torch
from .families import family_of
from .files import read_json
from .guidance import Denoiser
from .manifest import Manifest, read_manifest, verify_configurations
from .model import Model, ModelFiles, resolve_device
from .prompts import truncation_note
from .runners import GraphRunner, open_session, unavailable
from .sampling import batches, decode, default_batch_size, initial_noise, sampling, to_pil, verify_finite
from .schedulers import check_schedule, check_spacing, check_steps, completed, make_scheduler
from .sessions import PROVIDERS, Session


@dataclass(frozen=True, kw_only=True)
class Step:
    """The state after one sampling step.

    Attributes:
        index: index of the step, from 0.
        total: steps in all.
        latents: `(B, C, H, W)`.
        model: decodes them.
    """

    index: int
    total: int
    latents: torch.Tensor
    model: Model

    def images(self) -> list[Image.Image]:
        """The state decoded: noise at first, the finished images at the last step."""
        return to_pil(decode(self.model, self.latents))


class Engine(AbstractContextManager["Engine"]):
    """An exported student, ready to draw. A context manager; `close` frees what it holds. Threads may share it.

    Attributes:
        manifest: the engine's manifest.
        model: its parts as a stock diffusers pipeline, `model.pipeline`, that makes one pass a step.
    """

    def __init__(self, *, manifest: Manifest, model: Model, opened: ExitStack) -> None:
        """Not to be called: see `load`."""
        self.manifest, self.model, self._opened = manifest, model, opened
        # Tokenizers keep the padding of a call in themselves.
        self._encoding = threading.Lock()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        runner: str = "auto",
        device: str = "auto",
        precision: str | None = None,
        low_memory: bool = False,
    ) -> Self:
        """Open what `boostdiff export` wrote. Every file is checked against the manifest first.

        Args:
            folder: the engine folder.
            runner: a name in `config.EXPORTED`, or "auto": TensorRT where the device can run the plan, else ONNX
                Runtime.
            device: "auto", "cpu", "cuda", "cuda:1", …; TensorRT runs on no CPU.
            precision: "fp32", "fp16", "int8" or "fp8" of the ONNX graphs; by default which of the first two the device
                is faster at.
            low_memory: less memory in ONNX Runtime, but slower.

        Raises:
            InputError: the engine is missing, incomplete or was changed.
            BoostDiffError: this machine can't run it.
        """
        folder, target = Path(folder), resolve_device(device)
        manifest = read_manifest(folder)
        if device == "auto" and target.type not in PROVIDERS:
            target = torch.device("cpu")
        if runner == "auto":
            # A plan has one precision.
            runner = "onnx" if precision or unavailable("tensorrt", manifest, target) else "tensorrt"
        if runner not in EXPORTED:
            raise InputError(f"an engine has no runner {runner!r}: choose one of {', '.join(EXPORTED)}")
        if reason := unavailable(runner, manifest, target):
            # What was never exported is the user's to change, what the machine lacks is not.
            fault = InputError if runner == "tensorrt" and manifest.plan not in manifest.files else BoostDiffError
            raise fault(f"can't run the engine in {folder} with {runner}: {reason}")
        verify_configurations(folder, manifest)
        if unknown := manifest.unknown_files(folder):
            raise InputError(f"{folder / unknown[0]} is no part of the engine: remove it, or export again")
        with ExitStack() as stack:
            session = partial(
                open_session,
                runner,
                folder=folder,
                manifest=manifest,
                device=target,
                precision=precision,
                low_memory=low_memory,
            )
            model = _assemble(folder, manifest, lambda part: stack.enter_context(session(part)), target, precision)
            return cls(manifest=manifest, model=model, opened=stack.pop_all())

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def runner(self) -> str:
        """The runner's name, one in `config.EXPORTED`."""
        return self.model.denoiser.name

    def close(self) -> None:
        """Free sessions and their memory."""
        self._opened.close()

    def denoiser(self, guidance: float | None = None) -> Denoiser:
        """The student's single pass.

        Raises:
            InputError: the student was not distilled for this guidance.
        """
        return self.manifest.distilled.denoiser(self.model.denoiser, guidance)

    def sized(self, height: int | None = None, width: int | None = None) -> Model:
        """The model that draws images of a size in pixels; it shares everything with `model`.

        Raises:
            InputError: the engine was not exported for it.
        """
        factor, config = self.model.pipeline.vae_scale_factor, self.manifest.denoiser_config
        default = [factor * side for side in self.model.latent_shape[1:]]
        size = [asked or side for asked, side in zip((height, width), default, strict=True)]
        smallest, _, largest = self.manifest.options["size"] or (0, 0, 0)
        multiple = self.model.family.pixel_multiple(config, self.model.pipeline.vae.config, exported=True)
        if size != default and not all(smallest <= side <= largest and side % multiple == 0 for side in size):
            raise InputError(
                f"the engine in {self.model.files.folder} can't draw {size[0]}x{size[1]} pixels: it was exported for "
                + (f"{default[0]}x{default[1]}" if smallest == largest else f"{smallest} to {largest}, in {multiple}s")
                + "; `boostdiff export --size` makes others"
            )
        denoiser, pipeline = copy.copy(self.model.denoiser), copy.copy(self.model.pipeline)
        denoiser.config = FrozenDict({**denoiser.config, "sample_size": [side // factor for side in size]})
        setattr(pipeline, self.model.family.denoiser, denoiser)
        return replace(self.model, pipeline=pipeline)

    def encode(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        model: Model | None = None,
    ) -> TextEmbeddings:
        """Embeddings of the prompts, and of the negative prompts where the student takes any.

        Warns, once a call, if prompts are truncated to what the text encoder takes.

        Args:
            prompts: B of them.
            negative_prompt: one for all, or B of them.
            model: from `sized`, for another size: SDXL is conditioned on it.

        Raises:
            InputError: a prompt is empty, the number of negative prompts is another, or the student takes none.
        """
        model, prompts = model or self.model, _listed(prompts)
        given = [negative_prompt] if isinstance(negative_prompt, str | None) else list(negative_prompt)
        if len(given) not in (1, len(prompts)):
            raise InputError(f"there are {len(given)} negative prompts for {len(prompts)} prompts")
        chosen = [self.manifest.distilled.choose_negative_prompt(each) for each in given]
        negatives = [each for each in chosen if each is not None]
        with self._encoding:
            notes = [
                truncation_note(model.pipeline, texts, what)
                for texts, what in ((prompts, "prompts"), (negatives, "negative prompts"))
            ]
            text = model.family.encode(model.pipeline, prompts, negative_prompt=negatives or None)
        for note in notes:
            if note:
                # Of who calls `__call__` or iterates over `stream`.
                warnings.warn(note, stacklevel=3)
        return text.to(model.denoiser.dtype)

    def _sampling(
        self, sampler: str | None, steps: int | None, spacing: str | None
    ) -> tuple[Callable[[Model], SchedulerMixin], int]:
        """What gives a model's scheduler, and the number of steps; an InputError where the student takes others."""
        distilled, schedule = self.manifest.distilled, self.model.pipeline.scheduler.config
        name, steps = distilled.choose_sampling(sampler, steps)
        if not isinstance(steps, Integral) or isinstance(steps, bool):
            raise InputError(f"steps {steps!r} can't be used: pass a whole number")
        check_spacing(schedule, spacing)
        spacing = distilled.choose_spacing(spacing)
        check_steps(schedule, [name], [steps], spacing=spacing)
        return lambda model: model.make_scheduler(name, spacing=spacing), steps

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | None = None,
        timestep_spacing: str | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
    ) -> list[Image.Image]:
        """Draw any number of images: the arguments of `stream`, and `batch_size`, the number denoised together.

        Raises:
            InputError: see `stream`.
        """
        if batch_size is not None and batch_size < 1:
            raise InputError(f"the batch size {batch_size} can't be used: it must be at least 1")
        make_scheduler, steps = self._sampling(sampler, steps, timestep_spacing)
        model = self.sized(height, width)
        drawn = batches(
            model,
            self.denoiser(guidance),
            text=self.encode(prompts, negative_prompt=negative_prompt, model=model),
            make_scheduler=partial(make_scheduler, model),
            steps=steps,
            seed=seed,
            batch_size=batch_size or default_batch_size(model),
        )
        return [image for images in drawn for image in to_pil(images)]

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | None = None,
        timestep_spacing: str | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[Step]:
        """Draw in one batch, with the state after every step; `Step.images` decodes it.

        Args:
            prompts: one image each; image i starts from the noise of `seed + i`.
            negative_prompt: for a student of live negative prompts: one for all, or one per image.
            steps: sampling steps; None takes a few-step student's own, else 20.
            seed: see `prompts`.
            sampler: a name in `schedulers.SAMPLERS`; None takes a few-step student's own, else "ddim".
            timestep_spacing: "leading" or "trailing"; None takes a few-step student's own, else the model's.
            guidance: scale for a guidance-conditioned student; None takes its default.
            height: height of the images in pixels, within what the engine was exported for; None takes the engine's.
            width: likewise.

        Raises:
            InputError: a prompt is empty, the sampler is unknown, or the student or the engine is not made for this.
        """
        make_scheduler, steps = self._sampling(sampler, steps, timestep_spacing)
        model = self.sized(height, width)
        text = self.encode(prompts, negative_prompt=negative_prompt, model=model)
        noise = initial_noise(model.latent_shape, count=len(text), seed=seed)
        states = sampling(
            self.denoiser(guidance),
            text=text,
            noise=noise.to(model.device, model.family.latents_dtype(text.conditional.dtype)),
            scheduler=make_scheduler(model),
            steps=steps,
        )
        finite = []
        for index, latents in enumerate(states):
            finite.append(latents.isfinite().all())
            if index + 1 == steps:
                verify_finite(finite, latents.dtype)
            yield Step(index=index, total=steps, latents=latents, model=model)


def _listed(prompts: str | Sequence[str]) -> list[str]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("a prompt is no text")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise InputError("a prompt is empty")
    return prompts


def _assemble(
    folder: Path,
    manifest: Manifest,
    opened: Callable[[str], Session],
    device: torch.device,
    precision: str | None = None,
) -> Model:
    """A stock pipeline of exported parts; `opened` gives a part's session.

    Raises:
        InputError: see `exported_parts.text_in_torch`.
    """
    index = read_json(folder / "model_index.json")
    family = family_of(index)
    components: dict[str, Any] = {}
    for name in family.exported_text_encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        components[name] = ExportedTextEncoder(opened(name), config=read_json(folder / name / "config.json"))
        components[tokenizer] = CLIPTokenizer.from_pretrained(folder / tokenizer, local_files_only=True)
    components |= text_in_torch(manifest, family, device=device)
    vae_config = read_json(folder / "vae_decoder" / "config.json")
    components["vae"] = ExportedVaeDecoder(
        opened("vae_decoder"), config=vae_config, pixels_per_latent=family.pixels_per_latent(vae_config)
    )
    session = opened(family.denoiser)
    if session.name == "tensorrt":
        precision = manifest.artefacts[manifest.plan]["precision"]
    components[family.denoiser] = GraphRunner(
        session, family=family, denoiser_config=manifest.denoiser_config, precision=precision
    )
    scheduler, few = scheduler_of(folder), manifest.distilled
    if few.steps:
        # The pipeline's own must be the student's, too.
        scheduler = make_scheduler(str(few.sampler), scheduler.config, spacing=few.timestep_spacing)
    components["scheduler"] = scheduler
    pipeline = family.assemble(components, index)
    pipeline.set_progress_bar_config(disable=True)
    files = ModelFiles(name=manifest.model, folder=folder, family=family, denoiser_config=manifest.denoiser_config)
    return Model(files=files, pipeline=pipeline)


def scheduler_of(folder: Path) -> SchedulerMixin:
    """The scheduler of the model that an engine was made from."""
    index = read_json(folder / "model_index.json")
    class_name = index["scheduler"][1]
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    check_schedule(class_name, completed(class_name, config), flow=family_of(index).flow)
    scheduler: SchedulerMixin = getattr(diffusers, class_name).from_config(config)
    return scheduler
