"""The recipe's training loop: AdamW with warm-up, decay and an EMA, from a checkpoint to the same numbers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..distill.checkpoint import load_training_state, save_training_state
from ..distill.order import reduce_together
from ..engine.errors import InputError

WARMUP_STEPS = 100


def learning_rate_factor(step: int, *, steps: int) -> float:
    """Linear warm-up, constant, then a cosine decay to zero over the last 40%."""
    decay_from = 0.6 * steps
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    if step < decay_from:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - decay_from) / (steps - decay_from)))


def mean_over_processes(
    accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter], loss: torch.Tensor
) -> torch.Tensor:
    """The mean of the losses of equal shares of a batch; the gradients become those of the mean, in one exchange."""
    mean = loss.detach().clone()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    reduce_together(accelerator, [mean, *gradients], "mean")
    return mean


def optimize(
    *,
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_of: Callable[[int], torch.Tensor],
    checkpoint: Path,
    steps: int,
    learning_rate: float,
    checkpoint_minutes: float = 3,
    ema_horizon: float = 0.05,
    accelerator: Accelerator | None = None,
    header: dict[str, Any] | None = None,
) -> None:
    """AdamW with warm-up, decay and an EMA; resumes from `checkpoint`, and leaves the EMA in the modules.

    Args:
        name: what the printed lines are headed with.
        loss_of: draws the batch of a step, from its seeds alone, and gives the scalar loss; where several processes
            work on it, the loss of this one's share, all shares being of one size.
        learning_rate: its peak.
        accelerator: the processes that share the batches; None for one.
        ema_horizon: the EMA's time constant as a share of the steps done (Karras et al. 2024, eq. 121-127,
            keep it relative to training time for the same reason: early weights must fade).
        header: plain JSON values that a run that goes on must share with its beginning, by option.

    Raises:
        InputError: the checkpoint is damaged, or of a run that was begun otherwise.
    """
    header = header or {}
    named = {
        f"{key}.{path}": parameter for key, module in modules.items() for path, parameter in module.named_parameters()
    }
    optimizer = torch.optim.AdamW(named.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    ema = {path: parameter.detach().clone() for path, parameter in named.items()}
    start = 0
    if checkpoint.exists():
        state = load_training_state(checkpoint)
        begun, start = state.header, state.step
        if others := sorted(key for key in begun.keys() | header.keys() if begun.get(key) != header.get(key)):
            options = " and ".join(f"--{key.replace('_', '-')}" for key in others)
            raise InputError(
                f"{checkpoint} was begun with another {options}: repeat it, or delete the file, and the run begins anew"
            )
        with torch.no_grad():
            for path, parameter in named.items():
                parameter.copy_(state.weights[path])
                ema[path].copy_(state.weights[f"ema.{path}"])
        optimizer.load_state_dict(state.optimizer)
        print(f"{name}: continues from step {start}", flush=True)

    saved_at = began = time.monotonic()
    recent: list[float] = []
    for step in range(start, steps):
        loss = loss_of(step)
        loss.backward()
        if accelerator and accelerator.num_processes > 1:
            loss = mean_over_processes(accelerator, named.values(), loss)
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(step, steps=steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = 1 - 1 / max(1.0, ema_horizon * step)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), list(named.values()), 1 - decay)
        if accelerator and not accelerator.is_main_process:
            continue
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (step + 1 - start)
            left = pace * (steps - step - 1) / 60
            print(
                f"{name}: step {step + 1}/{steps} loss {statistics.mean(recent):.4f} {pace:.3f} s/step "
                f"{left:.0f} min left",
                flush=True,
            )
            recent.clear()
        if time.monotonic() - saved_at > 60 * checkpoint_minutes or step + 1 == steps:
            weights = named | {f"ema.{path}": tensor for path, tensor in ema.items()}
            save_training_state(checkpoint, step=step + 1, weights=weights, optimizer=optimizer, header=header)
            saved_at = time.monotonic()
    with torch.no_grad():
        for path, parameter in named.items():
            parameter.copy_(ema[path])


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step's noise."""
    # torch's CPU generator reads 32 bits of its seed.
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
