from dataclasses import replace
from pathlib import Path

import torch
from agreement import STOCK, drawn, others
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.model import ModelFiles
from tiny import PROMPTS


def test_runners_and_stock_diffusers_draw_the_same(
    tiny_files: ModelFiles, students: dict[str, Path], engines: dict[str, Path]
) -> None:
    base = GenerateConfig(prompts=list(PROMPTS[:2]), student=students["lora"], steps=3)
    expected = drawn(tiny_files, base)
    runners = (("onnx", "fp32"), ("onnx", "fp16"), ("tensorrt", None))
    found = dict(others(tiny_files, base, engines["lora"], runners))
    assert (found.pop("onnx fp32") - expected).abs().max() <= 1
    assert (found.pop(STOCK) - expected).abs().max() <= 1
    assert isinstance(found["onnx fp16"], torch.Tensor)
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in found["tensorrt"]
    # Another seed draws something else: equality above is no accident.
    assert (drawn(tiny_files, replace(base, seed=5)) - expected).abs().max() > 2
