"""A run's work folder: held by one process, begun, resumed, and made a student's folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..engine.adapters import KOHYA_FILE, Adapter, Lora
from ..engine.errors import InputError
from ..engine.files import locked, publish, read_json, sha256_of, write_json
from ..engine.guidance_input import ADAPTER_FILES
from ..engine.model import Model, ModelFiles
from ..engine.options import config_as_json
from ..engine.student import INFO_FILE, StudentInfo, load_adapter_for_training, read_student
from ..engine.versions import versions
from .checkpoint import TrainingState, load_training_state
from .config import DistillConfig, RunConfig
from .few_steps import STAGE_SAMPLER, STAGE_SPACING, STAGES
from .images import ImageData
from .loop import CHECKPOINT_FILE, LOG_FILE, PREVIEWS, Observers, Run

CONFIG_FILE, PREVIEW_FILE = "config.json", "grid.png"
TRACKER = "boostdiff"
"""Name of a run in trackers; TensorBoard has a folder of it."""

OWN_FILES = {INFO_FILE, CONFIG_FILE, LOG_FILE, PREVIEW_FILE, KOHYA_FILE, *ADAPTER_FILES}


def work_folder(output: Path) -> Path:
    """Where an unfinished run keeps its checkpoint: beside the folder that it will become."""
    return output.resolve().with_name(f"{output.resolve().name}.unfinished")


@contextmanager
def at_work_in(folder: Path) -> Iterator[None]:
    """Hold a run's work folder, made where there is none; after an InputError it stays only if it can be resumed.

    Raises:
        InputError: another run holds it, or it is no run's.
    """
    with suppress(FileExistsError):
        folder.mkdir()
    with locked(folder, wait=False) as free:
        if free is False:
            raise InputError(f"another run is at work in {folder}: wait for it, or choose another --output")
        if any(folder.iterdir()) and not (_is_resumable(folder) or (folder / CONFIG_FILE).is_file()):
            raise InputError(f"{folder}, where the run would work, holds something else: pass another --output")
        try:
            yield
        except InputError:
            if not _is_resumable(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _is_resumable(folder: Path) -> bool:
    """Whether there is more in a work folder than the settings of a run."""
    return any(any(folder.glob(pattern)) for pattern in (CHECKPOINT_FILE, INFO_FILE, f"{STAGES}/*"))


def identity(files: ModelFiles, config: DistillConfig, images: ImageData | None) -> dict[str, Any]:
    """What a resumed run must share with its beginning: the settings, and the content of the files behind them.

    Of images that is as far as they are listed: names and sizes, and the captions in files of text.
    """
    parts = {"denoiser": files.denoiser_sha256(), **files.other_sha256()}
    if config.prompts:
        parts["prompts"] = sha256_of(config.prompts)
    if images is not None and images.files:
        parts["images"] = hashlib.sha256(json.dumps(images.content()).encode()).hexdigest()
    if config.start_from:
        parts["start_from"] = read_student(config.start_from).adapter_sha256
    return config_as_json(config) | {f"{name}_sha256": value for name, value in parts.items()}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two identities, in words; "" if nothing does."""

    def comparable(values: dict[str, Any]) -> dict[str, Any]:
        # Runs from before there were such settings.
        earlier = {"guider": "cfg", "reuse": 1, "norms": False}
        values = values | {name: values.get(name) or value for name, value in earlier.items()}
        # Of files the content counts; a dataset on the hub has its name alone.
        ignored = ["prompts", "start_from", *(["images"] if values.get("images_sha256") else [])]
        if not values.get("few_steps"):
            # Of use at the end alone; of few steps in the middle.
            ignored.append("adapter_scale")
        return values | dict.fromkeys(ignored)

    old, new = comparable(before), comparable(now)
    changed = sorted(key for key in new.keys() | old.keys() if old.get(key) != new.get(key))
    return ", ".join(
        f"the content of {key.removesuffix('_sha256')} is another"
        if key.endswith("_sha256")
        else f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in changed
    )


def begin(folder: Path, identity: dict[str, Any], observers: Observers) -> None:
    """Empty a work folder, which is held, and write the run's settings; a run that can be resumed is set aside."""
    if _is_resumable(folder):
        names = chain([".abandoned"], (f".abandoned-{number}" for number in count(2)))
        aside = next(path for path in map(folder.with_suffix, names) if not path.exists())
        aside.mkdir()
        # The settings first: what a kill leaves is then not taken for a run to resume.
        for path in sorted(folder.iterdir(), key=lambda path: path.name != CONFIG_FILE):
            path.replace(aside / path.name)
        observers.on_note(f"an unfinished run, which --resume would have continued, is now in {aside}")
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_json(folder / CONFIG_FILE, identity)


def resumable_state(folder: Path, identity: dict[str, Any]) -> TrainingState | None:
    """What the checkpoint holds; None if none was written yet. Every process reads it.

    Raises:
        InputError: there is nothing to resume, it was begun under other settings, or the checkpoint is damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"there is nothing to resume in {folder}: run without --resume")
    if changes := _changes(read_json(folder / CONFIG_FILE), identity):
        raise InputError(f"can't resume under other settings ({changes}): repeat them, or run without --resume")
    path = folder / CHECKPOINT_FILE
    return load_training_state(path) if path.is_file() else None


def finished_run(output: Path, identity: dict[str, Any]) -> StudentInfo | None:
    """The student that the run to resume has written already, if it has ended."""
    if (work_folder(output) / CONFIG_FILE).is_file() or not (output / INFO_FILE).is_file():
        return None
    info = read_student(output)
    before = {key: info.settings.get(key) for key in identity}
    if changes := _changes(before, identity):
        raise InputError(f"the run in {output} has ended, under other settings ({changes}): run without --resume")
    return info


def refuse_loss_of_inputs(output: Path, config: DistillConfig, execution: RunConfig) -> None:
    """Refuse to replace the student that a run is to start from, or the texts that it caches.

    Raises:
        InputError: they are in the output, or in the folder of an unfinished run.
    """
    for option, path in (("--start-from", config.start_from), ("--cache-text", execution.cache_text)):
        for lost in (output.resolve(), work_folder(output)):
            # The one is replaced at the end, the other set aside now.
            if path and path.resolve().is_relative_to(lost):
                raise InputError(f"{option} {path} would be lost with {lost}: pass another --output")


def refuse_loss_of_files(output: Path, *, finished: Path | None = None) -> None:
    """Refuse to replace a student together with what a user has put into its folder.

    `finished` is the folder of the student that waits to take its place.

    Raises:
        InputError: there are such files.
    """
    for path in sorted(output.rglob("*")):
        inside = path.relative_to(output).parts
        # Of each stage there is a student's folder.
        inside = inside[2:] if inside[0] == STAGES else inside
        picture = len(inside) == 2 and inside[0] == PREVIEWS and re.fullmatch(r"\d+\.png", inside[1])
        own = picture or inside[:1] == (TRACKER,) or (len(inside) == 1 and inside[0] in OWN_FILES)
        if not (own or path.is_dir() or path.name.startswith(".")):
            raise InputError(
                f"{path} was not written by `boostdiff distill`, which would remove it: "
                + (
                    f"the new student stays in {finished}: move that file, and run again with --resume"
                    if finished
                    else "move it, or choose another --output"
                )
            )


def write_student(run: Run, *, identity: dict[str, Any], result: dict[str, Any]) -> StudentInfo:
    """The adapter's files, and then `student.json` that names them."""
    config, adapter, folder = run.config, run.adapter, run.folder
    adapter_files = _save(adapter, folder, run.model, kohya=run.execution.format == "kohya")
    low, high = config.guidance_bounds
    sampling: dict[str, Any] = {}
    if run.frozen:
        stage = run.frozen.stage
        sampling = {"sampler": STAGE_SAMPLER, "steps": stage.steps, "timestep_spacing": STAGE_SPACING}
        result = stage.with_budgets(result)
    info = StudentInfo(
        method=config.method,
        guidance=(low + high) / 2,
        guidance_range=(low, high) if config.guidance_conditioned else None,
        negative_prompt=config.fixed_negative_prompt,
        live_negative_prompt=config.live_negative_prompt,
        guider=run.guider.name,
        guider_settings=run.guider.settings,
        **sampling,
        model=run.model.files.name,
        denoiser_sha256=identity["denoiser_sha256"],
        adapter_files=adapter_files,
        trainable_parameters=adapter.count(),
        settings=identity
        | config_as_json(run.execution, "resume")
        | {"prediction_type": run.model.files.scheduler_config.get("prediction_type")},
        versions=versions(),
        result=result,
    )
    info.write(folder)
    return info


def publish_student(folder: Path, output: Path) -> None:
    """Give a student that is whole in its work folder the run's name.

    Raises:
        InputError: see `refuse_loss_of_files`; it stays where it is.
    """
    # Again: a run takes hours.
    refuse_loss_of_files(output, finished=folder)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    publish(folder, output)


def _save(adapter: Adapter, folder: Path, model: Model, *, kohya: bool) -> dict[str, str]:
    """Write the adapter's files, and return the hashes of those that students are read from."""
    paths = adapter.save(folder, model.pipeline)
    if kohya:
        # `plan` lets nothing else through.
        assert isinstance(adapter, Lora)
        adapter.save_kohya(folder)
    return {path.name: sha256_of(path) for path in paths}


def adapter_scale_of(info: StudentInfo) -> float:
    """What a student's adapter was multiplied by at the end."""
    return info.settings.get("adapter_scale") or 1.0


def rescale(
    info: StudentInfo, model: Model, adapter: Adapter, scale: float, output: Path, *, kohya: bool
) -> StudentInfo:
    """Give a finished student's adapter another scale; its `grid.png`, which shows the one before, goes away.

    With the scale that it has, nothing but `kohya` changes.

    Args:
        info: the student.
        model: what it was trained on.
        adapter: a new one on its denoiser.
        scale: of the adapter as it was trained.
        output: the student's folder.
        kohya: whether to write that file, too; a student that has it keeps it.

    Raises:
        InputError: the adapter does not fit.
    """
    load_adapter_for_training(adapter, output)
    scaled = scale != adapter_scale_of(info)
    if scaled:
        adapter.scale(scale / adapter_scale_of(info), info.guidance_range and info.guidance_range[1])
    # Not in the work folder: what is there can be resumed.
    with TemporaryDirectory(prefix=f".{output.name}.scaled-", dir=output.resolve().parent) as parent:
        folder = Path(parent) / "student"
        shutil.copytree(output, folder, symlinks=True, ignore=shutil.ignore_patterns(PREVIEW_FILE) if scaled else None)
        settings = info.settings | ({"adapter_scale": scale} if scaled else {})
        adapter_files = _save(adapter, folder, model, kohya=kohya or (folder / KOHYA_FILE).exists())
        info = replace(info, adapter_files=adapter_files, settings=settings)
        info.write(folder)
        if (folder / CONFIG_FILE).is_file():
            write_json(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE) | {"adapter_scale": scale})
        publish(folder, output)
    return info
