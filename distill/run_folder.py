"""A run's work folder: held by one process, begun, resumed, and made a student's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..engine.adapters import Adapter, PeftAdapter
from ..engine.errors import InputError
from ..engine.files import locked, read_json, sha256_of, write_json
from ..engine.model import Model
from ..engine.student import StudentInfo
from ..engine.versions import versions
from .checkpoint import CheckpointError, TrainingState, load_training_state
from .config import DistillConfig
from .loop import CHECKPOINT_FILE, Observers

CONFIG_FILE = "config.json"


def work_folder(output: Path) -> Path:
    """Where an unfinished run keeps its checkpoint: beside the folder that it will become."""
    return output.resolve().with_name(f"{output.resolve().name}.unfinished")


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold a run's work folder.

    Raises:
        InputError: another run does.
    """
    with locked(folder, wait=False) as free:
        if not free:
            raise InputError(f"another run is at work in {folder}: wait for it, or choose another --output")
        yield


def begin(folder: Path, resolved: dict[str, Any], observers: Observers) -> None:
    """An empty work folder with the run's settings; an earlier run that could go on is set aside, not lost."""
    if folder.exists():
        with exclusive_lock(folder):
            if (folder / CHECKPOINT_FILE).exists():
                aside = folder.with_suffix(".abandoned")
                shutil.rmtree(aside, ignore_errors=True)
                folder.replace(aside)
                observers.note(f"an unfinished run, which --resume would have gone on with, is now in {aside}")
            else:
                shutil.rmtree(folder)
    folder.mkdir()
    write_json(folder / CONFIG_FILE, resolved)


def write_student(
    folder: Path,
    model: Model,
    adapter: Adapter,
    config: DistillConfig,
    *,
    formats: tuple[str, ...],
    unet_sha256: str,
    result: dict[str, Any],
) -> StudentInfo:
    """The adapter's files, and `student.json` that names them."""
    paths = adapter.save(folder, model.pipeline)
    if "kohya" in formats:
        inner = getattr(adapter, "inner", adapter)
        assert isinstance(inner, PeftAdapter)
        inner.save_kohya(folder)
    low, high = config.guidance_bounds
    info = StudentInfo(
        method=config.method,
        guidance=(low + high) / 2,
        guidance_range=(low, high) if config.takes_guidance else None,
        negative_prompt=config.negative_prompt,
        model=model.files.name,
        unet_sha256=unet_sha256,
        adapter_files={path.name: sha256_of(path) for path in paths},
        trainable_parameters=adapter.count(),
        settings=config.as_json(),
        versions=versions(),
        result=result,
    )
    info.write(folder)
    return info


def resumable_state(folder: Path, resolved: dict[str, Any]) -> TrainingState | None:
    """What the checkpoint holds; None if none was written yet. Every process reads it."""
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"there is nothing to resume in {folder}: run without --resume")
    before = read_json(folder / CONFIG_FILE)
    changed = sorted(key for key in resolved.keys() | before.keys() if resolved.get(key) != before.get(key))
    if changed:
        details = ", ".join(f"{key} was {before.get(key)}, is {resolved.get(key)}" for key in changed)
        raise InputError(f"can't resume under other settings ({details}): repeat them, or run without --resume")
    if not (folder / CHECKPOINT_FILE).is_file():
        return None
    try:
        return load_training_state(folder / CHECKPOINT_FILE)
    except CheckpointError as error:
        raise InputError(f"can't resume: {error}; run without --resume") from None
