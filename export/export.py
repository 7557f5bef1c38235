"""`boostdiff export`: one function from a student to a verified engine folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from ..engine.errors import BoostDiffError, InputError
from ..engine.files import prepare_output, staged_folder
from ..engine.manifest import Manifest
from ..engine.model import ModelFiles, load, resolve_device
from ..engine.runners import OnnxRunner, TensorRTRunner, check_plan
from ..engine.student import read_student
from ..engine.versions import versions
from .graph import FP16_TOLERANCE, FP32_TOLERANCE, TRACE_BATCH, compare, graph_signature, onnx_from_unet
from .merge import TIMESTEPS, merge, prove_merge
from .plan import choose_flavour, plan_from_onnx

BATCHES = (1, 4, 16)
"""Smallest, best and largest batch of a plan's profile. A batched-CFG teacher at batch 8 needs 16."""

CHECK_PROMPTS = ("a photo of a red apple on a table", "noto emoji of octopus on a light blue background")


def export(
    files: ModelFiles,
    *,
    student: Path,
    output: Path,
    trt: bool = False,
    diffusers: bool = False,
    device: str = "auto",
    report: Callable[[str], None] = lambda message: None,
) -> Manifest:
    """Merge, export, compare, and only then give the folder its name.

    Args:
        files: the model.
        student: what `distill` wrote.
        output: the engine's folder: `unet/model.onnx`, with `trt` also `unet/model.fp16.onnx` and
            `unet/model.plan`, and `manifest.json`.
        trt: build a TensorRT plan.
        diffusers: also write the merged UNet as diffusers loads it, `unet/config.json` and safetensors.
        device: where the reference runs.
        report: told of each stage in words.

    Returns:
        The manifest.

    Raises:
        InputError: the student or the output can't be used.
        BoostDiffError: a stage failed, or a result is outside its tolerance; nothing was replaced.
    """
    info = read_student(student, files)
    if diffusers and info.method == "soft-prompt":
        raise InputError("a soft prompt is no part of the weights: leave --diffusers out, graphs carry its tokens")
    flavour = choose_flavour() if trt else None
    prepare_output(output)
    target = resolve_device(device)
    model = load(files, device=target, dtype=torch.float32)
    merged = merge(model, student, info)
    text = model.family.encode(model.pipeline, CHECK_PROMPTS).conditional
    inputs = model.family.example_inputs(model.pipeline, batch=TRACE_BATCH)
    proof = prove_merge(model, student, merged, info)
    report(
        f"merged {info.method}: differs from base + adapter by {proof.relative:.1e} of the output's scale "
        f"(cosine {proof.cosine:.7f}), from the base by {proof.change:.2f}"
    )
    manifest = Manifest(
        model=files.name,
        inputs={"unet": info.unet_sha256, "adapter": info.adapter_sha256},
        student={
            "method": info.method,
            "guidance": info.guidance,
            "guidance_range": info.guidance_range,
            "negative_prompt": info.negative_prompt,
        },
        unet_config={key: value for key, value in dict(merged.config).items() if not key.startswith("_")},
        merge={**asdict(proof), "timesteps": list(TIMESTEPS)},
        versions=versions("tensorrt", "tensorrt_rtx") if trt else versions(),
    )
    # Large models are compared at the batches that a small machine can afford.
    batches = (1, 2, 8) if sum(p.numel() for p in merged.parameters()) < 100e6 else (1, 2)
    check_against = partial(compare, reference=merged, inputs=inputs, text=text, batches=batches, timesteps=TIMESTEPS)

    with staged_folder(output) as folder:
        (folder / "unet").mkdir()
        if diffusers:
            merged.save_pretrained(folder / "unet", safe_serialization=True)
            manifest.artefacts["unet/diffusion_pytorch_model.safetensors"] = {"precision": "fp32"}
        graph = folder / "unet" / "model.onnx"
        onnx_from_unet(merged, inputs, graph)
        with OnnxRunner(graph, unet_config=manifest.unet_config, device=torch.device("cpu")) as runner:
            check = check_against(runner, tolerance=FP32_TOLERANCE)
        manifest.artefacts["unet/model.onnx"] = {
            "precision": "fp32",
            "check": check,
            **graph_signature(graph),
        }
        report(f"ONNX FP32: differs from torch by {check['relative']:.1e} of the output's scale")

        if flavour is not None:
            half = folder / "unet" / "model.fp16.onnx"
            half_inputs = {k: v.half() if v.is_floating_point() else v for k, v in inputs.items()}
            onnx_from_unet(copy.deepcopy(merged).half(), half_inputs, half)
            with OnnxRunner(half, unet_config=manifest.unet_config, device=torch.device("cpu")) as runner:
                check = check_against(runner, tolerance=FP16_TOLERANCE)
            manifest.artefacts["unet/model.fp16.onnx"] = {
                "precision": "fp16",
                "check": check,
                **graph_signature(half),
            }
            report(f"ONNX FP16: differs from torch by {check['relative']:.1e} of the output's scale")
            report(f"building with {flavour.name}: {flavour.reason}")
            plan = folder / "unet" / "model.plan"
            shapes = {name: tuple(tensor.shape[1:]) for name, tensor in inputs.items()}
            entry = plan_from_onnx(half, plan, flavour=flavour, shapes=shapes, batches=BATCHES)
            manifest.artefacts["unet/model.plan"] = entry
            try:
                check_plan(entry)
            except BoostDiffError as reason:
                entry["check"] = f"built, not run: {reason}"
                report(f"plan: {plan.stat().st_size / 1e6:.1f} MB, built, not run ({reason})")
            else:
                with TensorRTRunner(plan, artefact=entry, unet_config=manifest.unet_config) as runner:
                    entry["check"] = check_against(runner, tolerance=FP16_TOLERANCE)
                report(f"plan: differs from torch by {entry['check']['relative']:.1e} of the output's scale")
        manifest.write(folder)
    return manifest
