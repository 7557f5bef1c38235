"""The fastest runner on this machine, for measurements that sample many images."""

from __future__ import annotations

import copy
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ...engine.captured import CapturedRunner
from ...engine.compiled import CompiledRunner, has_bfloat16, missing_compiler
from ...engine.conditions import is_live
from ...engine.merge import CHECK_TIMESTEPS
from ...engine.model import LARGE_PARAMETERS, Model
from ...engine.runners import GraphRunner, Runner, TorchRunner
from ...engine.sessions import OnnxSession
from ...engine.versions import is_installed
from ...export.config import ExportConfig
from ...export.graph import onnx_from_part
from ...export.parts import denoiser_part

SAMPLING_BATCH = 8
"""Default number of images denoised together; with guidance the UNet sees twice as many."""

DRAWN_BY = {"compiled": "torch.compile in bfloat16", "onnx": "ONNX Runtime"}
"""In words, runners of `FastestRunners` whose images differ from eager torch's."""

MANY_PASSES = 10_000
"""Single-image passes from which compiling or exporting a small denoiser, half a minute, pays."""


def pays_to_compile(denoiser: Any) -> bool:
    """Whether compiling takes seconds and makes a UNet faster: a small one on a CPU with bfloat16 instructions."""
    return (
        denoiser.device.type == "cpu" and denoiser.num_parameters() < LARGE_PARAMETERS and has_bfloat16(denoiser.device)
    )


class FastestRunners(ExitStack):
    """The fastest runner for each of a model's denoisers, original or merged; opened once, on demand.

    On a GPU, for large UNets and for few images that is torch. For many images of small UNets on a CPU it is torch
    compiled, if the processor has bfloat16, else ONNX Runtime, from graphs in a temporary folder. On `emoji64` a pass
    of batch 8 on two cores took torch 53 ms, ONNX Runtime 31 and compiled torch 18.
    """

    def __init__(
        self,
        model: Model,
        *,
        passes: int,
        name: str | None = None,
        compiles: bool = True,
        freezing: bool = False,
        max_autotune: bool = False,
        batch_size: int = SAMPLING_BATCH,
    ) -> None:
        """For the UNets of one model, `passes` single-image UNet passes and batches of `batch_size` images.

        `name`, of `generate.IN_TORCH`, chooses. With `compiles` false torch does not compile; `freezing` and
        `max_autotune` are `CompiledRunner`'s.
        """
        super().__init__()
        self.compiled = partial(CompiledRunner, freezing=freezing, max_autotune=max_autotune)
        self.model = model
        self.batch_size = batch_size
        self.opened: dict[int, tuple[Any, Runner]] = {}
        device = model.device
        self.name = name or "torch"
        if (
            name is None
            and device.type == "cpu"
            and model.denoiser.num_parameters() < LARGE_PARAMETERS
            and passes >= MANY_PASSES
        ):
            if compiles and pays_to_compile(model.denoiser) and missing_compiler(device) is None:
                self.name = "compiled"
            elif is_installed("onnxruntime"):
                self.name = "onnx"

    def __call__(self, denoiser: Any) -> Runner:
        """The UNet's runner; its weights must not change after this."""
        if id(denoiser) not in self.opened:
            # The UNet is kept too, as its id may be reused once it is gone.
            self.opened[id(denoiser)] = denoiser, self.enter_context(self._open(denoiser))
        return self.opened[id(denoiser)][1]

    def _open(self, denoiser: Any) -> Runner:
        if self.name == "torch":
            return TorchRunner(denoiser)
        if self.model.device.type == "cuda":
            # Both put the weights into another memory order, and stock diffusers is timed with these.
            denoiser = copy.deepcopy(denoiser)
        if self.name == "compiled":
            return self.compiled(denoiser, batches=(self.batch_size, 2 * self.batch_size))
        if self.name == "captured":
            return CapturedRunner(denoiser)
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "model.onnx"
        encoded = self.model.family.encode(self.model.pipeline, [""])
        text = encoded.joined() if is_live(denoiser.config) else encoded.conditional
        onnx_from_part(denoiser_part(self.model, denoiser, text, ExportConfig(), CHECK_TIMESTEPS), path)
        session = OnnxSession(path, device=self.model.device)
        return GraphRunner(session, family=self.model.family, denoiser_config=dict(denoiser.config))
