import re
import sys
from pathlib import Path

import pytest
import torch
from boostdiff.export.parts import Part
from safetensors.torch import load_file, save_file


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system is left to it")
def test_weights_mapped_from_a_file_are_given_back(tmp_path: Path) -> None:
    def mapped_megabytes() -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) / 1e3

    save_file({"weight": torch.ones(4096, 4096)}, tmp_path / "large.safetensors")
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(load_file(tmp_path / "large.safetensors")["weight"])
    assert layer.weight.sum() == 4096**2
    before = mapped_megabytes()
    part = Part(name="layer", module=layer, inputs={}, outputs=(), axes={}, cases=[])
    # As the exporter's caches do.
    held = layer.weight
    part.release()
    assert mapped_megabytes() < before - 50
    assert held.shape == (4096, 4096)
