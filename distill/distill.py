"""`boostdiff distill`: from a model and a configuration to a student's folder."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..engine import embedded
from ..engine.adapters import KOHYA_FILE
from ..engine.compiled import has_bfloat16, missing_compiler
from ..engine.errors import InputError
from ..engine.files import check_output, prepare_output
from ..engine.model import LARGE_PARAMETERS, ModelFiles, resolve_device
from ..engine.options import config_as_json, refuse_unused
from ..engine.prompts import read_prompts, truncation_note
from ..engine.student import INFO_FILE, StudentInfo, read_student
from ..engine.terminal import is_main_process
from ..engine.versions import is_installed, to_install
from .captioned_images import CaptionedImages
from .config import DistillConfig, RunConfig
from .counts import base_dtype, count_parameters, memory_needed
from .few_steps import FrozenStudent, Stage, adopted, adopted_in_words, check_stages, train_in_stages
from .images import ImageData
from .job import Job
from .loop import Observers, Run
from .negatives import NegativePrompts
from .objective import LOSS_WEIGHTS, NoiseSchedule, has_zero_terminal_snr
from .order import Share
from .preview import Preview
from .replay import Replay
from .run_folder import (
    CONFIG_FILE,
    PREVIEW_FILE,
    TRACKER,
    adapter_scale_of,
    at_work_in,
    begin,
    finished_run,
    identity,
    publish_student,
    refuse_loss_of_files,
    refuse_loss_of_inputs,
    rescale,
    resumable_state,
    work_folder,
    write_student,
)
from .source import Source
from .text_store import TextStore
from .trajectories import GridTrajectories, Trajectories

PREVIEW_ROWS = 6


def resolve(config: DistillConfig, files: ModelFiles, device: torch.device) -> DistillConfig:
    """The configuration with what was left out filled in for a model and a device."""
    return adopted(config).resolved(
        in_bfloat16=has_bfloat16(device),
        embedded=files.folder == embedded.MODEL_DIR,
        flow=files.flow,
        zero_terminal_snr=has_zero_terminal_snr(files.scheduler_config),
    )


def dry_run(files: ModelFiles, config: DistillConfig, execution: RunConfig, device: torch.device) -> dict[str, Any]:
    """The resolved configuration, and the parameters that would be trained, from configuration files and data alone.

    Raises:
        InputError: see `plan`, but that data may be left out; or the denoiser can't be made.
    """
    plan(files, config, execution, device, needs_data=False)
    counted = count_parameters(files, config)
    memory = memory_needed(files, config, execution, counted["trainable_parameters"], device)
    settings = config_as_json(config) | config_as_json(execution, "resume")
    return settings | counted | {"memory_bytes": memory}


def distill(
    files: ModelFiles,
    config: DistillConfig,
    execution: RunConfig | None = None,
    *,
    output: Path,
    device: str = "auto",
    observers: Observers | None = None,
) -> StudentInfo:
    """Train an adapter that makes one conditional pass predict what guided sampling predicts.

    The run works in `work_folder(output)`, which takes the name `output` only when all is there. Under
    `accelerate launch` every process calls this with the same arguments. What `config` leaves out is resolved.

    Returns:
        What `student.json` says.

    Raises:
        InputError: the model, the data or the output can't be used, or there is nothing to resume.
        BoostDiffError: the loss is no longer finite or diverges, or the run was asked to stop.
    """
    # Plan: all that can be refused, before the weights are read, which can take minutes.
    execution, observers, target = execution or RunConfig(), observers or Observers(), resolve_device(device)
    asked_scale, config = config.adapter_scale, resolve(config, files, target)
    prompts, images = plan(files, config, execution, target)
    prepare_output(output, replaces=INFO_FILE)
    refuse_loss_of_inputs(output, config, execution)
    if taken := adopted_in_words(config):
        observers.on_note(taken)
    zero_snr = has_zero_terminal_snr(files.scheduler_config)
    if config.loss_weight and zero_snr and not LOSS_WEIGHTS[config.loss_weight](torch.zeros(())):
        observers.on_note(
            f"--loss-weight {config.loss_weight} is 0 at this model's last timestep, where there is no signal: "
            "the first step of sampling is not trained"
        )
    job = Job(
        files=files,
        config=config,
        execution=execution,
        device=target,
        prompts=prompts,
        images=images,
        identity=identity(files, config, images),
        observers=observers,
    )
    if execution.resume and (ended := finished_run(output, job.identity)):
        return _resume_finished(job, ended, asked_scale, output)
    refuse_loss_of_files(output)
    folder, replaces = work_folder(output), (output / INFO_FILE).is_file()
    # All processes look before the main one gives the name: making the accelerator waits for all.
    trained = execution.resume and (folder / INFO_FILE).is_file()
    if not config.stages:
        info = _publish(job, output) if trained else _train(job, output)
    else:
        with at_work_in(folder):
            if execution.resume:
                resumable_state(folder, job.identity)
            else:
                begin(folder, job.identity, observers)
            info = train_in_stages(
                config,
                partial(_train_stage, job),
                folder=folder,
                output=output,
                finished=observers.on_start,
                before_publishing=partial(refuse_loss_of_files, output, finished=folder),
            )
    if replaces:
        observers.on_note(f"the student that was in {output} is replaced")
    return _resume_finished(job, info, asked_scale, output) if trained and not config.stages else info


def _resume_finished(job: Job, ended: StudentInfo, asked_scale: float | None, output: Path) -> StudentInfo:
    """What a run that has ended gives when it is resumed: its student, with another scale or file if asked for."""
    # A default that has changed since is no reason to touch a finished student.
    before, kohya = adapter_scale_of(ended), job.execution.format == "kohya"
    scale = before if asked_scale is None else asked_scale
    complete = scale == before and not (kohya and not (output / KOHYA_FILE).is_file())
    if complete or not is_main_process():
        job.observers.on_note(f"the run in {output} has ended: there is nothing left to resume")
        return ended
    what = f"{KOHYA_FILE} is added" if scale == before else f"its adapter is scaled by {scale:g}, not trained"
    job.observers.on_note(f"the run in {output} has ended: {what}")
    return rescale(ended, *job.load(job.device), scale, output, kohya=kohya)


def _publish(job: Job, output: Path) -> StudentInfo:
    """Give its name to a student that was trained to the end, but refused the name or killed before it.

    Raises:
        InputError: it was trained under other settings, or see `publish_student`.
    """
    folder, info = work_folder(output), None
    resumable_state(folder, job.identity)
    accelerator = job.accelerator(folder)
    if accelerator.is_main_process:
        with at_work_in(folder):
            info = read_student(folder)
            job.observers.on_start(job.config.updates)
            publish_student(folder, output)
    return _from_main_process(accelerator, info)


def _train_stage(job: Job, output: Path, stage: Stage | None) -> StudentInfo:
    """Train the student of a stage, or without one that of guidance; a resumed run goes on with one that was begun."""
    folder, follows = work_folder(output), stage is None or stage.steps != job.config.stages[-1]
    begun = job.execution.resume and (folder / CONFIG_FILE).is_file()
    job = replace(job, execution=replace(job.execution, resume=begun))
    if stage:
        job = replace(job, config=stage.config(job.config), identity=stage.identity(job.identity))
    if begun and (folder / INFO_FILE).is_file():
        return _publish(job, output)
    return _train(job, output, stage, follows=follows)


def _train(job: Job, output: Path, stage: Stage | None = None, *, follows: bool = False) -> StudentInfo:
    """Train one student, of guidance or of a stage: open the run folder, train, publish.

    Where another stage `follows`, a signal in the last update stops the run as in any other.
    """
    prepare_output(output, replaces=INFO_FILE)
    folder, execution, observers = work_folder(output), job.execution, job.observers
    # Likewise, before the main process may begin anew.
    state = resumable_state(folder, job.identity) if execution.resume else None
    accelerator = job.accelerator(folder)
    info = None
    # Held before the weights are read, which can take minutes.
    with at_work_in(folder) if accelerator.is_main_process else nullcontext():
        run, preview = _make_run(job, accelerator, folder, stage)
        if state is not None:
            run.restore(state)
        elif accelerator.is_main_process:
            begin(folder, job.identity, observers)
        accelerator.wait_for_everyone()
        if execution.log_with:
            settings = {key: value for key, value in job.identity.items() if value is not None}
            accelerator.init_trackers(TRACKER, settings)
        result = run.train(observers, preview.write)
        if accelerator.is_main_process:
            if job.config.adapter_scale is not None:
                run.adapter.scale(job.config.adapter_scale, job.config.guidance_max)
            info = write_student(run, identity=job.identity, result=result)
            publish_student(folder, output)
            # The last: nothing that goes wrong with a picture is worth a student.
            if observers.preview and _affordable(preview, result, job.device, observers, output):
                preview.write(output / PREVIEW_FILE)
    if run.stopped and follows:
        raise run.interrupted()
    return _from_main_process(accelerator, info)


def plan(
    files: ModelFiles, config: DistillConfig, execution: RunConfig, device: torch.device, *, needs_data: bool = True
) -> tuple[list[str], ImageData | None]:
    """Find the data, prompts or captioned images, and refuse what can't be trained; `config` is resolved.

    Raises:
        InputError: there is no data, or model, configuration and device don't go together.
    """
    if needs_data and config.prompts is None and config.images is None:
        raise InputError("there is nothing to train on: pass --prompts FILE or --images DIR")
    if config.images is None:
        refuse_unused(execution, "without --images", "max_bad_samples")
    if config.method != "lora":
        refuse_unused(execution, f"with --method {config.method}", "format")
    if files.family.denoiser != "unet":
        refuse_unused(execution, f"with a {files.family.name} model: diffusers converts UNets' LoRAs alone", "format")
    if config.images is not None or config.live_negative_prompt:
        what = "--images" if config.images is not None else "--negative-prompt live"
        refuse_unused(execution, f"with {what}, whose texts are not known before", "cache_text")
    if execution.cache_text is not None:
        check_output(execution.cache_text, option="--cache-text")
    if config.stages:
        check_stages(config, files, reads_weights=needs_data)
    if config.live_negative_prompt:
        refuse_unused(execution, "with --negative-prompt live, which other programs do not know", "format")
    if config.norms:
        refuse_unused(execution, "with --norms, which no LoRA file holds", "format")
    if config.guidance_conditioned:
        refuse_unused(execution, "with a range of --guidance, which other programs can't pass", "format")
    if execution.log_with and not is_installed(execution.log_with):
        raise InputError(f"{execution.log_with} is not installed: pip install {execution.log_with}")
    if config.precision == "fp16":
        if device.type == "cpu":
            raise InputError("--precision fp16 needs a GPU: choose bf16 or fp32")
        if files.denoiser_config.get("upcast_attention"):
            # Autocast takes back the upcast.
            raise InputError(f"the attention of {files.name} overflows in fp16: choose --precision bf16 or fp32")
    if config.base_precision is not None and not is_installed("torchao"):
        raise InputError(f"--base-precision needs torchao: {to_install('quantize')}")
    if execution.compile and (reason := missing_compiler(device)):
        raise InputError(f"--compile: {reason}")
    if config.images is None:
        return read_prompts(config.prompts) if config.prompts else [], None
    # What reads them is large, and a run on prompts does without.
    from .image_files import open_images

    return [], open_images(config.images)


def _make_run(job: Job, accelerator: Accelerator, folder: Path, stage: Stage | None) -> tuple[Run, Preview]:
    """The run's moving parts, with the weights read, and what draws its previews."""
    files, config, execution, observers = job.files, job.config, job.execution, job.observers
    prompts, images = job.prompts, job.images
    # Under a launcher each process has its accelerator.
    device = accelerator.device if accelerator.num_processes > 1 else job.device
    store, negative = None, config.fixed_negative_prompt
    # Prompts that stand far apart show more than the first few of a sorted list.
    shown = prompts[:: max(1, len(prompts) // PREVIEW_ROWS)][:PREVIEW_ROWS]
    if execution.cache_text is not None:
        store = TextStore(execution.cache_text, files, base_dtype(config, device))
        with accelerator.main_process_first():
            encoded = store.fill(prompts, [negative], device)
        observers.on_note(f"{encoded} texts encoded into {execution.cache_text}")
    model, adapter = job.load(device)
    frozen = FrozenStudent(model, adapter, stage, device) if stage else None
    schedule = frozen.schedule if frozen else NoiseSchedule.of(model.make_scheduler("ddim"), device)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    share = Share(batch_size=config.new_samples, rank=rank, world_size=world_size)
    common: dict[str, Any] = {
        "share": share,
        # Each stage draws prompts and noise of its own.
        "seed": config.seed + (stage.steps if stage else 0),
        "guidance": config.guidance_bounds,
        "negatives": NegativePrompts(model, negative, live=config.live_negative_prompt, store=store),
    }
    source: Source
    notes = [truncation_note(model.pipeline, [negative], "negative prompts")]
    if images is not None:
        source = CaptionedImages(
            model,
            images,
            schedule,
            max_bad_samples=execution.max_bad_samples,
            timesteps=frozen.timesteps if frozen else None,
            **common,
        )
        shown = source.stream.captions(PREVIEW_ROWS)
        notes += images.notes
    else:
        trajectories = partial(GridTrajectories, timesteps=frozen.timesteps) if frozen else Trajectories
        source = trajectories(model, prompts, schedule, store=store, **common)
        notes.append(truncation_note(model.pipeline, prompts))
    replay = Replay(share, uses=config.reuse, seed=config.seed)
    run = Run(accelerator, model, adapter, source, replay, schedule, config, execution, folder, frozen=frozen)
    run.notes = [note for note in notes if note]
    text = None if store is None else source.text(shown, [negative]).to(model.denoiser.dtype)
    return run, Preview(run, shown, text, note=observers.on_note)


def _affordable(
    preview: Preview, result: dict[str, Any], device: torch.device, observers: Observers, output: Path
) -> bool:
    """Whether the picture of a large model on a CPU takes less than half of the training's time; others always may."""
    # A training sample takes two passes of the teacher, and one forward and backward of the student.
    passes = preview.steps * len(preview.prompts) * (1 + 3 * len(preview.scales))
    seconds = passes / 5 / (result["images_per_second"] or math.inf)
    model = preview.run.model
    small = model.denoiser.num_parameters() < LARGE_PARAMETERS
    if small or device.type != "cpu" or seconds < max(60, result["seconds"] / 2):
        return True
    observers.on_note(
        f"no grid.png: drawing it would take {seconds / 60:.0f} minutes on this CPU; "
        f"`boostdiff generate PROMPT --model {model.files.name} --student {output}` draws an image"
    )
    return False


def _from_main_process(accelerator: Accelerator, info: StudentInfo | None) -> StudentInfo:
    """What the main process has made, in all of them; the end of what they do together."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        (info,) = broadcast_object_list([info])
    # Finishes the trackers and leaves the process group: a process that ends in one may abort at its exit.
    accelerator.end_training()
    assert info is not None
    return info
