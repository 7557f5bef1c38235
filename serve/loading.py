"""From what settings name to a model that draws: `open_model`, and what can be said before weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..engine.compiled import CompiledRunner, with_bfloat16_vae
from ..engine.errors import InputError
from ..engine.exported import Engine
from ..engine.generate import IN_TORCH, device_for
from ..engine.manifest import Manifest, read_manifest
from ..engine.merge import merge_in_place
from ..engine.model import load, locate
from ..engine.runners import Runner, chosen_graph
from ..engine.sampling import default_batch_size
from ..engine.student import Distilled, read_student
from .image_model import ImageModel
from .settings import ModelSettings


def in_torch(settings: ModelSettings) -> str:
    """The runner's name in `generate.IN_TORCH`, of a student or a teacher."""
    return "torch" if settings.runner == "auto" else settings.runner


def open_model(settings: ModelSettings) -> ImageModel:
    """Open what the settings name.

    Raises:
        InputError: the engine, the student or the model can't be used.
        BoostDiffError: this machine can't run it.
    """
    engine: Engine | None = None
    distilled: Distilled | None = None
    if settings.engine is not None:
        how: dict[str, Any] = settings.model_dump(include={"runner", "device", "precision"})
        engine = Engine.load(settings.engine, **how)
        model, distilled = engine.model, engine.manifest.distilled
        runner: Runner = model.denoiser
    else:
        files = locate(settings.model)
        if settings.student is not None:
            distilled = info = read_student(Path(settings.student), files)
        name = in_torch(settings)
        model = load(files, device=device_for(name, files.family, settings.device))
        if settings.student is not None:
            # An adapter beside the weights would cost time in every layer.
            merge_in_place(model.denoiser, Path(settings.student), info)
        if name == "compiled":
            model, most = with_bfloat16_vae(model), settings.max_batch or default_batch_size(model)
            # Smaller batches are filled up: to compile for each size would take minutes.
            one, all_rows = (1, most) if distilled else (2, 2 * most)
            runner = CompiledRunner(model.denoiser, batches=(one, all_rows))
        else:
            runner = IN_TORCH[name](model.denoiser)
    return ImageModel(
        name=name_of(settings),
        model=model,
        runner=runner,
        distilled=distilled,
        engine=engine,
        max_batch=settings.max_batch,
    )


def name_of(settings: ModelSettings) -> str:
    """The name that a model will have, once its folders were seen to hold what is asked for; no weights are read.

    Raises:
        InputError: they can't be used.
    """
    if settings.engine is not None:
        manifest = read_manifest(Path(settings.engine))
        _check_exported(settings, manifest)
        named = manifest.model
    else:
        named = locate(settings.model, weights=False).name
        if settings.student is not None:
            read_student(Path(settings.student))
    # Without the folders above it, which are nobody's business.
    name = re.split(r"[/\\]", named.rstrip("/\\"))[-1] or "model"
    teacher = settings.engine is None and settings.student is None
    return settings.name or name + ("-teacher" if teacher else "")


def _check_exported(settings: ModelSettings, manifest: Manifest) -> None:
    """Refuse, by an InputError, a runner or a precision that was not exported, whatever machine will draw."""
    folder = Path(settings.engine or "")
    if settings.runner == "tensorrt":
        if manifest.plan not in manifest.files:
            raise InputError(f"the engine in {folder} was exported without --trt: export again, or serve it with onnx")
        if settings.precision is not None:
            raise InputError("a plan has one precision: choose it with the runner onnx alone")
    elif settings.precision is not None:
        cpu = torch.device("cpu")
        chosen_graph(manifest.denoiser, folder=folder, manifest=manifest, device=cpu, precision=settings.precision)
