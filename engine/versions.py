"""What is here: libraries and CPUs; and which versions made a file."""

import os
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from .. import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "onnx", "onnxruntime", "polygraphy")


def versions(*more: str) -> dict[str, str]:
    """Versions of boostdiff and of the installed libraries that matter, by the names that they are imported under.

    `more` are names besides `LIBRARIES`.
    """
    found = {name: _version(name) for name in (*LIBRARIES, *more)}
    return {"boostdiff": __version__} | {name: known for name, known in found.items() if known}


def to_install(*extras: str) -> str:
    """How to install one of some extras of `pyproject.toml`: no package index has this package."""
    commands = (f"pip install -e '.[{extra}]'" for extra in extras)
    return f"{' or '.join(commands)} in BoostDiff's source folder"


def is_installed(module: str) -> bool:
    """Whether a module can be imported; a folder of its name, such as Ray's own in /tmp, is none."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def usable_cpus() -> int:
    """CPUs that this process may use; on macOS and Windows, where none is bound to CPUs, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # onnxruntime-gpu, tensorrt-rtx-cu13, …; the list takes a second to make, as it reads all that is installed.
        packages = packages_distributions().get(name)
        return version(packages[0]) if packages else None


def source_commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """The commit that runs, with "-dirty" behind it where files were changed; None outside a clone, or without git."""
    git = shutil.which("git")
    # An installed package may lie in the repository of somebody else.
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)  # noqa: S603
    return found.stdout.strip() or None
