"""The manifest of an exported engine, and the checks that stand between a plan and its execution.

A TensorRT plan is executable code: nothing in an engine folder is opened unless its hash is in the manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import hash_of, read_json, sha256_of, write_json
from .student import Distilled, StudentInfo

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 4
ENGINE_MARKERS = (MANIFEST_FILE, "model_index.json")
"""Both are in every engine; other programs have a `manifest.json`, too."""

CARD = "diffusers/README.md"
"""The model card of the folder for stock diffusers."""


@dataclass(kw_only=True)
class Manifest:
    """What an export wrote, from what, and how it was checked.

    Attributes:
        version: version of this format.
        model: name that the user gave the model.
        inputs: SHA-256 by name of what went in ("denoiser", "adapter", "text_encoder", …).
        options: options of the export that change what is written.
        files: SHA-256 by path relative to the engine folder of what came out.
        student: method and guidance of the student.
        denoiser: name of the denoiser's folder, "unet" or "transformer".
        denoiser_config: its configuration, for whoever runs the graph.
        merge: comparison of the merged denoiser with base + adapter.
        pipeline: comparison of whole images with torch, by runner and precision.
        artefacts: by path: precision, inputs, outputs, checks; for plans also flavour, version, compute
            capabilities and profiles.
        versions: versions of boostdiff and the libraries that matter.
        hardware: the GPU that plans were built on, if any.
    """

    version: int = MANIFEST_VERSION
    model: str
    inputs: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    student: dict[str, Any]
    denoiser: str = "unet"
    denoiser_config: dict[str, Any]
    merge: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, dict[str, Any]] = field(default_factory=dict)
    artefacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> str:
        """Path of the denoiser's plan, where there is one."""
        return f"{self.denoiser}/model.plan"

    @property
    def distilled(self) -> Distilled:
        """The student's conditions."""
        return Distilled(**self.student)

    def configurations(self) -> list[str]:
        """The files that are neither graphs nor plans: what stands around them, down to the tokenizers' words.

        Without the folder for stock diffusers, which people move and whose card they edit.
        """
        around = [name for name in self.files if not name.startswith("diffusers/")]
        return [name for name in around if not any(name == a or name.startswith(f"{a}.") for a in self.artefacts)]

    def users_files(self, folder: Path) -> list[str]:
        """Files that an export did not write, or that are there to be edited, and were: a new one would remove them."""
        found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        names = {path.relative_to(folder).as_posix() for path in found} - {MANIFEST_FILE, *self.unknown_files(folder)}
        edited = {name for name in names & {CARD} if sha256_of(folder / name) != self.files.get(name)}
        return sorted(names - self.files.keys() | edited)

    def unknown_files(self, folder: Path) -> list[str]:
        """Files beside the tokenizers' that an export did not write, and that would be read with them."""
        found = [path for path in folder.glob("tokenizer*/**/*") if path.is_file() and not path.name.startswith(".")]
        return sorted({path.relative_to(folder).as_posix() for path in found} - self.files.keys())

    def check_student(self, student: StudentInfo, *, engine: Path) -> None:
        """Refuse another student than the one that was exported into the folder `engine`.

        Raises:
            InputError: the engine is another student's.
        """
        if (self.inputs.get("adapter"), self.inputs.get("denoiser")) != (
            student.adapter_sha256,
            student.denoiser_sha256,
        ):
            raise InputError(f"the engine in {engine} was exported from another student: run `boostdiff export` again")

    def fingerprint(self) -> dict[str, Any]:
        """What decides about an export's result: if it is the same, so is the result."""
        names = ("version", "inputs", "options", "student", "versions", "hardware")
        return {name: getattr(self, name) for name in names}

    def write(self, folder: Path) -> None:
        """Hash every file in the folder and write `manifest.json` last."""
        self.files = {
            path.relative_to(folder).as_posix(): sha256_of(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST_FILE
        }
        self.save(folder)

    def save(self, folder: Path) -> None:
        """Write `manifest.json` alone, of the files that were hashed."""
        values = asdict(self)
        write_json(folder / MANIFEST_FILE, values | {"sha256": hash_of(values)})


def read_manifest(folder: Path) -> Manifest:
    """Read an engine folder's manifest.

    Raises:
        InputError: there is no engine, or its manifest is unreadable, damaged or of another version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(f"there is no engine in {folder}: run `boostdiff export` first, or pass --engine DIR")
    values = read_json(path)
    names = {item.name for item in fields(Manifest)}
    if values.get("version") != MANIFEST_VERSION or not names <= set(values):
        raise InputError(f"{path} is not a manifest of this version of boostdiff: export again")
    if hash_of({name: value for name, value in values.items() if name != "sha256"}) != values.get("sha256"):
        raise InputError(f"{path} is damaged (its own SHA-256 differs): export again")
    return Manifest(**{name: values[name] for name in names})


def verified_file(folder: Path, manifest: Manifest, name: str) -> Path:
    """The path of an exported file, such as "unet/model.onnx", once it and its external data match their manifest.

    Raises:
        InputError: a file is not listed, is missing, or was changed.
    """
    if name not in manifest.files:
        raise InputError(f"the engine in {folder} has no {name}: export it first")
    parts = [name, *(other for other in manifest.files if other.startswith(f"{name}."))]
    for part in parts:
        path = folder / part
        if not path.is_file():
            raise InputError(f"the engine in {folder} is incomplete: {part} is missing; export again")
        if sha256_of(path) != manifest.files[part]:
            raise InputError(f"{path} does not match its manifest (SHA-256 differs): export again")
    return folder / name


def verify_configurations(folder: Path, manifest: Manifest) -> None:
    """Check what an engine's parts are put together by; raises as `verified_file`."""
    for name in manifest.configurations():
        verified_file(folder, manifest, name)
