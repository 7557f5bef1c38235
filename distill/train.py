"""The training loop of `boostdiff distill`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ..engine.errors import BoostDiffError, InputError
from ..engine.files import prepare_output, publish, read_json, sha256_of, write_json
from ..engine.guidance import GuidedDenoiser, SinglePassDenoiser
from ..engine.model import Model, ModelFiles, load, resolve_device
from ..engine.prompts import read_prompts
from ..engine.runners import TorchRunner
from ..engine.student import StudentInfo
from ..engine.versions import versions
from .adapters import METHODS, Adapter, make_adapter
from .checkpoint import CheckpointError, load_training_state, save_training_state
from .data import CaptionedImages, Source, Trajectories, find_captioned_images
from .objective import LOSS_WEIGHTS, NoiseSchedule, distillation_loss, x_from_prediction
from .preview import write_preview

CHECKPOINT_FILE = "checkpoint.safetensors"
CONFIG_FILE = "config.json"
LOG_FILE = "train.jsonl"
PREVIEW_ROWS = 6


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that determines the trained adapter.

    Attributes:
        method: a name in `METHODS`.
        rank: of LoRA.
        guidance: the guidance scale w to distil in, at least 1.
        prompts: one prompt a line; the source is then online trajectories.
        images: a folder of captioned images; the source is then diffused images.
        updates: optimizer steps.
        batch_size: states an update.
        learning_rate: peak of AdamW's; linear warm-up over 5% of the updates, then a cosine decay to zero.
        loss_weight: a key of `LOSS_WEIGHTS`.
        seed: of everything random.
        precision: of the forward passes: "fp32", "bf16" or "fp16" (autocast); adapters are float32 always.
        checkpoint_every: updates between checkpoints.
    """

    method: str = "lora"
    rank: int = 8
    guidance: float = 3.0
    prompts: Path | None = None
    images: Path | None = None
    updates: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3
    loss_weight: str = "snr"
    seed: int = 0
    precision: str = "fp32"
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: a value can't be used.
        """
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.loss_weight not in LOSS_WEIGHTS:
            raise InputError(f"unknown loss weight {self.loss_weight!r}: choose one of {', '.join(LOSS_WEIGHTS)}")
        if self.precision not in {"fp32", "bf16", "fp16"}:
            raise InputError(f"unknown precision {self.precision!r}: choose fp32, bf16 or fp16")
        if not self.guidance >= 1 or math.isinf(self.guidance):
            raise InputError(f"--guidance {self.guidance:g} can't be distilled: it must be at least 1")
        for name in ("rank", "updates", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 < self.learning_rate < 1:
            raise InputError("--learning-rate must lie between 0 and 1")
        if self.prompts and self.images:
            raise InputError("pass --prompts FILE or --images DIR, not both")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What `distil` reports after each update."""

    update: int
    loss: float
    seconds_per_update: float


def count_parameters(files: ModelFiles, config: DistillConfig) -> dict[str, int]:
    """Parameters that would be trained, and those of the UNet without an adapter, from its configuration alone."""
    unet = files.empty_unet()
    total = sum(p.numel() for p in unet.parameters())
    with torch.device("meta"):
        adapter = make_adapter(config.method, unet, rank=config.rank)
    trainable = sum(p.numel() for p in adapter.parameters().values())
    return {"trainable_parameters": trainable, "total_parameters": total}


def learning_rate_at(update: int, config: DistillConfig) -> float:
    """Linear warm-up over 5% of the updates, then a cosine decay to zero."""
    warmup = max(1, config.updates // 20)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, config.updates - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def work_folder(output: Path) -> Path:
    """Where an unfinished run keeps its checkpoint: beside the folder that it will become."""
    return output.with_name(f"{output.name}.unfinished")


def distil(
    files: ModelFiles,
    config: DistillConfig,
    *,
    output: Path,
    device: str = "auto",
    resume: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_update: Callable[[UpdateReport], None] | None = None,
    preview: bool = True,
) -> StudentInfo:
    """Train an adapter that makes one conditional pass predict what guided sampling predicts.

    The run works in `work_folder(output)`, which takes the name `output` only when all is there.

    Args:
        files: the model.
        config: the training configuration.
        output: the student's folder.
        device: "auto", "cpu", "cuda", …
        resume: go on from the unfinished run's checkpoint.
        on_start: called with the update that the run begins at.
        on_update: called after each update.
        preview: draw `grid.png` at the end.

    Returns:
        What `student.json` says.

    Raises:
        InputError: the model, the data or the output can't be used, or there is nothing to resume.
        BoostDiffError: the loss is no longer finite.
    """
    # Checked before the weights are read: they can take minutes.
    if config.prompts is None and config.images is None:
        raise InputError("there is nothing to train on: pass --prompts FILE or --images DIR")
    prompts = read_prompts(config.prompts) if config.prompts else []
    pairs = find_captioned_images(config.images) if config.images else []
    prepare_output(output)
    folder = work_folder(output)
    resolved = config.as_json() | {"unet_sha256": files.unet_sha256()}
    state = _resumable_state(folder, resolved) if resume else None

    target = resolve_device(device)
    # accelerate keeps one state a process; a second run in it may use another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision, cpu=target.type == "cpu"
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    model = load(files, device=target, dtype=torch.float32 if target.type == "cpu" else dtype)
    torch.manual_seed(config.seed)
    adapter = make_adapter(config.method, model.unet, rank=config.rank)
    parameters = list(adapter.parameters().values())
    optimizer = accelerator.prepare(
        torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0), device_placement=[False]
    )
    schedule = NoiseSchedule.of(model.pipeline.scheduler, target)
    common = {"batch_size": config.batch_size, "seed": config.seed}
    source: Source
    if pairs:
        source = CaptionedImages(model, pairs, schedule, **common)
    else:
        source = Trajectories(model, prompts, schedule, **common)

    start = 0
    if state is not None:
        start = state.step
        adapter.load(state.weights)
        optimizer.load_state_dict(state.optimizer)
        source.restore(state.data)
    else:
        folder.mkdir(exist_ok=True)
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        write_json(folder / CONFIG_FILE, resolved)
    if on_start:
        on_start(start)

    with _open_log(folder / LOG_FILE, start) as log:
        result = _train(accelerator, model, adapter, source, schedule, optimizer, config, folder, log, start, on_update)
    path = adapter.save(folder, model.pipeline)
    info = StudentInfo(
        method=config.method,
        guidance=config.guidance,
        model=files.name,
        unet_sha256=resolved["unet_sha256"],
        adapter_sha256=sha256_of(path),
        trainable_parameters=sum(p.numel() for p in parameters),
        settings=config.as_json(),
        versions=versions(),
        result=result,
    )
    info.write(folder)
    if preview:
        # Prompts that stand far apart show more than the first few of a sorted list.
        shown = prompts or [caption for _, caption in pairs]
        shown = shown[:: max(1, len(shown) // PREVIEW_ROWS)][:PREVIEW_ROWS]
        with accelerator.autocast():
            write_preview(model, adapter, folder, prompts=shown, guidance=config.guidance, method=config.method)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    publish(folder, output)
    return info


def _train(
    accelerator: Accelerator,
    model: Model,
    adapter: Adapter,
    source: Source,
    schedule: NoiseSchedule,
    optimizer: torch.optim.Optimizer,
    config: DistillConfig,
    folder: Path,
    log: TextIO,
    start: int,
    on_update: Callable[[UpdateReport], None] | None,
) -> dict[str, Any]:
    runner = TorchRunner(model.unet)
    teacher, student = GuidedDenoiser(runner, config.guidance), SinglePassDenoiser(runner)
    prediction_type = model.pipeline.scheduler.config.prediction_type
    autocast = accelerator.autocast if config.precision != "fp32" else nullcontext
    parameters = list(adapter.parameters().values())
    dtype = model.unet.dtype
    began = time.monotonic()
    losses: list[float] = []
    for update in range(start, config.updates):
        batch = source.batch(update)
        alpha, sigma = schedule.at(batch.t)
        z_t, text = batch.z_t.to(dtype), batch.text.to(dtype)

        with torch.no_grad(), adapter.disabled(), autocast():
            teacher_prediction = teacher(z_t, batch.t, text).float()
        teacher_x = x_from_prediction(teacher_prediction, batch.z_t, alpha, sigma, prediction_type)
        with autocast():
            student_prediction = student(z_t, batch.t, text).float()
        student_x = x_from_prediction(student_prediction, batch.z_t, alpha, sigma, prediction_type)
        loss = distillation_loss(student_x, teacher_x, alpha, sigma, config.loss_weight)

        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        source.advance(teacher_x)

        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise BoostDiffError(f"the loss is {losses[-1]} at update {update}: lower --learning-rate")
        log.write(json.dumps({"update": update, "loss": losses[-1], "lr": learning_rate_at(update, config)}) + "\n")
        done = update + 1
        if done % config.checkpoint_every == 0 and done < config.updates:
            log.flush()
            save_training_state(
                folder / CHECKPOINT_FILE,
                step=done,
                weights=dict(adapter.parameters()),
                optimizer=optimizer,
                data=source.state(),
            )
        if on_update:
            pace = (time.monotonic() - began) / (done - start)
            on_update(UpdateReport(update=done, loss=losses[-1], seconds_per_update=pace))
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "updates": config.updates,
        "resumed_at": start,
        "seconds": round(time.monotonic() - began, 1),
        "final_loss": sum(tail) / len(tail),
    }


def _resumable_state(folder: Path, resolved: dict[str, Any]) -> Any:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"there is nothing to resume in {folder}: run without --resume")
    before = read_json(folder / CONFIG_FILE)
    changed = sorted(key for key in resolved.keys() | before.keys() if resolved.get(key) != before.get(key))
    if changed:
        details = ", ".join(f"{key} was {before.get(key)}, is {resolved.get(key)}" for key in changed)
        raise InputError(f"can't resume under other settings ({details}): repeat them, or run without --resume")
    if not (folder / CHECKPOINT_FILE).is_file():
        return None
    try:
        return load_training_state(folder / CHECKPOINT_FILE)
    except CheckpointError as error:
        raise InputError(f"can't resume: {error}; run without --resume") from None


def _open_log(path: Path, start: int) -> TextIO:
    """Open the log for appending after its first `start` lines, which are those of the checkpoint."""
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:start] if start and path.exists() else []
    path.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")
