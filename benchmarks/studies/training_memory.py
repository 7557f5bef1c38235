"""Peak memory of one distillation update against the same update as a plain fine-tune.

    python -m boostdiff.benchmarks.studies.training_memory [CONFIGS] [--batch-size 1] [--gradient-checkpointing]

Both train the same LoRA on a randomly initialised UNet in bf16, each in a process of its own; what differs is the
teacher's pass. Peak is the process's resident set on a CPU, allocated memory on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import UNet2DConditionModel

from ...distill.adapters import make_adapter
from ...distill.monitoring import peak_memory
from ...distill.objective import distillation_loss
from ...engine.guidance import combine
from ...engine.model import locate

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SD21 = Path(__file__).parents[1] / "configs" / "sd21-base"
MODES = ("fine-tune", "distil")


def update(mode: str, configs: Path, batch_size: int, checkpointing: bool) -> dict[str, float]:
    """Make the UNet, do one update, and report memory in bytes before and at its peak."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    unet = locate(str(configs)).empty_unet().to(torch.bfloat16).to_empty(device=device)
    assert isinstance(unet, UNet2DConditionModel)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
    unet.requires_grad_(False)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    adapter = make_adapter("lora", unet, rank=8)
    optimizer = torch.optim.AdamW(adapter.parameters().values(), lr=1e-4)
    size, channels = unet.config.sample_size, unet.config.in_channels
    z_t = torch.randn(batch_size, channels, size, size, device=device, dtype=torch.bfloat16)
    text = torch.randn(2 * batch_size, 77, unet.config.cross_attention_dim, device=device, dtype=torch.bfloat16)
    t = torch.full((batch_size,), 500, device=device)
    alpha = sigma = torch.full((batch_size, 1, 1, 1), 0.5**0.5, device=device)
    before, began = peak_memory(device), time.monotonic()
    with torch.autocast(device.type, torch.bfloat16):
        target = torch.randn(z_t.shape, device=device)
        if mode == "distil":
            with torch.no_grad(), adapter.disabled():
                both = unet(torch.cat([z_t, z_t]), torch.cat([t, t]), text, return_dict=False)[0]
                unconditional, conditional = both.float().chunk(2)
                target = combine(unconditional, conditional, 3.0)
        prediction = unet(z_t, t, text[batch_size:], return_dict=False)[0]
        distillation_loss(prediction.float(), target, alpha, sigma, "constant").mean().backward()
    optimizer.step()
    return {"before": before, "peak": peak_memory(device), "seconds": time.monotonic() - began}


@app.command()
def main(
    configs: Annotated[Path, typer.Argument(help="Pipeline folder; its configuration is enough.")] = SD21,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare the two, one process each."""
    if only is not None:
        print(json.dumps(update(only, configs, batch_size, gradient_checkpointing)))
        return
    peaks = {}
    for mode in MODES:
        command = [sys.executable, "-m", "boostdiff.benchmarks.studies.training_memory", str(configs), "--only", mode]
        command += ["--batch-size", str(batch_size)] + ["--gradient-checkpointing"] * gradient_checkpointing
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
        result = json.loads(done.stdout.splitlines()[-1])
        peaks[mode] = result["peak"]
        print(
            f"{mode:9}: {result['peak'] / 2**30:.2f} GiB at its peak, {result['before'] / 2**30:.2f} before, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )
    print(f"ratio {peaks['distil'] / peaks['fine-tune']:.3f} (batch {batch_size})")


if __name__ == "__main__":
    app()
