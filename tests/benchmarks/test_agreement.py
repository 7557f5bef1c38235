from pathlib import Path

import torch
from boostdiff.benchmarks.agreement import drawn, drawn_by_stock_diffusers, others
from boostdiff.engine.draw import DrawConfig
from boostdiff.engine.model import ModelFiles
from tiny import PROMPTS


def test_runners_and_stock_diffusers_draw_the_same(
    tiny_files: ModelFiles, students: dict[str, Path], engines: dict[str, Path]
) -> None:
    base = DrawConfig(prompts=list(PROMPTS[:2]), student=students["lora"], engine=engines["lora"], steps=3)
    expected = drawn(tiny_files, base)
    assert (drawn_by_stock_diffusers(tiny_files, base) - expected).abs().max() <= 1
    found = dict(others(tiny_files, base))
    assert (found["onnx fp32"] - expected).abs().max() <= 1
    assert isinstance(found["onnx fp16"], torch.Tensor)
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in found["tensorrt"]
    # Another seed draws something else: equality above is no accident.
    assert (drawn(tiny_files, DrawConfig(**(vars(base) | {"seed": 5}))) - expected).abs().max() > 2
