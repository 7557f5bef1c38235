"""Every runner draws what torch draws, on `emoji64`; `make test-slow` prints by how much."""

from pathlib import Path

import pytest
import torch
from agreement import STOCK, drawn, others
from boostdiff.engine import embedded
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.model import locate
from boostdiff.engine.prompts import read_prompts
from boostdiff.export.config import ExportConfig
from boostdiff.export.export import export
from torchmetrics.functional.image import peak_signal_noise_ratio

COUNT, STEPS = 16, 20
RUNNERS = (("onnx", "fp32"), ("onnx", "fp16"), ("compiled", None), ("captured", None), ("tensorrt", None))
LOWEST_PSNR = {"onnx fp32": 60.0, STOCK: 60.0, "onnx fp16": 40.0}
"""In dB of any image; the others, in bfloat16, 30."""


@pytest.mark.slow
def test_every_runner_draws_what_torch_draws(student: Path, tmp_path: Path) -> None:
    files = locate(embedded.MODEL_NAME)
    export(files, ExportConfig(precision="both"), student=student, output=tmp_path / "engine", device="cpu")
    prompts = read_prompts(embedded.HELD_OUT_PROMPTS)[:COUNT]
    base = GenerateConfig(prompts=prompts, student=student, steps=STEPS)
    expected = drawn(files, base)
    print(f"\n| against torch, {COUNT} images of {STEPS} steps | largest difference | PSNR, the lowest |")
    print("|---|---|---|")
    ran = set()
    for name, got in others(files, base, tmp_path / "engine", RUNNERS):
        if isinstance(got, str):
            print(f"| {name} | not here: {got} | |")
            continue
        ran.add(name)
        ratios = peak_signal_noise_ratio(got, expected, data_range=255.0, dim=(1, 2, 3), reduction="none")
        assert isinstance(ratios, torch.Tensor)
        print(f"| {name} | {(got - expected).abs().max():.0f}/255 | {ratios.min():.1f} dB |", flush=True)
        assert ratios.min() > LOWEST_PSNR.get(name, 30.0), name
    assert ran >= LOWEST_PSNR.keys()
