"""What an 8-bit UNet is calibrated on and judged by: states of the student's trajectories and of its teacher's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine import embedded
from ..engine.conditions import TextEmbeddings
from ..engine.errors import BoostDiffError, InputError
from ..engine.family import Family
from ..engine.guidance import Denoiser
from ..engine.guidance_term import State, total_sum_of_squares, trajectory
from ..engine.model import LARGE_PARAMETERS, Model, ModelFiles
from ..engine.prompts import read_prompts
from ..engine.runners import Runner, TorchRunner
from ..engine.sampling import initial_noise, sample
from ..engine.schedulers import is_flow
from ..engine.student import StudentInfo
from .config import ExportConfig

STEPS, ROWS, SEED = 16, 4, 1_000_000
"""Steps of the student's trajectories, states kept of each, and their first seed: the teacher's begin at 0."""
TRAILING_STEPS = 4
"""Of the trajectories that begin at the last timestep."""
PROMPTS, CHECKED = 16, 8
"""Prompts to calibrate on, and others to judge by."""
LARGE_PROMPTS, LARGE_CHECKED = 4, 2
"""Of a large UNet, which takes ten seconds a pass on a CPU."""


def calibration_prompts(config: ExportConfig, files: ModelFiles) -> list[str]:
    """The prompts to calibrate on; none where nothing is quantized.

    Raises:
        InputError: the file can't be used, or the model brings no prompts and none are given.
    """
    if config.quantize is None:
        return []
    if config.calibration_prompts is not None:
        return read_prompts(config.calibration_prompts)
    if files.name != embedded.MODEL_NAME:
        raise InputError(
            f"--quantize {config.quantize} calibrates on prompts, and {files.name} brings none: pass "
            "--calibration-prompts FILE, such as the student's training prompts"
        )
    return read_prompts(embedded.TRAIN_PROMPTS)


def _further_timesteps(model: Model, few_steps: int | None) -> list[tuple[int, str]]:
    """Steps and spacing of trajectories beside those of the model's own spacing.

    A leading one begins below the last timestep, where trailing ones begin, and so do samplers that space linearly:
    there 8 bits whose ranges do not hold its latents err many times as much.
    """
    schedule = model.pipeline.scheduler.config
    if is_flow(schedule) or (few_steps is None and schedule.get("timestep_spacing") == "trailing"):
        return []
    return [(few_steps or TRAILING_STEPS, "trailing")]


class _Recorder(TorchRunner):
    """Keeps a few rows of what the UNet is given, others at each step."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__(denoiser)
        self.states: list[dict[str, torch.Tensor]] = []

    def predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        stride = max(1, len(inputs["sample"]) // ROWS)
        rows = slice(len(self.states) % stride, None, stride)
        self.states.append({name: tensor[rows].float().cpu() for name, tensor in inputs.items()})
        return super().predict(inputs)


@dataclass(kw_only=True)
class Calibration:
    """What an 8-bit UNet is calibrated on and judged by.

    Attributes:
        family: the model's family.
        prompts: texts of the calibrating trajectories.
        text: embeddings of the other prompts, which `checked` was drawn for.
        checked: the teacher's states.
        states: inputs of the UNet, a few rows of each step, float32 on the CPU.
    """

    family: Family
    prompts: Sequence[str]
    text: TextEmbeddings
    checked: list[State]
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @classmethod
    @torch.inference_mode()
    def of_teacher(cls, model: Model, prompts: Sequence[str], info: StudentInfo) -> Calibration:
        """Draw the teacher's trajectories, before its UNet becomes the student.

        Raises:
            BoostDiffError: guidance makes no difference, so an error can't be measured by it.
        """
        large = model.denoiser.num_parameters() >= LARGE_PARAMETERS
        checked, calibrating = (LARGE_CHECKED, LARGE_PROMPTS) if large else (CHECKED, PROMPTS)
        distinct = list(dict.fromkeys(prompts))
        chosen = random.Random(0).sample(distinct, min(len(distinct), checked + calibrating))
        # Of too few prompts the same do, from other noise.
        text = model.family.encode(model.pipeline, chosen[:checked], negative_prompt=info.negative_prompt)
        guider = info.teacher_guider.for_schedule(model.pipeline.scheduler.config)
        states = trajectory(model, text, info.guidance, guider)
        for steps, spacing in _further_timesteps(model, info.steps):
            kept = slice(None, None, 2)
            states += trajectory(model, text, info.guidance, guider, steps=steps, spacing=spacing, kept=kept)
        if not total_sum_of_squares(states) > 0:
            raise BoostDiffError("guidance changes nothing in this model: 8 bits can't be judged by it")
        return cls(family=model.family, prompts=chosen[checked:] or chosen, text=text, checked=states)

    @torch.inference_mode()
    def add_states(
        self,
        model: Model,
        denoiser_of: Callable[[Runner], Denoiser],
        negative_prompt: str | None = None,
        few_steps: int | None = None,
    ) -> None:
        """Draw trajectories of the model's UNet, in DDIM steps over all timesteps, and keep what it is given.

        `few_steps` are those of a few-step student.
        """
        recorder, count = _Recorder(model.denoiser), len(self.prompts)
        text = model.family.encode(model.pipeline, list(self.prompts), negative_prompt=negative_prompt)
        noise = initial_noise(model.latent_shape, count=count, seed=SEED).to(model.device)
        for steps, spacing in ((STEPS, None), *_further_timesteps(model, few_steps)):
            scheduler = model.make_scheduler("ddim", spacing=spacing)
            sample(denoiser_of(recorder), text=text, noise=noise, scheduler=scheduler, steps=steps)
        self.states = recorder.states

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "prompts": len(self.prompts),
            "steps": STEPS,
            "sampler": "ddim",
            "states": sum(len(state["sample"]) for state in self.states),
            "checked_states": sum(len(state.z_t) for state in self.checked),
        }

    @torch.inference_mode()
    def predictions(self, denoiser: Denoiser) -> list[torch.Tensor]:
        """At the states that 8 bits are judged by."""
        return [denoiser(state.z_t, state.t, self.text).cpu() for state in self.checked]
