"""How near a student's single predictions come to the guided teacher's: quick, before any image is judged.

    python -m boostdiff.benchmarks.studies.prediction_error STUDENT … [--scales 3] [--prompts 24] [--by-timestep]

On `emoji64`, at every fourth of 16 DDIM steps of the teacher's own trajectories for held-out prompts. Prints a Markdown
table of squared errors as shares of the unguided network's: 0 is the teacher, 1 no better than not distilling. "Added"
is the part of what a student adds that lies along the teacher's guidance, in units of one step of w: w − 1 is the
teacher's. Over all timesteps, or with `--by-timestep` a row for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...engine import embedded
from ...engine.families import TextEmbeddings
from ...engine.guidance import Denoiser, GuidedDenoiser, SinglePassDenoiser
from ...engine.model import Model
from ...engine.prompts import read_prompts
from ...engine.runners import TorchRunner
from ...engine.sampling import initial_noise
from ...engine.schedulers import make_scheduler
from ...engine.student import read_student
from .held_out import student_model, teacher_model

STEPS = 16
EVERY = 4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class State:
    """A point of the teacher's trajectories.

    Attributes:
        t: the timestep, a scalar.
        z_t: latents `(B, C, H, W)`.
        guided: the teacher's prediction there.
        unguided: the network's own.
    """

    t: torch.Tensor
    z_t: torch.Tensor
    guided: torch.Tensor
    unguided: torch.Tensor


@torch.inference_mode()
def trajectory(model: Model, text: TextEmbeddings, scale: float) -> list[State]:
    """The teacher's states at one guidance scale above 1, image i from the noise of seed i."""
    runner = TorchRunner(model.unet)
    guided, unguided = GuidedDenoiser(runner, scale), SinglePassDenoiser(runner)
    scheduler = make_scheduler("ddim", model.pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS, device=model.device)
    z_t = initial_noise(model.latent_shape, count=len(text), seed=0).to(model.device, model.unet.dtype)
    states = []
    for step, t in enumerate(scheduler.timesteps):
        prediction = guided(z_t, t, text)
        if step % EVERY == 1:
            states.append(State(t=t, z_t=z_t, guided=prediction, unguided=unguided(z_t, t, text)))
        z_t = scheduler.step(prediction, t, z_t, return_dict=False)[0]
    return states


@torch.inference_mode()
def prediction_error(denoiser: Denoiser, states: Sequence[State], text: TextEmbeddings) -> tuple[float, float]:
    """‖ε̂ − ε̂_w‖² / ‖ε̂_1 − ε̂_w‖² over all states, and ⟨ε̂ − ε̂_1, ε̂_w − ε̂_1⟩ over the same: (1, 0) without a student."""
    error = along = whole = 0.0
    for state in states:
        got = denoiser(state.z_t, state.t, text).double()
        guided, unguided = state.guided.double(), state.unguided.double()
        error += (got - guided).square().sum().item()
        along += ((got - unguided) * (guided - unguided)).sum().item()
        whole += (guided - unguided).square().sum().item()
    return error / whole, along / whole


@app.command()
def main(
    students: Annotated[list[Path], typer.Argument(help="Students of the embedded model.")],
    scales: Annotated[str, typer.Option(help="Guidance scales above 1, comma-separated.")] = "1.5,3,5,7.5",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 24,
    by_timestep: Annotated[bool, typer.Option("--by-timestep", help="A row for each timestep.")] = False,
) -> None:
    """Measure."""
    model = teacher_model()
    text = model.family.encode(model.pipeline, read_prompts(embedded.HELD_OUT_PROMPTS)[:prompts])
    wanted = [float(scale) for scale in scales.split(",")]
    # By scale; a trajectory visits the same timesteps at each.
    states = {scale: trajectory(model, text, scale) for scale in wanted}
    rows: dict[str, slice] = {"": slice(None)}
    if by_timestep:
        rows = {f", t = {int(state.t)}": slice(i, i + 1) for i, state in enumerate(states[wanted[0]])}
    print("| student | " + " | ".join(f"w={scale:g} | added" for scale in wanted) + " |")
    print("|---" * (1 + 2 * len(wanted)) + "|")
    for folder in students:
        info = read_student(folder)
        runner = TorchRunner(student_model(folder).unet)
        opened: Callable[[float], float | None] = info.choose_guidance if info.guidance_range else lambda scale: None
        for told, part in rows.items():
            cells = []
            for scale in wanted:
                student = SinglePassDenoiser(runner, opened(scale))
                error, along = prediction_error(student, states[scale][part], text)
                cells.append(f"{error:.2f} | {along * (scale - 1):.2f}")
            print(f"| {folder.name}{told} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    app()
