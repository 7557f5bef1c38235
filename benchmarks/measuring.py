"""What long measurements share: results that are kept as they come, and the fastest way to run UNets here."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from diffusers import UNet2DConditionModel

from ..engine.files import read_json, write_json
from ..engine.model import Model
from ..engine.runners import GraphRunner, Runner, TorchRunner
from ..engine.sessions import OnnxSession
from ..export.config import LARGE_PARAMETERS, ExportConfig
from ..export.graph import onnx_from_part
from ..export.merge import TIMESTEPS
from ..export.parts import unet_part

T = TypeVar("T")


def remembered(path: Path, key: str, measure: Callable[[], T]) -> T:
    """A result by its key: read from a JSON file if it is there, else measured and added to the file.

    Args:
        path: the file; it is made, with its folder, when first needed.
        key: names all that the result depends on.
        measure: gives a plain JSON value.

    Raises:
        InputError: the file is there, but is no JSON object.
    """
    known = read_json(path) if path.exists() else {}
    if key not in known:
        known[key] = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return known[key]


class FastestRunners(ExitStack):
    """Runs a model's UNets, its own or merged ones, the fastest way on this machine; each is opened once, on demand.

    On a CPU that is ONNX Runtime, from graphs in a temporary folder, where it is installed and the UNet is not so large
    that its export would take longer than most measurements; else it is torch. On one core ONNX Runtime took 8.7 ms an
    image and pass on `emoji64`, torch 14.5; the export takes half a minute.
    """

    def __init__(self, model: Model) -> None:
        """For the UNets of one model."""
        super().__init__()
        self.model = model
        self.opened: dict[int, tuple[UNet2DConditionModel, Runner]] = {}

    @property
    def name(self) -> str:
        """What runs the UNets: "onnxruntime" or "torch"."""
        small = self.model.unet.num_parameters() < LARGE_PARAMETERS
        found = importlib.util.find_spec("onnxruntime") is not None
        return "onnxruntime" if self.model.device.type == "cpu" and found and small else "torch"

    def __call__(self, unet: UNet2DConditionModel) -> Runner:
        """The UNet's runner; its weights must not change from now on."""
        if id(unet) not in self.opened:
            # The UNet is kept too, as its id may be another's once it is gone.
            self.opened[id(unet)] = unet, self.enter_context(self._open(unet))
        return self.opened[id(unet)][1]

    def _open(self, unet: UNet2DConditionModel) -> Runner:
        if self.name == "torch":
            return TorchRunner(unet)
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "model.onnx"
        text = self.model.family.encode(self.model.pipeline, [""], negative_prompt=None).conditional
        onnx_from_part(unet_part(self.model, unet, text, ExportConfig(), TIMESTEPS), path)
        return GraphRunner(OnnxSession(path, device=self.model.device), unet_config=dict(unet.config))
