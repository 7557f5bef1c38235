"""The embedded model and its students on the held-out prompts: what the studies that compare students share.

What is sampled is kept in a study's folder: one that was interrupted goes on.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...engine import embedded
from ...engine.errors import InputError
from ...engine.families import TextEmbeddings
from ...engine.files import read_json, write_json
from ...engine.model import Model, load, locate, resolve_device
from ...engine.prompts import read_prompts
from ...engine.student import read_student
from ..fastest import SAMPLING_BATCH, FastestRunners
from ..quality.features import EfficientNetLite0Features
from ..quality.reference import Reference
from ..quality.samples import SampleCache, SamplingVariant
from ..session import Session, Student, identity_of, merged_students


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


def held_out_text(model: Model, prompts: int) -> TextEmbeddings:
    """Embeddings of the first held-out prompts."""
    return model.family.encode(model.pipeline, read_prompts(embedded.HELD_OUT_PROMPTS)[:prompts])


def merged_student(model: Model, folder: Path) -> Student:
    """A student of the model, merged into a UNet of its own.

    Raises:
        InputError: it does not fit.
    """
    return merged_students(model, [folder], [read_student(folder, model.files)])[0]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Makes rows of the model's images, and gives their features.

    Attributes:
        session: makes variants, and runs their UNets.
        sample_cache: samples them.
    """

    session: Session
    sample_cache: SampleCache

    def features(self, variant: SamplingVariant) -> torch.Tensor:
        """Features `(N, D)` of a row's images, float32; drawn where they are not kept yet."""
        return self.sample_cache.sampled(variant).features


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The same held-out prompts, seeds and noise for every way of drawing.

    Attributes:
        work: folder for what is sampled.
        sampler: a name in `engine.schedulers.SAMPLERS`.
        steps: sampling steps.
    """

    work: Path
    sampler: str = "ddim"
    steps: int = 20

    @cached_property
    def model(self) -> Model:
        """The embedded model."""
        return teacher_model()

    @cached_property
    def reference(self) -> Reference:
        """Real images."""
        return Reference.load(embedded.REFERENCE)

    @cached_property
    def network(self) -> EfficientNetLite0Features:
        """What gives the features."""
        return EfficientNetLite0Features().to(self.model.device)

    @contextmanager
    def sampling(self, samples: int) -> Iterator[Sampling]:
        """For rows of so many images, run the fastest way; image i is the same for any number of them."""
        with FastestRunners(self.model, passes=samples * self.steps) as runners:
            yield Sampling(
                session=Session(model=self.model, sampler=self.sampler, steps=self.steps, runner=runners),
                sample_cache=SampleCache(
                    model=self.model,
                    network=self.network,
                    prompts=read_prompts(embedded.HELD_OUT_PROMPTS)[:samples],
                    seed=0,
                    batch_size=SAMPLING_BATCH,
                    folder=self.work / "features",
                    identity=identity_of(self.model) | {"runner": runners.name},
                ),
            )
