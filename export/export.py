"""`boostdiff export`: one function from a student to a verified engine folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from ..engine.errors import BoostDiffError, InputError
from ..engine.families import is_live
from ..engine.files import prepare_output, read_json, staged_folder, write_json
from ..engine.manifest import MANIFEST_FILE, Manifest, read_manifest, verified_file
from ..engine.memory import give_back_memory
from ..engine.merge import TIMESTEPS, merge_in_place
from ..engine.model import Model, ModelFiles, keep_attention_in_fp32, load, resolve_device
from ..engine.sessions import OnnxSession
from ..engine.student import StudentInfo, read_student
from ..engine.trt import TensorRTSession, check_plan
from ..engine.versions import versions
from .config import ExportConfig
from .diffusers_folder import FOLDER, write_diffusers_folder
from .graph import FP16_TOLERANCE, FP32_TOLERANCE, compare, exact_float32, graph_signature, onnx_from_part
from .parts import Part, latent_sizes, text_encoder_part, unet_part, vae_decoder_part
from .plan import Flavour, choose_flavour, plan_from_onnx, plan_in_a_process
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
        output: the engine's folder, laid out as Optimum does: `unet`, `text_encoder` (SDXL: and `text_encoder_2`) and
            `vae_decoder`, each with `model.onnx` and, with plans, `model.plan`; tokenizers, scheduler,
            `model_index.json`; and `manifest.json`.
        device: where the reference runs; if it is a GPU, it is the one that plans are built for.
        force: export again even if nothing has changed.
        report: callback for each stage in words.

    Returns:
        The manifest.

    Raises:
        InputError: the student or the output can't be used.
        BoostDiffError: a stage failed, or a result is outside its tolerance; nothing was replaced.
    """
    config, target = config or ExportConfig(), resolve_device(device)
    with torch.cuda.device(target) if target.type == "cuda" else nullcontext():
        info = read_student(student, files)
        encoder, *others = files.family.text_encoders
        # Pipelines of two text encoders pass none of them a mask.
        if not others and read_json(files.folder / encoder / "config.json").get("use_attention_mask"):
            raise InputError(f"{encoder}/config.json says use_attention_mask, which exported text encoders don't take")
        if config.diffusers and (info.method == "soft-prompt" or info.live_negative_prompt):
            what = "a soft prompt" if info.method == "soft-prompt" else "attention to a live negative prompt"
            raise InputError(f"{what} is no part of stock weights: leave --diffusers out, the graphs carry it")
        flavour = choose_flavour(config.trt_flavour) if config.trt else None
        prepare_output(output, replaces=MANIFEST_FILE)
        manifest = _intended(files, info, config, flavour)
        if not force and (present := up_to_date_engine(output, manifest)):
            report(f"nothing has changed since the export in {output}")
            return present

        model = load(files, device=target, dtype=torch.float32)
        height, width = latent_sizes(model, config)[1]
        check = merge_in_place(model, student, info)
        report(
            f"merged {info.method}: differs from base + adapter by {check.relative:.1e} of the output's scale "
            f"(cosine {check.cosine:.7f}), from the base by {check.change:.2f}"
        )
        manifest.merge = {**asdict(check), "timesteps": list(TIMESTEPS)}
        model.unet.register_to_config(sample_size=height if height == width else (height, width))
        manifest.unet_config = {key: value for key, value in dict(model.unet.config).items() if not key.startswith("_")}
        with staged_folder(output, replaces=MANIFEST_FILE) as folder:
            write_configs_and_tokenizers(model, manifest, folder, diffusers=config.diffusers)
            precisions = config.precisions(model.unet.num_parameters())
            if flavour is not None:
                report(f"building with {flavour.name}: {flavour.reason}")
            reference = draw_reference(model, config, guidance=info.guidance)
            for part in _parts(model, config, precisions):
                _export_part(part, folder, manifest, precisions, report)
                if flavour is not None:
                    _export_plan(part, folder, manifest, flavour, report)
            compare_engine(folder, manifest, reference, precisions=precisions, device=target, report=report)
        return manifest


def _intended(files: ModelFiles, info: StudentInfo, config: ExportConfig, flavour: Flavour | None) -> Manifest:
    """The manifest as far as it is known before any work."""
    gpu = flavour is not None and flavour.name == "tensorrt"
    return Manifest(
        model=files.name,
        inputs={"unet": info.unet_sha256, "adapter": info.adapter_sha256, **files.other_sha256()},
        options=config.as_json() | {"flavour": flavour.name if flavour else None},
        student={
            "method": info.method,
            "guidance": info.guidance,
            "guidance_range": list(info.guidance_range) if info.guidance_range else None,
            "negative_prompt": info.negative_prompt,
            "live_negative_prompt": info.live_negative_prompt,
            "guider": info.guider,
            "guider_settings": info.guider_settings,
        },
        unet_config={},
        versions=versions("tensorrt", "tensorrt_rtx") if flavour else versions(),
        hardware={"gpu": torch.cuda.get_device_name()} if gpu else {},
    )


def up_to_date_engine(output: Path, intended: Manifest) -> Manifest | None:
    """The engine that stands in `output`, if it is whole and an export would only make it again."""
    try:
        standing = read_manifest(output)
        if standing.fingerprint() != intended.fingerprint():
            return None
        for name in standing.files:
            verified_file(output, standing, name)
    except InputError:
        return None
    return standing


def write_configs_and_tokenizers(model: Model, manifest: Manifest, folder: Path, *, diffusers: bool) -> None:
    """Everything that is no graph: configurations, tokenizers, scheduler, and on request a whole diffusers folder."""
    pipeline = model.pipeline
    index = read_json(model.files.folder / "model_index.json")
    absent = dict.fromkeys(index.keys() & {"safety_checker", "feature_extractor", "image_encoder"}, (None, None))
    write_json(folder / "model_index.json", index | absent)
    for name, tokenizer in zip(model.family.text_encoders, model.family.tokenizers, strict=True):
        getattr(pipeline, tokenizer).save_pretrained(folder / tokenizer)
        getattr(pipeline, name).config.save_pretrained(folder / name)
    if diffusers:
        for name in write_diffusers_folder(model, manifest.distilled, folder / FOLDER):
            manifest.artefacts[f"{FOLDER}/{name}"] = {"precision": "fp32"}
    configs = {"scheduler/scheduler_config": pipeline.scheduler, "vae_decoder/config": pipeline.vae}
    for name, component in (configs | {"unet/config": model.unet}).items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        # diffusers would add the path that the model was loaded from.
        write_json(path, {key: value for key, value in dict(component.config).items() if key != "_name_or_path"})


def _parts(model: Model, config: ExportConfig, precisions: tuple[str, ...]) -> list[Part]:
    """Every part with its cases' references. The model's references go: a part is freed once it is exported."""
    pipeline = model.pipeline
    encoded = model.family.encode(pipeline, CHECK_PROMPTS)
    text = encoded.joined() if is_live(model.unet.config) else encoded.conditional
    parts = [text_encoder_part(model, name, CHECK_PROMPTS, config) for name in model.family.text_encoders]
    parts += [vae_decoder_part(model, config), unet_part(model, model.unet, text, config, TIMESTEPS)]
    for part in parts:
        part.compute_references()
        if part.half and precisions == ("fp16",):
            part.to_half()
    for name in ("unet", "vae", *model.family.text_encoders):
        setattr(pipeline, name, None)
    # The largest last: by then the others are gone.
    return parts


def _export_part(
    part: Part, folder: Path, manifest: Manifest, precisions: tuple[str, ...], report: Callable[[str], None]
) -> None:
    (folder / part.name).mkdir(exist_ok=True)
    graphs: dict[str, Path] = {}
    for precision in precisions if part.half else ("fp32",):
        islands = False
        if precision == "fp16":
            part.to_half()
            islands = part.name == "unet" and keep_attention_in_fp32(part.module.unet)
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
        with OnnxSession(path, device=torch.device("cpu"), lean=part.large) as session:
            tolerance = FP16_TOLERANCE if precision == "fp16" else FP32_TOLERANCE
            check = compare(session, part.cases, what=part.name, tolerance=tolerance)
        give_back_memory()
        manifest.artefacts[f"{part.name}/{path.name}"]["check"] = check
        report(
            f"{part.name}: ONNX {precision.upper()} differs from torch by {check['relative']:.1e} of the output's scale"
        )


def _export_plan(part: Part, folder: Path, manifest: Manifest, flavour: Flavour, report: Callable[[str], None]) -> None:
    # The FP16 graph, where there are two.
    graph = [folder / name for name in manifest.artefacts if name.startswith(f"{part.name}/model.")][-1]
    plan = graph.with_name("model.plan")
    build = plan_in_a_process if part.large else plan_from_onnx
    entry = {
        "precision": manifest.artefacts[f"{part.name}/{graph.name}"]["precision"],
        **build(graph, plan, flavour=flavour, profile=part.profile),
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
            entry["check"] = compare(session, part.planned_cases(), what=part.name, tolerance=FP16_TOLERANCE)
        report(f"{size}, differs from torch by {entry['check']['relative']:.1e} of the output's scale")
