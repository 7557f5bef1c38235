"""The training loop, on one process or many.

Every process holds the model and works on its share of each batch; the adapter is small, so one all-reduce of its
gradients per update is all that they exchange (of images also whether they could be read), and no wrapper comes between
the loop and the denoiser.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..engine.adapters import Adapter
from ..engine.compiled import TrainingRunner
from ..engine.errors import BoostDiffError, InputError, one_line
from ..engine.files import give_modes
from ..engine.guidance import GuidedDenoiser, SinglePassDenoiser
from ..engine.model import Model
from ..engine.predictions import x_from_prediction
from ..engine.runners import TorchRunner
from .checkpoint import TrainingState, save_training_state
from .config import DistillConfig, RunConfig, learning_rate_at
from .few_steps import FrozenStudent
from .images import in_words
from .monitoring import LossWatch, StopRequest, Throughput, peak_memory, stop_request
from .objective import NoiseSchedule, distillation_loss, guidance_weight
from .order import reduce_together
from .replay import Replay
from .source import Batch, Source

CHECKPOINT_FILE = "checkpoint.safetensors"
LOG_FILE, PREVIEWS = "log.jsonl", "previews"


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What `distill` reports after each update: loss and speed over all processes, this one's peak memory in bytes.

    Attributes:
        update: number of updates done.
        steps: number of steps of the student that a stage trains; None for guidance.
    """

    update: int
    loss: float
    guidance_r2: float | None
    images_per_second: float
    peak_memory: int
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Observers:
    """What watches a run; nothing here changes the adapter.

    Attributes:
        on_start: callback for the update that the run begins at.
        on_update: callback after each update.
        on_note: callback for warnings in words.
        preview: whether to draw `grid.png` at the end.
    """

    on_start: Callable[[int], None] = lambda update: None
    on_update: Callable[[UpdateReport], None] = lambda report: None
    on_note: Callable[[str], None] = lambda note: None
    preview: bool = True


@dataclass
class Run:
    """One training run's moving parts.

    Attributes:
        source: supply of batches.
        done: number of updates done.
        notes: what of the data is not used, in words.
        frozen: student of the stage before, of a stage of few steps.
        microbatches: per update; more than configured where memory does not suffice.
        stopped: the signal that asked the run to stop, "" before one did.
    """

    accelerator: Accelerator
    model: Model
    adapter: Adapter
    source: Source
    replay: Replay
    schedule: NoiseSchedule
    config: DistillConfig
    execution: RunConfig
    folder: Path
    done: int = 0
    watch: LossWatch = field(default_factory=LossWatch)
    notes: list[str] = field(default_factory=list)
    frozen: FrozenStudent | None = None
    microbatches: int = field(init=False)
    stopped: str = ""

    def __post_init__(self) -> None:
        self.microbatches = self.execution.gradient_accumulation_steps
        self.runner = (TrainingRunner if self.execution.compile else TorchRunner)(self.model.denoiser)
        self.autocast = self.accelerator.autocast if self.config.precision != "fp32" else nullcontext
        self.guider = self.config.chosen_guider.for_schedule(self.model.pipeline.scheduler.config)
        self.parameters = list(self.adapter.parameters().values())
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(self.parameters, lr=self.config.learning_rate, weight_decay=0.0),
            device_placement=[False],
        )
        self.last_good_weights = [parameter.detach().clone() for parameter in self.parameters]
        self.began = time.monotonic()
        # What the log calls the loss of the baseline, and R².
        self.baseline_key = "before_loss" if self.frozen else "unguided_loss"
        self.r2_key = "stage_r2" if self.frozen else "guidance_r2"

    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's x̂_w, and the x̂ of the baseline, a student that has learned nothing, each `(B, C, H, W)`.

        The latter is the teacher's conditional pass, which x̂_w needs anyway. In a stage of few steps x̃ takes the place
        of x̂_w, and the frozen student's first step that of the conditional pass.
        """
        if self.frozen:
            return self.frozen.targets(batch.z_t, batch.t, partial(self.student_x, batch=batch))
        alpha, sigma = self.schedule.at(batch.t)
        timesteps, dtype = self.schedule.timesteps[batch.t], self.runner.dtype
        scale = batch.guidance if self.config.guidance_conditioned else self.config.guidance
        teacher = GuidedDenoiser(self.runner, scale, self.guider)

        def x_of(prediction: torch.Tensor) -> torch.Tensor:
            return x_from_prediction(prediction.float(), batch.z_t, alpha, sigma, self.schedule.prediction_type)

        with torch.no_grad(), self.adapter.disabled(), self.autocast():
            unconditional, conditional = teacher.passes(batch.z_t.to(dtype), timesteps, batch.text.to(dtype))
        # In float32: guidance multiplies what half precision rounds.
        return x_of(teacher.combined(unconditional.float(), conditional.float(), timesteps)), x_of(conditional)

    def student_x(self, z_t: torch.Tensor, t: torch.Tensor, *, batch: Batch) -> torch.Tensor:
        """The student's x̂ `(B, C, H, W)` at latents and timesteps `(B,)`, for a batch's texts and guidance scales."""
        dtype = self.runner.dtype
        guidance = batch.guidance if self.config.guidance_conditioned else None
        student = SinglePassDenoiser(self.runner, guidance, live_negative_prompt=self.config.live_negative_prompt)
        with self.autocast():
            prediction = student(z_t.to(dtype), self.schedule.timesteps[t], batch.text.to(dtype))
        return x_from_prediction(prediction.float(), z_t, *self.schedule.at(t), self.schedule.prediction_type)

    def losses(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Equation (4) of x̂ `(B, C, H, W)` against the targets, `(B,)`."""
        assert batch.teacher_x is not None
        losses = distillation_loss(x, batch.teacher_x, *self.schedule.at(batch.t), self.config.loss_weight)
        weighted = self.config.guidance_conditioned and not self.frozen
        return losses * guidance_weight(batch.guidance) if weighted else losses

    def gradients(self, batch: Batch, update: int) -> tuple[Batch, torch.Tensor]:
        """Accumulate this process's gradients of the mean loss over `microbatches`.

        Returns:
            The batch with targets, and this process's share of the mean over its samples of their loss and of the
            baseline's, `(2,)`. Samples that the student has not been trained on: it counts for R².
        """
        teacher_x, baseline_x = map(torch.cat, zip(*map(self.targets, batch.split(self.microbatches)), strict=True))
        batch = replace(batch, teacher_x=teacher_x)
        whole = self.replay.extended(batch, self.source, update)
        seen = []
        for microbatch in whole.split(self.microbatches):
            losses = self.losses(self.student_x(microbatch.z_t, microbatch.t, batch=microbatch), microbatch)
            # The sum over shares and microbatches is the mean over all processes' samples.
            self.accelerator.backward(losses.sum() / self.config.batch_size)
            seen.append(losses.detach())
        both = torch.cat(seen)[: len(batch)], self.losses(baseline_x, batch)
        return batch, torch.stack([losses.sum() for losses in both]) / self.config.new_samples

    def update(self, update: int, request: StopRequest, note: Callable[[str], None]) -> bool:
        """One optimizer step, its losses over all processes added to `watch`; whether any process was asked to stop.

        Raises:
            BoostDiffError: see `refuse` and `within_memory`.
        """
        batch = self.source.batch(update)
        batch, total = self.within_memory(batch, update, note)
        loss_value, baseline_value, stop = self.reduce(total, request)
        if not math.isfinite(loss_value):
            self.refuse(f"the loss is {loss_value} at update {update}")
        norm = self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        # In FP16 the gradient scaler skips such a step and continues with a smaller scale.
        if self.config.precision != "fp16" and not torch.isfinite(norm):
            self.refuse(f"the gradient is {norm.item()} at update {update}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(update, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert batch.teacher_x is not None
        self.replay.add(batch)
        self.source.advance(batch.teacher_x)
        self.done = update + 1
        self.watch.add(loss_value, baseline_value)
        if self.watch.diverges():
            self.refuse(f"the loss diverges: {loss_value:.3g} at update {update}")
        return stop

    def within_memory(self, batch: Batch, update: int, note: Callable[[str], None]) -> tuple[Batch, torch.Tensor]:
        """`gradients`, in more microbatches than before where memory does not suffice.

        Raises:
            BoostDiffError: not even one sample fits.
        """
        while True:
            try:
                return self.gradients(batch, update)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Only here, after the handler, are the activations that the traceback holds let go.
            self.optimizer.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            if self.microbatches >= self.config.reuse * len(batch):
                hint = "" if self.execution.gradient_checkpointing else "pass --gradient-checkpointing, or "
                raise BoostDiffError(f"out of memory with one sample at a time: {hint}stop what else uses the device")
            self.microbatches = min(2 * self.microbatches, self.config.reuse * len(batch))
            note(
                f"out of memory: continuing with --gradient-accumulation-steps {self.microbatches}, "
                "which gives the same student"
            )

    def reduce(self, losses: torch.Tensor, request: StopRequest) -> tuple[float, float, bool]:
        """Sum gradients, losses `(2,)` and requests to stop over all processes, in one exchange."""
        stops = losses.new_tensor(float(request.name is not None))
        if self.accelerator.num_processes > 1:
            # What the prediction does not depend on, such as the text's way out of Qwen-Image's last block, has no
            # gradient, in any process.
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            reduce_together(self.accelerator, [*gradients, losses, stops], "sum")
        loss, baseline = losses.tolist()
        return loss, baseline, stops.item() > 0

    def restore(self, state: TrainingState) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: it is of another adapter, or the log beside it is no log.
        """
        try:
            self.adapter.load_state_dict(state.weights)
            self.optimizer.load_state_dict(state.optimizer)
            self.source.restore(state.data, Counter(state.header.get("notes", {})))
            self.replay.restore(state.data)
            self.began -= state.header.get("seconds", 0.0)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"can't resume: {one_line(error)}; run without --resume") from None
        self.done = state.step
        if not 0 <= self.done <= self.config.updates:
            raise InputError(f"can't resume: the checkpoint is of update {self.done}; run without --resume")
        try:
            for line in _log_lines(self.folder / LOG_FILE, self.done):
                logged = json.loads(line)
                self.watch.add(logged["loss"], logged[self.baseline_key])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"can't resume: {self.folder / LOG_FILE} is damaged; run without --resume") from None
        self.last_good_weights = [parameter.detach().clone() for parameter in self.parameters]
        if self.accelerator.scaler is not None and state.header.get("scaler"):
            self.accelerator.scaler.load_state_dict(state.header["scaler"])

    def checkpoint(self) -> None:
        """Write all that a run needs to continue, from the main process; called in every one."""
        data, notes = self.source.state() | self.replay.state(), self.source.notes()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        header = {"scaler": scaler and scaler.state_dict(), "notes": notes, "seconds": time.monotonic() - self.began}
        save_training_state(
            self.folder / CHECKPOINT_FILE,
            step=self.done,
            weights=dict(self.adapter.parameters()),
            optimizer=self.optimizer,
            data=data,
            header=header,
        )

    def train(self, observers: Observers, draw: Callable[[Path], None]) -> dict[str, Any]:
        """Do the updates that are left; what `student.json` says of them.

        Raises:
            InputError: data can't be used; the updates before are saved.
            BoostDiffError: see `update`, or the run was asked to stop.
        """
        start, throughput = self.done, Throughput(self.config.batch_size)
        main = self.accelerator.is_main_process
        for note in self.notes if main else ():
            observers.on_note(note)
        observers.on_start(start)
        with _open_log(self.folder / LOG_FILE, start, main) as log, stop_request() as request:
            for update in range(start, self.config.updates):
                try:
                    stop = self.update(update, request, observers.on_note)
                except InputError as error:
                    # Of several processes those that read images fail together, others alone.
                    alone = self.accelerator.num_processes > 1 and self.config.images is None
                    if alone or not self.done:
                        raise
                    log.flush()
                    self.checkpoint()
                    raise InputError(f"{error}; saved after update {self.done}, from where --resume goes on") from None
                loss, r2 = self.watch.losses[-1], self.watch.guidance_r2()
                values = {"loss": loss, self.baseline_key: self.watch.baseline[-1], self.r2_key: r2}
                values["teacher_evaluations"] = self.budget()["teacher_evaluations"]
                values["lr"] = learning_rate_at(update, self.config)
                log.write(json.dumps({"update": update, **values}) + "\n")
                images_per_second = throughput.after_update()
                if self.execution.log_with:
                    self.accelerator.log({**values, "images/s": images_per_second}, step=update)
                last = self.done == self.config.updates
                if (self.done % self.execution.checkpoint_every == 0 or stop) and not last:
                    log.flush()
                    self.checkpoint()
                    self.last_good_weights = [parameter.detach().clone() for parameter in self.parameters]
                observers.on_update(
                    UpdateReport(
                        update=self.done,
                        loss=loss,
                        guidance_r2=r2,
                        images_per_second=images_per_second,
                        peak_memory=peak_memory(self.runner.device),
                        steps=self.frozen.stage.steps if self.frozen else None,
                    )
                )
                if self.execution.preview_every and self.done % self.execution.preview_every == 0 and main:
                    (self.folder / PREVIEWS).mkdir(exist_ok=True)
                    draw(self.folder / PREVIEWS / f"{self.done:06}.png")
                if stop and not last:
                    self.stopped = request.name or "another process"
                    raise self.interrupted()
            # In the last update, too: another stage may follow.
            self.stopped = request.name or ""
        notes = in_words(self.source.notes())
        for note in notes if main else ():
            observers.on_note(note)
        return {
            "updates": self.config.updates,
            "resumed_at": start,
            **self.budget(),
            "seconds": round(time.monotonic() - self.began, 1),
            "images_per_second": throughput.images_per_second,
            "final_loss": self.watch.mean_loss(),
            self.r2_key: self.watch.guidance_r2(),
            "gradient_accumulation_steps": self.microbatches,
            "processes": self.accelerator.num_processes,
            "peak_memory": peak_memory(self.runner.device),
            "notes": self.notes + notes,
        }

    def interrupted(self) -> BoostDiffError:
        """What a run that was asked to stop ends with."""
        return BoostDiffError(
            f"stopped by {self.stopped} after update {self.done}, saved: "
            "the same command with --resume continues from there"
        )

    def budget(self) -> dict[str, int]:
        """What the updates so far have cost, in samples: the teacher evaluates each once, in two passes."""
        evaluated, trained = self.done * self.config.new_samples, self.done * self.config.batch_size
        return {"teacher_evaluations": evaluated, "forward_passes": 2 * evaluated + trained, "backward_passes": trained}

    def refuse(self, reason: str) -> NoReturn:
        """Stop, and leave the last good adapter in the unfinished run's folder.

        Raises:
            BoostDiffError: always.
        """
        with torch.no_grad():
            for parameter, good in zip(self.parameters, self.last_good_weights, strict=True):
                parameter.copy_(good)
        if self.accelerator.is_main_process:
            self.adapter.save(self.folder, self.model.pipeline)
            give_modes(self.folder)
        raise BoostDiffError(
            f"{reason}: lower --learning-rate and run again; the last good adapter is kept in {self.folder}"
        )


def _log_lines(path: Path, count: int) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if path.exists() else []


def _open_log(path: Path, start: int, main: bool) -> TextIO:
    """Open the log for appending after its first `start` lines, which are those of the checkpoint."""
    if not main:
        return Path(os.devnull).open("w", encoding="utf-8")
    path.write_text("".join(_log_lines(path, start)), encoding="utf-8")
    return path.open("a", encoding="utf-8")
