"""Images of many prompts as shards, each whole or not there: tar files in the WebDataset layout.

Of image i a shard holds `<i>.png`, `<i>.txt` with its prompt and `<i>.json` with what it was drawn by; see
https://github.com/webdataset/webdataset. A shard is drawn as one piece: its bytes do not depend on the run, the worker
or the order in which it was drawn.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import GenerateConfig
from .errors import InputError
from .files import check_output, give_modes, hash_of, locked, prepare_output, read_json, write_json
from .generate import Sampling, drawn_by, images_of, opened, png_of, texts_of
from .manifest import read_manifest
from .model import ModelFiles
from .options import ENGINE_FOLDER, STUDENT_FOLDER
from .prompts import is_truncated
from .student import read_student

CONTENT = ("prompts", "model", "student", "engine")
"""Options that stand for contents, by which jobs are compared."""

JOB_FILE = "job.json"
"""In the folder of the shards: what they are drawn by."""

PARTIAL_JOB = f".{JOB_FILE}.*partial"
"""While it is written, see `files.write_whole`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Shards to draw, of one setting.

    Attributes:
        files: the model; an engine needs none.
        config: what to draw, and with what; resolved.
        output: the folder, under the same path on every machine that draws.
        device: "auto", "cpu", "cuda", …
        shard_size: images per shard.
    """

    files: ModelFiles | None
    config: GenerateConfig
    output: Path
    device: str
    shard_size: int

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.output / f"shard-{shard:06}.tar"

    def __len__(self) -> int:
        """Number of shards."""
        return -(-len(self.config.prompts) // self.shard_size)

    def missing(self) -> list[int]:
        """Shards that are not there yet, or were cut short since."""
        return [shard for shard in range(len(self)) if not _is_whole(self.path(shard))]

    def steps_in(self, shard: int) -> int:
        """Denoising steps over all images of a shard: the last one may have fewer."""
        images = min(self.shard_size, len(self.config.prompts) - shard * self.shard_size)
        return images * self.config.total_steps // len(self.config.prompts)

    def absolute(self) -> Job:
        """The same with absolute paths, for processes that work in other folders."""
        config, files = self.config, self.files
        if config.on_engine:
            student = config.student and config.student.resolve()
            config = replace(config, engine=(config.engine or ENGINE_FOLDER).resolve(), student=student)
        elif not config.teacher:
            config = replace(config, student=(config.student or STUDENT_FOLDER).resolve())
        if files is not None:
            files = replace(files, folder=files.folder.resolve())
        return replace(self, config=config, files=files, output=self.output.resolve())

    def identity(self) -> dict[str, Any]:
        """What every byte of the shards depends on, as far as it does not depend on the machine."""
        options = {key: value for key, value in vars(self.config).items() if key not in CONTENT}
        if self.config.on_engine:
            weights = hash_of(read_manifest(self.config.engine or ENGINE_FOLDER).files)
        else:
            assert self.files is not None
            student = None if self.config.teacher else read_student(self.config.student or STUDENT_FOLDER, self.files)
            adapter = student and student.adapter_sha256
            weights = hash_of([self.files.denoiser_sha256(), adapter, self.files.other_sha256()])
        return {
            "images": len(self.config.prompts),
            "images_per_shard": self.shard_size,
            "prompts": hash_of(self.config.prompts),
            "weights": weights,
            **options,
        }


@contextmanager
def prepared(job: Job) -> Iterator[list[int]]:
    """Hold the folder of the shards, and give the numbers of those that are not there.

    Raises:
        InputError: it holds something else or another job's shards, another process is at it, or it can't be written.
    """
    output, identity = job.output, job.identity()
    check_output(output)
    # A process that was killed early leaves the beginning of the job's file alone.
    others = [path for path in output.glob("*") if not path.match(PARTIAL_JOB)]
    if others and not (output / JOB_FILE).is_file():
        raise InputError(f"the output {output} holds something else: choose another --output for the shards")
    prepare_output(output)
    # Of a link, the folder that it leads to.
    output.resolve().mkdir(exist_ok=True)
    with locked(output, wait=False) as held:
        if held is False:
            raise InputError(f"another process is drawing shards into {output}")
        if (output / JOB_FILE).is_file():
            found = read_json(output / JOB_FILE)
            if other := [key for key in identity if identity[key] != found.get(key)]:
                named = ", ".join(other).replace("_", " ")
                raise InputError(f"the shards in {output} are of another job ({named}): choose another --output")
        else:
            write_json(output / JOB_FILE, identity)
        # Without locks another process may be writing them.
        if held:
            _clear_abandoned(output)
        yield job.missing()
        if held:
            _clear_abandoned(output)


def _clear_abandoned(output: Path) -> None:
    """Remove what killed processes were writing; the caller holds the folder's lock."""
    for abandoned in (*output.glob(".shard-*.partial"), *output.glob(PARTIAL_JOB)):
        abandoned.unlink()


def draw_shard(sampling: Sampling, job: Job, shard: int, on_step: Callable[[int], None] | None = None) -> int:
    """Draw one shard; `on_step` is a callback for the number of images that took a step.

    Returns:
        How many of its prompts have more tokens than the text encoder takes.

    Raises:
        BoostDiffError: latents or images hold NaN or Inf.
        OSError: it can't be written.
    """
    start = shard * job.shard_size
    prompts, path = job.config.prompts[start : start + job.shard_size], job.path(shard)
    handle, partial = tempfile.mkstemp(dir=job.output, prefix=f".{path.stem}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            images = images_of(sampling, job.config, prompts, start=start, on_step=on_step)
            for index, image in enumerate(images, start=start):
                prompt, seed = job.config.prompts[index], job.config.seed + index
                model = sampling.model.files.name
                about = {
                    "prompt": prompt,
                    "seed": seed,
                    "model": Path(model).name,
                    "role": "teacher" if job.config.teacher else "student",
                    **drawn_by(job.config, sampling.adapter),
                }
                texts = texts_of(job.config, prompt, seed=seed, model=model, adapter=sampling.adapter)
                _add(tar, f"{index:09}.png", png_of(image, texts))
                _add(tar, f"{index:09}.txt", prompt.encode())
                _add(tar, f"{index:09}.json", json.dumps(about).encode())
            # A name must not be on the disk before its content.
            file.flush()
            os.fsync(file.fileno())
        give_modes(Path(partial))
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return sum(is_truncated(sampling.model.pipeline, prompt) for prompt in prompts)


END = 2 * tarfile.BLOCKSIZE
"""Bytes of zeros that a tar ends with."""


def _is_whole(path: Path) -> bool:
    """Whether a tar is there to its end, two blocks of zeros."""
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < END:
                return False
            file.seek(-END, os.SEEK_END)
            return not any(file.read())
    except FileNotFoundError:
        return False


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without owner and time, which would make the bytes of two runs differ."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))


def draw_shards(job: Job, shards: Sequence[int], on_step: Callable[[int], None] | None = None) -> int:
    """Draw several shards here, one after the other. As `draw_shard`."""
    with opened(job.files, job.config, job.device) as sampling:
        return sum(draw_shard(sampling, job, shard, on_step) for shard in shards)
