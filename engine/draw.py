"""`boostdiff generate`: prompts to PNG files, by the student or its teacher."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from .errors import InputError
from .files import prepare_output
from .generate import generate, to_pil
from .guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from .manifest import read_manifest
from .model import Model, ModelFiles, load, resolve_device
from .runners import Runner, TorchRunner, open_exported
from .samplers import make_scheduler
from .student import apply_student, read_student

RUNNERS = ("torch", "onnx", "tensorrt")
DEFAULT_GUIDANCE = 3.0


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """What to draw, and with what.

    Attributes:
        prompts: one image each; image i starts from the noise of `seed + i`.
        student: its folder; None draws with the teacher.
        engine: what `export` wrote, for the runners that need it.
        runner: a name in `RUNNERS`.
        guidance: of the teacher; a student has the guidance that it was distilled at.
        sampler: a name in `samplers.SAMPLERS`.
        steps: sampling steps.
        seed: see `prompts`.
        batch_size: images denoised together.
    """

    prompts: list[str]
    student: Path | None
    engine: Path
    runner: str = "torch"
    guidance: float | None = None
    sampler: str = "ddim"
    steps: int = 20
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        if self.runner not in RUNNERS:
            raise InputError(f"unknown runner {self.runner!r}: choose one of {', '.join(RUNNERS)}")
        if self.runner != "torch" and self.student is None:
            raise InputError(
                f"--teacher runs on torch only: an engine holds the student, leave --runner {self.runner} out"
            )
        if self.steps < 1:
            raise InputError("--steps must be at least 1")
        if self.guidance is not None and not 1 <= self.guidance < float("inf"):
            raise InputError(f"--guidance {self.guidance:g} can't be used: it must be at least 1")
        if not all(prompt.strip() for prompt in self.prompts):
            raise InputError("a prompt is empty")
        make_scheduler(self.sampler, {})

    @property
    def total_steps(self) -> int:
        """Denoising steps over all images."""
        return len(self.prompts) * self.steps


@contextmanager
def _open_runner(model: Model, config: DrawConfig) -> Iterator[Runner]:
    if config.student is None:
        yield TorchRunner(model.unet)
        return
    info = read_student(config.student, model.files)
    if config.guidance not in (None, info.guidance):
        raise InputError(
            f"this student was distilled at guidance {info.guidance:g} and can't give {config.guidance:g}: "
            "leave --guidance out, distil another, or pass --teacher"
        )
    if config.runner == "torch":
        apply_student(model, config.student)
        yield TorchRunner(model.unet)
        return
    manifest = read_manifest(config.engine)
    if manifest.inputs.get("adapter") != info.adapter_sha256:
        raise InputError(
            f"the engine in {config.engine} was exported from another student than {config.student}: "
            "run `boostdiff export` again"
        )
    with open_exported(config.runner, folder=config.engine, manifest=manifest, device=model.device) as runner:
        yield runner


def draw(
    files: ModelFiles,
    config: DrawConfig,
    *,
    output: Path,
    device: str = "auto",
    on_step: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write one PNG a prompt, named after its prompt and seed; prompt and settings stand in its text chunks.

    Args:
        files: the model.
        config: what to draw.
        output: the folder; pictures of other prompts and seeds in it stay.
        device: "auto", "cpu", "cuda", …
        on_step: told how many images took a step.

    Raises:
        InputError: the student, the engine or the output can't be used.
    """
    prepare_output(output)
    if config.student is not None:
        read_student(config.student, files)
    model = load(files, device=resolve_device(device))
    with _open_runner(model, config) as runner:
        denoiser: Denoiser = SinglePassDenoiser(runner)
        guidance = DEFAULT_GUIDANCE if config.guidance is None else config.guidance
        if config.student is None and guidance > 1:
            denoiser = GuidedDenoiser(runner, guidance)
        text = model.family.encode(model.pipeline, config.prompts, unconditional=isinstance(denoiser, GuidedDenoiser))
        images = generate(
            model,
            denoiser,
            text=text.to(runner.dtype),
            make_scheduler=partial(make_scheduler, config.sampler, model.pipeline.scheduler.config),
            steps=config.steps,
            seed=config.seed,
            batch_size=config.batch_size,
            on_step=on_step,
        )
    output.mkdir(exist_ok=True)
    paths = []
    for index, (prompt, image) in enumerate(zip(config.prompts, to_pil(images), strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
        kind = "teacher" if config.student is None else "student"
        path = output / f"{slug}-{kind}-{config.seed + index}.png"
        notes = PngInfo()
        for key, value in (
            ("prompt", prompt),
            ("model", files.name),
            ("sampler", f"{config.sampler}, {config.steps} steps"),
            ("seed", str(config.seed + index)),
        ):
            notes.add_itxt(key, value)
        partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
        image.save(partial_path, format="PNG", pnginfo=notes)
        partial_path.replace(path)
        paths.append(path)
    return paths
