"""What every benchmark of students begins with: the model, the students merged, the processes, what all rows share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..engine.errors import InputError
from ..engine.model import Model, ModelFiles, load, resolve_device
from ..engine.student import StudentInfo
from ..engine.versions import source_commit, versions
from .config import BenchConfig
from .fastest import SAMPLING_BATCH
from .lineup import Student, identity_of, merged_students
from .quality.metrics import Metrics
from .quality.samples import Campaign, launched_processes
from .speed.device import hardware


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A model and the students that are compared with it.

    Attributes:
        model: the teacher's.
        students: merged into UNets of their own.
        guidance: the scale that all of them stand for.
        config: what is measured.
        prompts: the first N are drawn for quality.
        device: of this process.
        processes: this one and its fellows, where several were launched.
    """

    model: Model
    students: list[Student]
    guidance: float
    config: BenchConfig
    prompts: list[str]
    device: torch.device
    processes: PartialState | None

    @classmethod
    def open(
        cls,
        files: ModelFiles,
        config: BenchConfig,
        *,
        students: Sequence[Path],
        infos: Sequence[StudentInfo],
        guidance: float,
        prompts: list[str],
        device: str,
    ) -> Contest:
        """Load the model and merge the students; cheap checks come first.

        Args:
            files: the model.
            config: what to measure.
            students: folders that `distill` wrote.
            infos: their descriptions, and
            guidance: the scale that all stand for, as `read_students` gives them.
            prompts: at least `config.samples`.
            device: "auto", "cpu", "cuda", …

        Raises:
            InputError: a student, the prompts or the device can't be used.
        """
        if len(prompts) < config.samples:
            raise InputError(f"--samples {config.samples} needs as many prompts: there are {len(prompts)}")
        target = resolve_device(device)
        processes = launched_processes(target)
        # Under a launcher each process has an accelerator of its own.
        target = processes.device if processes else target
        model = load(files, device=target)
        return cls(
            model=model,
            students=merged_students(model, students, infos),
            guidance=guidance,
            config=config,
            prompts=prompts,
            device=target,
            processes=processes,
        )

    def campaign(
        self, metrics: Metrics, *, cache: Path | None, on_images: Callable[[str, int], None], runner: str
    ) -> Campaign:
        """What all rows of quality share.

        Args:
            metrics: what images are judged by.
            cache: folder of the shards, or None.
            on_images: told of progress.
            runner: what runs the UNets; images of two differ in the last bits.

        Raises:
            InputError: see `Metrics`.
        """
        return Campaign(
            model=self.model,
            network=metrics.network(self.device),
            clip=metrics.scorer(self.device),
            prompts=self.prompts[: self.config.samples],
            seed=self.config.seed,
            batch_size=SAMPLING_BATCH,
            negative_prompt=self.students[0].info.negative_prompt,
            cache=cache,
            identity=identity_of(self.model) | {"runner": runner} if cache else {},
            on_images=on_images,
        )

    def provenance(self) -> dict[str, Any]:
        """Of a report: everything but the hashes."""
        students = {str(s.folder): {"method": s.info.method, "settings": s.info.settings} for s in self.students}
        return provenance_of(self.model.files, self.config, self.guidance, self.device) | {"students": students}


def provenance_of(files: ModelFiles, config: BenchConfig, guidance: float, device: torch.device) -> dict[str, Any]:
    """Model, settings, hardware, versions and commit, for a report."""
    return {
        "model": files.name,
        "guidance": guidance,
        "sampler": config.sampler,
        "steps": config.steps,
        "seed": config.seed,
        "config": asdict(config) | {"batch_sizes": list(config.batch_sizes_on(device))},
        "hardware": hardware(device),
        "commit": source_commit(),
        "versions": versions("torchmetrics", "torch_fidelity", "tensorrt", "tensorrt_rtx"),
    }
