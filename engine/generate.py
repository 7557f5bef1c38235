"""`boostdiff generate`: prompts to PNG files, by the student or its teacher."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .adapters import ADAPTER_NAME
from .captured import CapturedRunner, check_capturable, missing_cuda
from .compiled import CompiledRunner, missing_compiler, with_bfloat16_vae
from .conditions import TextEmbeddings
from .config import GenerateConfig
from .errors import BoostDiffError, InputError
from .exported import Engine, scheduler_of
from .family import TEXT_BATCH_SIZE, Family
from .files import check_output, prepare_output, write_whole
from .guidance import Denoiser, GuidedDenoiser, teacher_denoiser
from .guiders import GuiderOptions
from .manifest import read_manifest, verify_configurations
from .merge import merge_in_place
from .model import Model, ModelFiles, load, resolve_device
from .norms import NORMS_FILE
from .options import ENGINE_FOLDER, SAMPLER, STEPS, STUDENT_FOLDER
from .prompts import truncation_note
from .runners import Runner, TorchRunner
from .sampling import batches, default_batch_size, to_pil
from .schedulers import check_spacing, check_steps
from .student import apply_student, check_model, read_student

IN_TORCH: dict[str, Callable[..., Runner]] = {
    "torch": TorchRunner,
    "captured": CapturedRunner,
    "compiled": CompiledRunner,
}
LACKING: dict[str, Callable[[torch.device], str | None]] = {"captured": missing_cuda, "compiled": missing_compiler}
"""What a runner lacks on a device, or None."""

DEFAULT_GUIDANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What draws, ready to run; `negative_prompt` is None where one pass needs none."""

    model: Model
    denoiser: Denoiser
    negative_prompt: str | None
    adapter: str | None = None

    def encode(self, prompts: Sequence[str]) -> TextEmbeddings:
        """The text embeddings of B prompts, in the denoiser's dtype."""
        text = self.model.family.encode(self.model.pipeline, prompts, negative_prompt=self.negative_prompt)
        return text.to(self.model.denoiser.dtype)


def resolve(files: ModelFiles | None, config: GenerateConfig) -> GenerateConfig:
    """With sampler, steps and timestep spacing filled in: a few-step student's own, or the defaults.

    Of a model no weights are read.

    Raises:
        InputError: student or engine can't be read, or can't take them; the model's schedule has too few timesteps; or
            the model can't draw images of this size, or on this runner.
    """
    distilled = None
    if config.on_engine:
        folder = config.engine or ENGINE_FOLDER
        manifest = read_manifest(folder)
        verify_configurations(folder, manifest)
        distilled, schedule = manifest.distilled, scheduler_of(folder).config
    elif files is None:
        raise InputError(f"the runner {config.runner} needs a model")
    else:
        schedule = files.scheduler_config
        if config.runner == "captured":
            check_capturable(files.family)
        if size := _asked_size(files, config):
            options = "--height and --width"
            files.family.check_size(size, files.denoiser_config, files.vae_config, options=options)
        if not config.teacher:
            distilled = read_student(config.student or STUDENT_FOLDER)
    asked = config.timestep_spacing
    spacing: Any = distilled.choose_spacing(asked) if distilled else asked
    check_spacing(schedule, asked)
    chosen: tuple[Any, int] = (config.sampler or SAMPLER, config.steps or STEPS)
    sampler, steps = distilled.choose_sampling(config.sampler, config.steps) if distilled else chosen
    check_steps(schedule, [sampler], [steps], spacing=spacing)
    return replace(config, sampler=sampler, steps=steps, timestep_spacing=spacing)


@contextmanager
def open_engine(config: GenerateConfig, device: str) -> Iterator[Sampling]:
    """The engine, of whose model no more is read than `Engine` says, and of a student's folder its hashes."""
    folder = config.engine or ENGINE_FOLDER
    manifest = read_manifest(folder)
    if config.student is not None:
        manifest.check_student(read_student(config.student), engine=folder)
    negative_prompt = manifest.distilled.choose_negative_prompt(config.negative_prompt)
    manifest.distilled.check_guider(config)
    with Engine.load(folder, runner=config.runner, device=device, precision=config.precision) as engine:
        model = engine.sized(config.height, config.width)
        yield Sampling(
            model=model,
            denoiser=engine.denoiser(config.guidance),
            negative_prompt=negative_prompt,
            adapter=manifest.inputs["adapter"],
        )


def _asked_size(files: ModelFiles, config: GenerateConfig) -> list[int] | None:
    """Height and width in pixels, of which one may be the model's own; None where both are."""
    if not (config.height or config.width):
        return None
    latent = files.family.latent_shape(files.denoiser_config)[1:]
    factor = files.family.pixels_per_latent(files.vae_config)
    return [pixels or factor * side for pixels, side in zip((config.height, config.width), latent, strict=True)]


def _load(files: ModelFiles, config: GenerateConfig, device: torch.device) -> Model:
    """The model in torch, made to draw images of the size that was asked for; see `load`."""
    model = load(files, device=device)
    if size := _asked_size(files, config):
        factor = files.family.pixels_per_latent(files.vae_config)
        # Noise, and SDXL's conditions, are of the size in the denoiser's configuration.
        model.denoiser.register_to_config(sample_size=[side // factor for side in size])
    return with_bfloat16_vae(model) if config.runner == "compiled" else model


def _runner(config: GenerateConfig, denoiser: Any) -> Runner:
    return IN_TORCH[config.runner](denoiser, **({"max_autotune": True} if config.max_autotune else {}))


def open_teacher(files: ModelFiles, config: GenerateConfig, device: torch.device) -> Sampling:
    """The teacher in torch: two passes with guidance, one where w is 1."""
    model = _load(files, config, device)
    scale = DEFAULT_GUIDANCE if config.guidance is None else config.guidance
    guider = config.chosen_guider.for_schedule(model.pipeline.scheduler.config)
    denoiser = teacher_denoiser(_runner(config, model.denoiser), scale, guider)
    negative_prompt = (config.negative_prompt or "") if isinstance(denoiser, GuidedDenoiser) else None
    return Sampling(model=model, denoiser=denoiser, negative_prompt=negative_prompt)


def open_student(files: ModelFiles, config: GenerateConfig, device: torch.device) -> Sampling:
    """The student in torch: its adapter beside the weights, merged on runners that compile."""
    folder = config.student or STUDENT_FOLDER
    # What the student can't do is said before the weights are read.
    info = read_student(folder)
    info.choose_guidance(config.guidance)
    negative_prompt = info.choose_negative_prompt(config.negative_prompt)
    info.check_guider(config)
    if config.lora_scale is not None:
        # At LoRA scale 0 these would not be the base (a DoRA's magnitudes stay), or the base at too few steps.
        others = {
            "guidance-conditioned": info.guidance_range,
            "live negative prompt": info.live_negative_prompt,
            "few-step": info.steps,
            "normalization-tuned": NORMS_FILE in info.adapter_files,
            info.method: info.method != "lora",
        }
        if other := next((name for name, there in others.items() if there), None):
            raise InputError(f"--lora-scale is for students of method lora and one guidance scale, not {other} ones")
    check_model(info, folder, files)
    model = _load(files, config, device)
    if config.runner == "torch":
        apply_student(model.denoiser, folder, info)
    else:
        # Adapters would cost time in every layer.
        merge_in_place(model.denoiser, folder, info)
    if config.lora_scale is not None:
        model.denoiser.set_adapters(ADAPTER_NAME, config.lora_scale)
    denoiser = info.denoiser(_runner(config, model.denoiser), config.guidance)
    return Sampling(model=model, denoiser=denoiser, negative_prompt=negative_prompt, adapter=info.adapter_sha256)


def device_for(runner: str, family: Family, name: str) -> torch.device:
    """The device of this name, for a runner of `IN_TORCH` and a model of a family.

    Raises:
        InputError: this machine lacks the device, or no CUDA graph can hold the family's denoisers.
        BoostDiffError: the runner lacks something there.
    """
    if runner == "captured":
        check_capturable(family)
    target = resolve_device(name)
    if (lacking := LACKING.get(runner)) and (reason := lacking(target)):
        raise BoostDiffError(reason)
    return target


@contextmanager
def opened(files: ModelFiles | None, config: GenerateConfig, device: str) -> Iterator[Sampling]:
    """What a resolved configuration draws with.

    Raises:
        InputError: the student or the engine can't be used.
        BoostDiffError: this machine can't run it.
    """
    if config.on_engine:
        with open_engine(config, device) as sampling:
            yield sampling
        return
    assert files is not None
    yield (open_teacher if config.teacher else open_student)(
        files, config, device_for(config.runner, files.family, device)
    )


def images_of(
    sampling: Sampling,
    config: GenerateConfig,
    prompts: Sequence[str],
    *,
    start: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Image.Image]:
    """Draw some of a resolved configuration's prompts, of which the first is number `start`."""
    assert config.sampler is not None
    assert config.steps is not None
    batch_size = config.batch_size or default_batch_size(sampling.model)
    # The embeddings of a whole shard can be gigabytes. Of whole batches, so that the same images are drawn together.
    part = batch_size * max(1, TEXT_BATCH_SIZE // batch_size)
    for first in range(0, len(prompts), part):
        drawn = batches(
            sampling.model,
            sampling.denoiser,
            text=sampling.encode(prompts[first : first + part]),
            make_scheduler=partial(sampling.model.make_scheduler, config.sampler, spacing=config.timestep_spacing),
            steps=config.steps,
            seed=config.seed + start + first,
            batch_size=batch_size,
            on_step=on_step,
        )
        for images in drawn:
            yield from to_pil(images)


def draw(
    files: ModelFiles | None,
    config: GenerateConfig,
    *,
    output: Path,
    device: str = "auto",
    on_step: Callable[[int], None] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Path]:
    """Write one PNG per prompt, named after its prompt and seed; prompt and settings stand in its text chunks.

    An image of the same prompt, seed and settings is replaced, one of other settings stays: the new one is numbered.
    Each batch is written as it is ready: what was drawn before an interruption stays. An engine needs no `files`.
    `on_step` is told the number of images that took a step, `on_note` what of the texts is not used, in words.

    Raises:
        InputError: the student, the engine or the output can't be used.
    """
    config = resolve(files, config)
    check_output(output)
    paths: list[Path] = []
    with opened(files, config, device) as sampling:
        prepare_output(output)
        for what, texts in (("prompts", config.prompts), ("negative prompts", [config.negative_prompt or ""])):
            if note := truncation_note(sampling.model.pipeline, texts, what):
                on_note(note)
        model, adapter = sampling.model.files.name, sampling.adapter
        for image in images_of(sampling, config, config.prompts, on_step=on_step):
            paths.append(_write_png(image, config, len(paths), folder=output, model=model, adapter=adapter))
    return paths


def drawn_by(config: GenerateConfig, adapter: str | None) -> dict[str, Any]:
    """What an image was drawn by beside prompt, seed and model, and what isn't the student's own; and its adapter."""
    names = (
        "guidance",
        "negative_prompt",
        *(field.name for field in fields(GuiderOptions)),
        "timestep_spacing",
        "lora_scale",
        "precision",
    )
    chosen = {name: getattr(config, name) for name in names}
    chosen |= {"runner": None if config.runner == "torch" else config.runner, "adapter_sha256": adapter}
    return {"sampler": config.sampler, "steps": config.steps} | {k: v for k, v in chosen.items() if v is not None}


def texts_of(config: GenerateConfig, prompt: str, *, seed: int, model: str, adapter: str | None) -> dict[str, str]:
    """A PNG's text chunks: prompt and settings."""
    values = {"prompt": prompt, "model": model, "seed": seed} | drawn_by(config, adapter)
    return {key.replace("_", " "): str(value) for key, value in values.items()}


def png_of(image: Image.Image, texts: dict[str, str]) -> bytes:
    """A PNG file's content, with these text chunks."""
    notes = PngInfo()
    for key, text in texts.items():
        notes.add_itxt(key, text)
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=notes)
    return content.getvalue()


def _drawn(path: Path) -> tuple[tuple[int, int], dict[str, str]] | None:
    """Size and text chunks of an image; None if it can't be read."""
    try:
        with Image.open(path) as image:
            return image.size, dict(getattr(image, "text", {}))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _write_png(
    image: Image.Image, config: GenerateConfig, index: int, *, folder: Path, model: str, adapter: str | None = None
) -> Path:
    """Write the image of one prompt, whole or not at all."""
    prompt, seed = config.prompts[index], config.seed + index
    texts = texts_of(config, prompt, seed=seed, model=model, adapter=adapter)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
    if slug.replace("-", " ") != prompt:
        # Other prompts have the same slug; this one's hash is its alone.
        slug += f"_{hashlib.sha256(prompt.encode()).hexdigest()[:10]}"
    role = "teacher" if config.teacher else "student"
    # Of a link, the folder that it leads to.
    folder.resolve().mkdir(exist_ok=True)
    names = (f"{slug}-{role}-{seed}{number}.png" for number in chain([""], (f"-{n}" for n in count(2))))
    drawn = image.size, texts
    path = next(path for path in map(folder.joinpath, names) if not path.exists() or _drawn(path) == drawn)
    write_whole(path, png_of(image, texts))
    return path
