"""What long measurements share: results that are kept as they come, and the fastest way to run a UNet here."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..engine.files import read_json, write_json
from ..engine.model import Model
from ..engine.runners import GraphRunner, Runner, TorchRunner
from ..engine.sessions import OnnxSession
from ..export.config import ExportConfig
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


@contextmanager
def fastest_runner(model: Model) -> Iterator[Runner]:
    """The model's UNet on ONNX Runtime on a CPU, from a graph in a temporary folder; on torch anywhere else.

    On one core ONNX Runtime took 8.7 ms an image and pass on `emoji64`, torch 14.5; the export takes half a minute.
    """
    if model.device.type != "cpu" or importlib.util.find_spec("onnxruntime") is None:
        yield TorchRunner(model.unet)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        text = model.family.encode(model.pipeline, [""], negative_prompt=None).conditional
        onnx_from_part(unet_part(model, model.unet, text, ExportConfig(), TIMESTEPS), path)
        session = OnnxSession(path, device=model.device)
        with GraphRunner(session, unet_config=dict(model.unet.config)) as runner:
            yield runner
