"""`boostdiff export`: one function from a student to a verified engine folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch

from ..engine.conditions import is_live
from ..engine.errors import BoostDiffError, InputError
from ..engine.files import hash_of, prepare_output, read_json, staged_folder, write_json
from ..engine.manifest import CARD, ENGINE_MARKERS, Manifest, read_manifest, verified_file
from ..engine.memory import give_back_memory
from ..engine.merge import CHECK_TIMESTEPS, merge_and_check
from ..engine.model import Model, ModelFiles, keep_attention_in_fp32, load, resolve_device
from ..engine.options import config_as_json
from ..engine.runners import TorchRunner
from ..engine.sessions import OnnxSession
from ..engine.student import Distilled, StudentInfo, check_model, read_student
from ..engine.trt import TensorRTSession, check_plan
from ..engine.versions import versions
from .calibration import Calibration, calibration_prompts
from .config import ExportConfig
from .diffusers_folder import FOLDER, write_diffusers_folder
from .eight_bits import SCHEMES
from .graph import (
    FP8_TOLERANCE,
    FP16_TOLERANCE,
    FP32_TOLERANCE,
    compare,
    exact_float32,
    graph_signature,
    onnx_from_part,
)
from .parts import Part, denoiser_part, latent_sizes, text_encoder_part, vae_decoder_part
from .plan import Backend, choose_backend, plan_from_onnx, plan_in_a_process
from .quantize import quantize_unet
from .sensitivity import layer_errors, recorded_ranges
from .whole import PROMPT, compare_engine, draw_reference

CHECK_PROMPTS = (PROMPT, "noto emoji of octopus on a light blue background")


@exact_float32()
def export(
    files: ModelFiles,
    config: ExportConfig | None = None,
    *,
    student: Path,
    output: Path,
    device: str = "auto",
    force: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Merge, export, compare, and only then give the folder its name.

    Args:
        files: the model.
        config: precisions, shapes and plans.
        student: folder that `distill` wrote.
        output: the engine's folder, laid out as Optimum does: `unet` (or `transformer`), `text_encoder` (SDXL:
            and `text_encoder_2`) and `vae_decoder`, each with `model.onnx` and, with plans, `model.plan`; tokenizers,
            scheduler, `model_index.json`; and `manifest.json`.
        device: where the reference runs; if it is a GPU, it is the one that plans are built for.
        force: export again even if nothing has changed.
        report: callback for each stage in words.

    Returns:
        The manifest.

    Raises:
        InputError: the student or the output can't be used; what a user puts there meanwhile stays, and the new engine
            is kept beside it.
        BoostDiffError: a stage failed, or a result is outside its tolerance; nothing was replaced.
    """
    config, target = config or ExportConfig(), resolve_device(device)
    with torch.cuda.device(target) if target.type == "cuda" else nullcontext():
        info = read_student(student)
        encoder, *others = files.family.exported_text_encoders or ("",)
        # Pipelines of two text encoders pass none of them a mask.
        if encoder and not others and read_json(files.folder / encoder / "config.json").get("use_attention_mask"):
            raise InputError(f"{encoder}/config.json says use_attention_mask, which exported text encoders don't take")
        if config.diffusers and (info.method == "soft-prompt" or info.live_negative_prompt):
            what = "a soft prompt" if info.method == "soft-prompt" else "attention to a live negative prompt"
            raise InputError(f"{what} is no part of stock weights: leave --diffusers out, the graphs carry it")
        if config.quantize and files.family.denoiser != "unet":
            raise InputError(f"--quantize is for UNets, not for a {files.family.name} model")
        if config.quantize and info.guidance_range:
            raise InputError("8 bits are judged at one guidance scale, and this student takes a range: no --quantize")
        for side in config.size or ():
            files.family.check_size(
                (side, side), files.denoiser_config, files.vae_config, options="sizes of --size", exported=True
            )
        prompts = calibration_prompts(config, files)
        backend = choose_backend(config.trt_flavour, fp8=config.quantize == "fp8") if config.trt else None
        prepare_output(output, replaces=ENGINE_MARKERS)
        check_model(info, student, files)
        manifest = _intended(files, info, config, backend)
        if prompts:
            manifest.inputs["calibration_prompts"] = hash_of(prompts)
        if not force and (present := up_to_date_engine(output, manifest)):
            if present.model != manifest.model:
                # Moved: what an engine does not hold is read from there.
                present.model = manifest.model
                present.save(output)
            report(f"nothing has changed since the export in {output}")
            return present
        refuse_loss(output)

        report(f"reading the weights of {files.name}")
        model = load(files, device=target, dtype=torch.float32)
        height, width = latent_sizes(model, config)[1]
        model.denoiser.register_to_config(sample_size=height if height == width else (height, width))
        calibration = None
        if prompts:
            report("8 bits: drawing the teacher's trajectories, which they are judged at")
            calibration = Calibration.of_teacher(model, prompts, info)
        check = merge_and_check(model, student, info)
        report(
            f"merged {info.method}: differs from base + adapter by {check.relative:.1e} of the output's scale "
            f"(cosine {check.cosine:.7f}), from the base by {check.change:.2f}"
        )
        manifest.merge = {**asdict(check), "timesteps": list(CHECK_TIMESTEPS)}
        manifest.denoiser_config = {
            key: value for key, value in dict(model.denoiser.config).items() if not key.startswith("_")
        }
        errors: dict[str, torch.Tensor] = {}
        if calibration and config.quantize:
            report("8 bits: drawing the student's trajectories, which they are calibrated on")
            with recorded_ranges(model.denoiser) as ranges:
                calibration.add_states(model, info.denoiser, info.choose_negative_prompt(None), info.steps)
            report("8 bits: measuring what each layer costs")
            denoiser = info.denoiser(TorchRunner(model.denoiser))
            errors = layer_errors(model.denoiser, denoiser, calibration, ranges, SCHEMES[config.quantize])
        with staged_folder(output, replaces=ENGINE_MARKERS, before_publishing=partial(refuse_loss, output)) as folder:
            write_configs_and_tokenizers(model, manifest, folder, diffusers=config.diffusers)
            precisions = config.precisions(model.denoiser.num_parameters())
            if backend is not None:
                report(f"building with {backend.name}: {backend.reason}")
            reference = draw_reference(model, config, info)
            for part in _parts(model, config, precisions):
                graphs = _export_part(part, folder, manifest, precisions, report)
                if calibration and config.quantize and part.name == manifest.denoiser:
                    _quantize(graphs, manifest, calibration, errors, config.quantize, report, large=part.large)
                    precisions += (config.quantize,)
                if backend is not None:
                    _export_plan(part, graphs, manifest, backend, report)
            compare_engine(folder, manifest, reference, precisions=precisions, device=target, report=report)
        return manifest


def _intended(files: ModelFiles, info: StudentInfo, config: ExportConfig, backend: Backend | None) -> Manifest:
    """The manifest as far as it is known before any work."""
    gpu = backend is not None and backend.name == "tensorrt"
    return Manifest(
        # A folder's path holds from other folders, too.
        model=str(files.folder.resolve()) if Path(files.name).is_dir() else files.name,
        inputs={"denoiser": info.denoiser_sha256, "adapter": info.adapter_sha256, **files.other_sha256()},
        # The content of the calibration prompts is among the inputs.
        options=config_as_json(config, "calibration_prompts") | {"flavour": backend.name if backend else None},
        student={field.name: getattr(info, field.name) for field in fields(Distilled)}
        | {"guidance_range": list(info.guidance_range) if info.guidance_range else None},
        denoiser=files.family.denoiser,
        denoiser_config={},
        versions=versions("tensorrt", "tensorrt_rtx") if backend else versions(),
        hardware={"gpu": torch.cuda.get_device_name()} if gpu else {},
    )


def up_to_date_engine(output: Path, intended: Manifest) -> Manifest | None:
    """The engine that stands in `output`, if it is whole and an export would only make it again."""
    try:
        standing = read_manifest(output)
        if standing.fingerprint() != intended.fingerprint():
            return None
        for name in standing.files:
            # It is there to be edited.
            if name != CARD:
                verified_file(output, standing, name)
    except InputError:
        return None
    return None if standing.unknown_files(output) else standing


def refuse_loss(output: Path) -> None:
    """Refuse to replace an engine together with what a user has put into its folder.

    Raises:
        InputError: there are such files.
    """
    try:
        found = read_manifest(output).users_files(output)
    except InputError:
        return
    if found:
        raise InputError(
            f"{output / found[0]} was written or edited by another than `boostdiff export`, which would remove it: "
            "move it, or choose another --output"
        )


def write_configs_and_tokenizers(model: Model, manifest: Manifest, folder: Path, *, diffusers: bool) -> None:
    """Everything that is no graph: configurations, tokenizers, scheduler, and on request a whole diffusers folder."""
    pipeline = model.pipeline
    index = read_json(model.files.folder / "model_index.json")
    absent = dict.fromkeys(index.keys() & {"safety_checker", "feature_extractor", "image_encoder"}, (None, None))
    write_json(folder / "model_index.json", index | absent)
    for name in model.family.exported_text_encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        getattr(pipeline, tokenizer).save_pretrained(folder / tokenizer)
        getattr(pipeline, name).config.save_pretrained(folder / name)
    denoiser = model.family.denoiser
    if diffusers:
        for name in write_diffusers_folder(model, manifest.distilled, folder / FOLDER):
            manifest.artefacts[f"{FOLDER}/{name}"] = {"precision": "fp32"}
    configs = {"scheduler/scheduler_config": pipeline.scheduler, "vae_decoder/config": pipeline.vae}
    for name, component in (configs | {f"{denoiser}/config": model.denoiser}).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        # diffusers would add the path that the model was loaded from.
        write_json(path, {key: value for key, value in dict(component.config).items() if key != "_name_or_path"})


def _parts(model: Model, config: ExportConfig, precisions: tuple[str, ...]) -> list[Part]:
    """Every part with its cases' references. The model's references go: a part is freed once it is exported."""
    pipeline = model.pipeline
    encoded = model.family.encode(pipeline, CHECK_PROMPTS)
    text = encoded.joined() if is_live(model.denoiser.config) else encoded.conditional
    parts = [text_encoder_part(model, name, CHECK_PROMPTS, config) for name in model.family.exported_text_encoders]
    parts += [vae_decoder_part(model, config), denoiser_part(model, model.denoiser, text, config, CHECK_TIMESTEPS)]
    for part in parts:
        part.compute_references()
        if part.half and precisions == ("fp16",):
            part.to_half()
    for name in (model.family.denoiser, "vae", *model.family.text_encoders):
        setattr(pipeline, name, None)
    # The largest last: by then the others are gone.
    return parts


def _export_part(
    part: Part, folder: Path, manifest: Manifest, precisions: tuple[str, ...], report: Callable[[str], None]
) -> dict[str, Path]:
    """Write the part's graphs, in the precisions that it may have, and compare them; gives them by precision."""
    (folder / part.name).mkdir(exist_ok=True)
    graphs: dict[str, Path] = {}
    for precision in precisions if part.half else ("fp32",):
        islands = False
        if precision == "fp16":
            part.to_half()
            islands = part.name == manifest.denoiser and keep_attention_in_fp32(part.module.denoiser)
        graphs[precision] = folder / part.name / ("model.fp16.onnx" if graphs else "model.onnx")
        onnx_from_part(part, graphs[precision])
        manifest.artefacts[f"{part.name}/{graphs[precision].name}"] = {
            "precision": precision,
            "fp32_islands": ["attention scores"] if islands else [],
            **graph_signature(graphs[precision]),
        }
    # Sessions and builders of large models need the memory.
    part.release()
    for precision, path in graphs.items():
        with OnnxSession(path, device=torch.device("cpu"), low_memory=part.large) as session:
            tolerance = FP16_TOLERANCE if precision == "fp16" else FP32_TOLERANCE
            check = compare(session, part.cases, what=part.name, tolerance=tolerance)
        give_back_memory()
        manifest.artefacts[f"{part.name}/{path.name}"]["check"] = check
        report(
            f"{part.name}: ONNX {precision.upper()} differs from torch by {check['relative']:.1e} of the output's scale"
        )
    return graphs


def _quantize(
    graphs: dict[str, Path],
    manifest: Manifest,
    calibration: Calibration,
    errors: Mapping[str, torch.Tensor],
    precision: str,
    report: Callable[[str], None],
    *,
    large: bool,
) -> None:
    scheme = SCHEMES[precision]
    report(f"8 bits: making the {precision.upper()} graph, and judging it")
    entry = quantize_unet(graphs[scheme.source], manifest, calibration, errors, large=large, scheme=scheme)
    graphs[precision] = graphs[scheme.source].with_name(f"model.{precision}.onnx")
    manifest.artefacts[f"unet/model.{precision}.onnx"] = entry
    check, left = entry["check"], len(entry["kept"])
    report(
        f"unet: ONNX {precision.upper()} takes the guidance term's R² from {check['r2_before']:.3f} to "
        f"{check['r2']:.3f}; {left} of {left + len(entry['quantized'])} layers stay in {scheme.source.upper()}"
    )


def _export_plan(
    part: Part, graphs: dict[str, Path], manifest: Manifest, backend: Backend, report: Callable[[str], None]
) -> None:
    precision = next(precision for precision in ("fp8", "fp16", "fp32") if precision in graphs)
    plan = graphs[precision].with_name("model.plan")
    build = plan_in_a_process if part.large else plan_from_onnx
    entry = {
        "precision": precision,
        **build(graphs[precision], plan, backend=backend, profile=part.profile, fp8=precision == "fp8"),
    }
    manifest.artefacts[f"{part.name}/{plan.name}"] = entry
    size = f"{part.name}: plan of {plan.stat().st_size / 1e6:.1f} MB"
    try:
        check_plan(entry)
    except BoostDiffError as reason:
        entry["check"] = f"built, not run: {reason}"
        report(f"{size}, built, not run ({reason})")
    else:
        with TensorRTSession(plan, artefact=entry) as session:
            tolerance = FP8_TOLERANCE if precision == "fp8" else FP16_TOLERANCE
            entry["check"] = compare(session, part.planned_cases(), what=part.name, tolerance=tolerance)
        report(f"{size}, differs from torch by {entry['check']['relative']:.1e} of the output's scale")
