"""The embedded model and its students on the held-out prompts: features of their images, kept as they come.

Shared by the scripts that compare many students; a run of theirs that was interrupted goes on.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...engine import embedded
from ...engine.errors import InputError
from ...engine.files import read_json, write_json
from ...engine.guidance import Denoiser, teacher_denoiser
from ...engine.merge import merge
from ...engine.model import Model, load, locate, resolve_device
from ...engine.prompts import read_prompts
from ...engine.runners import Runner, TorchRunner
from ...engine.sampling import generate, to_uint8
from ...engine.schedulers import make_scheduler
from ...engine.student import read_student
from ..fastest import FastestRunners, remembered
from ..quality.features import EfficientNetLite0Features, Reference, features_of, frechet_distance

DISTANCES_FILE = "distances.json"


def trained(folder: Path, options: Sequence[str]) -> Path:
    """A student's folder; unless it is there, `boostdiff distill` is run with these options.

    The options are kept beside the folder; a student without them was put there by hand, and is taken as it is.

    Raises:
        InputError: the student that is there was trained with other options.
    """
    record = folder.with_name(f"{folder.name}.options.json")
    if not folder.exists():
        # Before the student: a run that is killed in between trains again.
        write_json(record, {"options": list(options)})
        command = [sys.executable, "-m", "boostdiff", "distill", "--output", str(folder), *options]
        subprocess.run(command, check=True)  # noqa: S603
    elif record.exists() and (known := read_json(record)["options"]) != list(options):
        raise InputError(f"{folder} was trained with {shlex.join(known)}: pass these again, or another --work")
    return folder


def refuse_training_options(options: Sequence[str]) -> None:
    """For a command whose students are all given.

    Raises:
        InputError: there are options of `boostdiff distill`, which nothing would use.
    """
    if options:
        raise InputError(f"{shlex.join(options)}: no such option here, and no student is left to train with it")


def teacher_model() -> Model:
    """The embedded model, on the accelerator where there is one."""
    return load(locate(embedded.MODEL_NAME), device=resolve_device("auto"))


def student_model(folder: Path) -> Model:
    """The embedded model with a student of it merged into the UNet.

    Raises:
        InputError: the student does not fit.
    """
    model = teacher_model()
    model.pipeline.unet = merge(model, folder, read_student(folder, model.files))
    return model


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The same held-out prompts, seeds and noise for every way of drawing.

    Attributes:
        work: folder for features and distances.
        sampler: a name in `engine.samplers.SAMPLERS`.
        steps: sampling steps.
    """

    work: Path
    sampler: str = "ddim"
    steps: int = 20

    @cached_property
    def network(self) -> EfficientNetLite0Features:
        """What gives the features."""
        return EfficientNetLite0Features().to(resolve_device("auto"))

    @cached_property
    def reference(self) -> Reference:
        """Real images."""
        return Reference.load(embedded.REFERENCE)

    def key(self, name: str, samples: int) -> str:
        """What a row's figures are kept under."""
        return f"{name}, {self.sampler} {self.steps}, N {samples}"

    def features(
        self,
        rows: Mapping[str, Callable[[Runner], Denoiser]],
        samples: int,
        *,
        open_model: Callable[[], Model],
        exported: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Features `(samples, D)` of each row's images, float32; drawn where they are not kept yet.

        Args:
            rows: by a name that says which weights are drawn with, the denoiser on the runner that all rows share.
            samples: images of each row; image i is the same for any number of them.
            open_model: gives the model; called if an image is missing.
            exported: whether a CPU may run the UNet as a graph: not where rows change its weights.
        """
        paths = {name: self._path(self.key(name, samples)) for name in rows}
        missing = [name for name, path in paths.items() if not path.exists()]
        if missing:
            model = open_model()
            prompts = read_prompts(embedded.HELD_OUT_PROMPTS)[:samples]
            text = model.family.encode(model.pipeline, prompts)

            def draw(runner: Runner) -> None:
                for name in missing:
                    images = generate(
                        model,
                        rows[name](runner),
                        text=text,
                        make_scheduler=partial(make_scheduler, self.sampler, model.pipeline.scheduler.config),
                        steps=self.steps,
                        seed=0,
                    )
                    self._keep(paths[name], features_of(self.network, to_uint8(images)))
                    print(f"drawn: {self.key(name, samples)}", file=sys.stderr, flush=True)

            if exported:
                with FastestRunners(model, passes=len(missing) * samples * self.steps) as runners:
                    draw(runners(model.unet))
            else:
                draw(TorchRunner(model.unet))
        return {name: load_file(path)["features"] for name, path in paths.items()}

    def distance(self, name: str, features: torch.Tensor) -> float:
        """Fréchet distance to real images of a row's features, remembered by its name and their number."""
        return remembered(
            self.work / DISTANCES_FILE,
            self.key(name, len(features)),
            lambda: frechet_distance(self.reference, features),
        )

    def teachers(self, scales: Sequence[float], samples: int) -> dict[float, tuple[str, torch.Tensor]]:
        """The teacher's rows: by guidance scale, the name and the features."""
        weights = locate(embedded.MODEL_NAME).unet_sha256()[:12]
        names = {scale: f"teacher w={scale:g} {weights}" for scale in scales}
        found = self.features(
            {name: partial(teacher_denoiser, guidance_scale=scale) for scale, name in names.items()},
            samples,
            open_model=teacher_model,
        )
        return {scale: (name, found[name]) for scale, name in names.items()}

    def _path(self, key: str) -> Path:
        return self.work / "features" / f"{re.sub(r'[^a-z0-9.+=]+', '-', key.lower())}.safetensors"

    def _keep(self, path: Path, features: torch.Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        save_file({"features": features.contiguous()}, partial_path)
        partial_path.replace(path)
