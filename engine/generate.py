"""`boostdiff generate`: prompts to PNG files, by the student or its teacher."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .adapters import ADAPTER_NAME
from .captured import CapturedRunner, missing_cuda
from .compiled import CompiledRunner, missing_compiler
from .errors import BoostDiffError, InputError
from .exported import Engine
from .families import TextEmbeddings
from .files import prepare_output
from .guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser, teacher_denoiser
from .manifest import read_manifest
from .merge import fold_student
from .model import Model, ModelFiles, load, resolve_device
from .runners import EXPORTED, Runner, TorchRunner
from .sampling import batches, default_batch_size, to_pil
from .schedulers import make_scheduler
from .student import apply_student, check_negative_prompt, read_student

IN_TORCH: dict[str, Callable[[UNet2DConditionModel], Runner]] = {
    "torch": TorchRunner,
    "captured": CapturedRunner,
    "compiled": CompiledRunner,
}
LACKING: dict[str, Callable[[torch.device], str | None]] = {"captured": missing_cuda, "compiled": missing_compiler}
"""What a device or machine lacks for a runner."""

RUNNERS = (*IN_TORCH, *EXPORTED)
DEFAULT_GUIDANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """What to draw, and with what.

    Attributes:
        prompts: one image each; image i starts from the noise of `seed + i`.
        student: its folder; None draws with the teacher, on a runner in `EXPORTED` with the engine's student.
        engine: what `export` wrote, for the runners that need it.
        runner: a name in `RUNNERS`.
        precision: "fp32" or "fp16" of the onnx runner's graphs; None takes what the device is faster at.
        guidance: of the teacher, or of a student that takes it as an input; others have the one they learnt.
        negative_prompt: of the teacher; a student has the one that it was distilled with.
        dial: weight of a `lora` student, from 0 (no guidance) to 1 (the guidance that it was distilled at).
        sampler: a name in `samplers.SAMPLERS`.
        steps: sampling steps.
        seed: see `prompts`.
        batch_size: images denoised together; None takes `generate.default_batch_size`.
    """

    prompts: list[str]
    student: Path | None
    engine: Path
    runner: str = "torch"
    precision: str | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    dial: float | None = None
    sampler: str = "ddim"
    steps: int = 20
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        if self.runner not in RUNNERS:
            raise InputError(f"unknown runner {self.runner!r}: choose one of {', '.join(RUNNERS)}")
        if self.precision not in (None, "fp32", "fp16"):
            raise InputError(f"unknown precision {self.precision!r}: choose fp32 or fp16")
        if self.precision and not self.runner.startswith("onnx"):
            raise InputError("--precision is for ONNX Runtime's graphs: pass --runner onnx with it")
        if self.steps < 1:
            raise InputError("--steps must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError("--batch-size must be at least 1")
        if self.guidance is not None and not 1 <= self.guidance < float("inf"):
            raise InputError(f"--guidance {self.guidance:g} can't be used: it must be at least 1")
        if self.dial is not None:
            if not 0 <= self.dial <= 1:
                raise InputError("--dial must lie between 0 and 1")
            if self.student is None or self.runner != "torch":
                raise InputError("--dial is for a student on the torch runner: elsewhere its weights are merged")
        if not all(prompt.strip() for prompt in self.prompts):
            raise InputError("a prompt is empty")
        make_scheduler(self.sampler, {})

    @property
    def total_steps(self) -> int:
        """Denoising steps over all images."""
        return len(self.prompts) * self.steps


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    model: Model
    denoiser: Denoiser
    text: TextEmbeddings


@contextmanager
def _opened_engine(config: DrawConfig, device: str) -> Iterator[_Drawing]:
    """The engine alone: neither the model's folder nor the student's is read, but to compare a student's hashes."""
    manifest = read_manifest(config.engine)
    if config.student is not None:
        manifest.check_student(read_student(config.student), engine=config.engine)
    check_negative_prompt(config.negative_prompt, own=manifest.student["negative_prompt"])
    with Engine.load(config.engine, runner=config.runner, device=device, precision=config.precision) as engine:
        yield _Drawing(
            model=engine.model, denoiser=engine.denoiser(config.guidance), text=engine.encode(config.prompts)
        )


@contextmanager
def _opened_in_torch(files: ModelFiles, config: DrawConfig, device: str) -> Iterator[_Drawing]:
    info = None
    if config.student is not None:
        # What the student can't do is said before the weights are read.
        info = read_student(config.student, files)
        info.choose_guidance(config.guidance)
        info.check_negative_prompt(config.negative_prompt)
        if config.dial is not None and info.method != "lora":
            # A DoRA's magnitudes stay at weight 0: that is not the base.
            raise InputError(f"--dial is the weight of a student of method lora: this one is of method {info.method}")
        if config.dial is not None and info.guidance_range is not None:
            # Its guidance input would stay on.
            raise InputError("--dial is for students of one scale: this one takes its guidance as an input, --guidance")
    target = resolve_device(device)
    if config.runner in LACKING and (reason := LACKING[config.runner](target)):
        raise BoostDiffError(reason)
    model = load(files, device=target)
    make_runner = IN_TORCH[config.runner]
    away_from = None
    if config.student is None or info is None:
        runner = make_runner(model.unet)
        denoiser = teacher_denoiser(runner, DEFAULT_GUIDANCE if config.guidance is None else config.guidance)
        away_from = (config.negative_prompt or "") if isinstance(denoiser, GuidedDenoiser) else None
    else:
        if config.runner != "torch":
            # Adapters would cost time in every layer.
            fold_student(model.unet, config.student, info)
        else:
            apply_student(model, config.student, info)
        if config.dial is not None:
            model.unet.set_adapters(ADAPTER_NAME, config.dial)
        denoiser = SinglePassDenoiser(make_runner(model.unet), info.choose_guidance(config.guidance))
    text = model.family.encode(model.pipeline, config.prompts, negative_prompt=away_from)
    yield _Drawing(model=model, denoiser=denoiser, text=text)


def draw(
    files: ModelFiles | None,
    config: DrawConfig,
    *,
    output: Path,
    device: str = "auto",
    on_step: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write one PNG a prompt, named after its prompt and seed; prompt and settings stand in its text chunks.

    Each batch is written as it is ready: what was drawn before an interruption stays.

    Args:
        files: the model; not needed by a runner in `EXPORTED`.
        config: what to draw.
        output: the folder; pictures of other prompts and seeds in it stay.
        device: "auto", "cpu", "cuda", …
        on_step: told how many images took a step.

    Raises:
        InputError: the student, the engine or the output can't be used.
    """
    prepare_output(output)
    if config.runner in EXPORTED:
        opened = _opened_engine(config, device)
    elif files is not None:
        opened = _opened_in_torch(files, config, device)
    else:
        raise InputError(f"the runner {config.runner} needs a model")
    paths: list[Path] = []
    with opened as drawing:
        drawn = batches(
            drawing.model,
            drawing.denoiser,
            text=drawing.text,
            make_scheduler=partial(make_scheduler, config.sampler, drawing.model.pipeline.scheduler.config),
            steps=config.steps,
            seed=config.seed,
            batch_size=config.batch_size or default_batch_size(drawing.model),
            on_step=on_step,
        )
        for images in drawn:
            for image in to_pil(images):
                paths.append(_write_png(image, config, len(paths), model=drawing.model.files.name, folder=output))
    return paths


def _write_png(image: Image.Image, config: DrawConfig, index: int, *, model: str, folder: Path) -> Path:
    """Write the image of one prompt, whole or not at all."""
    prompt, seed = config.prompts[index], str(config.seed + index)
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
    kind = "teacher" if config.student is None and config.runner in IN_TORCH else "student"
    notes = PngInfo()
    for key, value in (
        ("prompt", prompt),
        ("model", model),
        ("sampler", f"{config.sampler}, {config.steps} steps"),
        ("seed", seed),
    ):
        notes.add_itxt(key, value)
    folder.mkdir(exist_ok=True)
    path = folder / f"{slug}-{kind}-{seed}.png"
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    image.save(partial_path, format="PNG", pnginfo=notes)
    partial_path.replace(path)
    return path
