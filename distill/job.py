"""What a run is made of before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from ..engine.adapters import Adapter
from ..engine.compiled import use_plain_attention
from ..engine.errors import InputError
from ..engine.model import Model, ModelFiles, load
from .config import DistillConfig, RunConfig
from .counts import adapter_of, base_dtype
from .images import ImageData
from .loop import Observers

TIMEOUT = timedelta(hours=6)
"""Of processes that wait for the main one, which encodes texts and draws pictures alone; NCCL's own is ten minutes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, or a stage of one.

    Attributes:
        config: resolved; of a stage its own.
        device: of a run in one process.
        prompts: none where there are images.
        identity: see `run_folder.identity`.
    """

    files: ModelFiles
    config: DistillConfig
    execution: RunConfig
    device: torch.device
    prompts: list[str]
    images: ImageData | None
    identity: dict[str, Any]
    observers: Observers

    def accelerator(self, folder: Path) -> Accelerator:
        """A new one, whose trackers write into a folder; of several processes each waits here for the others.

        Raises:
            InputError: a batch has fewer new samples than there are processes.
        """
        config = self.config
        # accelerate keeps one state per process; a second run in it may use another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            cpu=self.device.type == "cpu",
            log_with=self.execution.log_with,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        if config.new_samples < accelerator.num_processes:
            raise InputError(
                f"--batch-size {config.batch_size} with --reuse {config.reuse} is too small for "
                f"{accelerator.num_processes} processes"
            )
        return accelerator

    def load(self, device: torch.device) -> tuple[Model, Adapter]:
        """The model in the run's precision, and a new adapter on its denoiser."""
        config, execution = self.config, self.execution
        model = load(
            self.files,
            device=device,
            dtype=base_dtype(config, device),
            text_encoders=execution.cache_text is None,
            int8=config.base_precision == "int8",
        )
        if device.type == "cuda":
            # Half-precision convolutions run on tensor cores in this order alone.
            model.denoiser.to(memory_format=torch.channels_last)
        if device.type == "cpu" and config.precision != "fp32":
            use_plain_attention(model.denoiser)
        torch.manual_seed(config.seed)
        adapter = adapter_of(model.denoiser, config)
        if execution.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        return model, adapter
