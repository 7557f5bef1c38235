"""A trained student on disk: its description, and putting it onto the model that it was trained for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .adapters import METHODS, Adapter
from .errors import InputError, one_line
from .files import hash_of, read_json, sha256_of, write_json
from .guidance import SinglePassDenoiser
from .guidance_input import GuidanceConditioned
from .guiders import Guider, GuiderOptions, check_guider
from .live_negative import LiveNegative
from .model import ModelFiles
from .norms import NORMS_FILE, Norms
from .options import SAMPLER, STEPS
from .schedulers import SAMPLERS, SPACINGS

INFO_FILE = "student.json"

TEACHER_ADVICE = "draw with `boostdiff generate --teacher`"
"""What gives all that a student was not distilled for, named with its command: others have no such option."""

MISFITS = (SafetensorError, RuntimeError, ValueError, KeyError)
"""What loading another model's adapter raises."""


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a student was distilled for, and so can be asked for; engines keep it in their manifest.

    Attributes:
        method: a key of `adapters.METHODS`.
        guidance: guidance scale w that was distilled in; for a range its middle.
        guidance_range: smallest and largest w of a guidance-conditioned student, else None.
        negative_prompt: negative prompt that was distilled in, or "".
        live_negative_prompt: whether the student takes any negative prompt, at each image.
        guider: the teacher's, a key of `guiders.GUIDERS`.
        guider_settings: its settings.
        sampler: the only sampler of a few-step student, else None, as for `steps` and `timestep_spacing`.
        steps: the only number of sampling steps.
        timestep_spacing: spacing of these steps' timesteps, whatever the model's scheduler says.
    """

    method: str
    guidance: float
    guidance_range: tuple[float, float] | None = None
    negative_prompt: str = ""
    live_negative_prompt: bool = False
    guider: str = "cfg"
    guider_settings: dict[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    steps: int | None = None
    timestep_spacing: str | None = None

    def denoiser(self, runner: Any, guidance: float | None = None) -> SinglePassDenoiser:
        """The student's single pass on a runner.

        Raises:
            InputError: see `choose_guidance`.
        """
        scale = self.choose_guidance(guidance)
        return SinglePassDenoiser(runner, scale, live_negative_prompt=self.live_negative_prompt)

    @property
    def teacher_guider(self) -> Guider:
        """The teacher's guider."""
        return Guider(name=self.guider, settings=self.guider_settings)

    def choose_guidance(self, guidance: float | None) -> float | None:
        """The guidance input: of a guidance-conditioned student the scale asked for or its default, else None.

        Raises:
            InputError: the student was not distilled for it.
        """
        if self.guidance_range is None:
            if guidance not in (None, self.guidance):
                raise InputError(
                    f"this student was distilled at guidance {self.guidance:g} and can't give {guidance:g}: "
                    f"leave --guidance out, distill another, or {TEACHER_ADVICE}"
                )
            return None
        low, high = self.guidance_range
        scale = self.guidance if guidance is None else guidance
        if not low <= scale <= high:
            raise InputError(
                f"this student was distilled for guidance {low:g} to {high:g} and can't give {scale:g}: "
                f"choose one in between, distill another, or {TEACHER_ADVICE}"
            )
        return scale

    def choose_negative_prompt(self, negative_prompt: str | None) -> str | None:
        """What is to be encoded beside the prompts: None where the student takes no negative prompt.

        Raises:
            InputError: the student was not distilled with it.
        """
        if self.live_negative_prompt:
            return negative_prompt or ""
        if negative_prompt not in (None, self.negative_prompt):
            trained = f"the negative prompt {self.negative_prompt!r}" if self.negative_prompt else "no negative prompt"
            raise InputError(
                f"this student was distilled with {trained}, and one pass can't follow another: "
                f"leave --negative-prompt out, distill with it or with --negative-prompt live, or {TEACHER_ADVICE}"
            )
        return None

    def choose_sampling(self, sampler: str | None, steps: int | None) -> tuple[Any, int]:
        """Sampler and steps: what was asked for, else a few-step student's own, else the defaults.

        Raises:
            InputError: a few-step student is asked for others.
        """
        if self.steps is None:
            return sampler or SAMPLER, STEPS if steps is None else steps
        if sampler not in (None, self.sampler) or steps not in (None, self.steps):
            asked = f"{steps or self.steps} steps of {sampler or self.sampler}"
            raise InputError(
                f"this few-step student was distilled for {self.steps} steps of {self.sampler} and can't make {asked}: "
                f"leave --steps and --sampler out, distill another, or {TEACHER_ADVICE}"
            )
        return self.sampler, self.steps

    def choose_spacing(self, spacing: str | None) -> str | None:
        """Timestep spacing: what was asked for, else a few-step student's own; None is the model's.

        Raises:
            InputError: a few-step student is asked for another.
        """
        if self.steps is not None and spacing not in (None, self.timestep_spacing):
            raise InputError(
                f"this few-step student was distilled for {self.timestep_spacing} timesteps: "
                f"leave --timestep-spacing out, distill another, or {TEACHER_ADVICE}"
            )
        return spacing or self.timestep_spacing

    def check_guider(self, options: GuiderOptions) -> None:
        """Refuse a guider, or a setting of it, that the student was not distilled with; what is left out is its own.

        Raises:
            InputError: it is another.
        """
        asked = {name: value for name in options.guider_settings if (value := getattr(options, name)) is not None}
        if options.guider not in (None, self.guider) or not asked.items() <= self.guider_settings.items():
            raise InputError(
                f"this student was distilled with the guider {self.teacher_guider}, and one pass can't follow another: "
                f"leave --guider out, distill with it, or {TEACHER_ADVICE}"
            )


@dataclass(frozen=True, kw_only=True)
class StudentInfo(Distilled):
    """What `student.json` records.

    Attributes:
        model: name that the user gave the model.
        denoiser_sha256: hash of the denoiser weights that the adapter belongs to.
        adapter_files: SHA-256 by file name.
        trainable_parameters: their number.
        settings: the resolved training configuration.
        versions: versions of boostdiff and the libraries that matter.
        result: measurements of the training (updates, seconds, losses, R² of the guidance term).
    """

    model: str
    denoiser_sha256: str
    adapter_files: dict[str, str]
    trainable_parameters: int
    settings: dict[str, Any]
    versions: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter_sha256(self) -> str:
        """One hash for all of the adapter's files."""
        return "-".join(self.adapter_files[name] for name in sorted(self.adapter_files))

    def write(self, folder: Path) -> None:
        """Write `student.json`, with a hash of its own content by which a changed one is known."""
        values = asdict(self)
        write_json(folder / INFO_FILE, values | {"sha256": hash_of(values)})


def _usable(values: dict[str, Any]) -> bool:
    """Whether the values of a `student.json` that are relied upon are of their types: its hash is no proof of it."""

    def scale(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < math.inf

    scales, files, settings = values["guidance_range"], values["adapter_files"], values["guider_settings"]
    sampler, steps, spacing = (values[name] for name in ("sampler", "steps", "timestep_spacing"))
    return (
        (
            (sampler, steps, spacing) == (None, None, None)
            or (sampler in SAMPLERS and type(steps) is int and steps >= 1 and spacing in SPACINGS)
        )
        and all(
            isinstance(values[name], str)
            for name in ("method", "negative_prompt", "guider", "model", "denoiser_sha256")
        )
        and isinstance(settings, dict)
        and isinstance(values["live_negative_prompt"], bool)
        and scale(values["guidance"])
        and (
            scales is None
            or (isinstance(scales, list) and len(scales) == 2 and all(map(scale, scales)) and scales[0] < scales[1])
        )
        and isinstance(files, dict)
        and bool(files)
        and all(isinstance(digest, str) for digest in files.values())
    )


def read_student(folder: Path, files: ModelFiles | None = None, *, instead: str = "--student DIR") -> StudentInfo:
    """Read and check a student's description, and its adapter's files.

    `files` is the model that it is to be used with, if any; `instead` what to pass where there is no student.

    Raises:
        InputError: there is no student, its adapter was changed or belongs to another model.
    """
    description = folder / INFO_FILE
    if not description.is_file():
        raise InputError(f"there is no student in {folder}: run `boostdiff distill` first, or pass {instead}")
    values = read_json(description)
    if values.pop("sha256", None) != hash_of(values):
        raise InputError(
            f"{description} is damaged or of boostdiff 0.1.0 (its own SHA-256 differs or is missing): distill again"
        )
    names = {item.name for item in fields(StudentInfo)}
    if not names <= set(values) or not _usable(values):
        raise InputError(f"{description} is not a student's description; distill again")
    if values["guidance_range"] is not None:
        values["guidance_range"] = tuple(values["guidance_range"])
    info = StudentInfo(**{name: values[name] for name in names})
    if info.method not in METHODS:
        raise InputError(f"the student in {folder} is of method {info.method}, which is gone: distill one of another")
    try:
        check_guider(info.guider, info.guider_settings)
    except InputError as error:
        raise InputError(f"the teacher of the student in {folder} can't be made: {error}; distill again") from None
    for name, expected in info.adapter_files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise InputError(f"the student in {folder} is incomplete: {name} is missing")
        if sha256_of(path) != expected:
            raise InputError(f"{path} is damaged: its SHA-256 is not the one in {INFO_FILE}; distill again")
    if files is not None:
        check_model(info, folder, files)
    return info


def check_model(info: StudentInfo, folder: Path, files: ModelFiles) -> None:
    """Refuse a student, read from a folder, for another model than it was trained on; reads the denoiser's weights.

    Raises:
        InputError: it is another's; or see `ModelFiles.denoiser_weights`.
    """
    if files.denoiser_sha256() != info.denoiser_sha256:
        raise InputError(
            f"the student in {folder} belongs to another model ({info.model}), not to {files.name}: "
            "pass the --model it was trained on, or distill one for this model"
        )
    if "prediction_type" in info.settings:
        known, now = info.settings["prediction_type"], files.scheduler_config.get("prediction_type")
        if known != now:
            raise InputError(
                f"the student in {folder} learned from a model of prediction_type {known}, this is of {now}"
            )


def apply_student(denoiser: Any, folder: Path, info: StudentInfo) -> None:
    """Put a student that was checked by `read_student` onto its model's denoiser, unmerged, as stock diffusers would.

    Raises:
        InputError: the adapter's tensors don't fit.
    """
    try:
        METHODS[info.method].load(denoiser, folder)
        if NORMS_FILE in info.adapter_files:
            Norms.load(denoiser, folder)
        if info.live_negative_prompt:
            LiveNegative.load(denoiser, folder)
        if info.guidance_range is not None:
            GuidanceConditioned.load(denoiser, folder)
    except MISFITS as error:
        raise InputError(f"the adapter in {folder} does not fit {info.model}: {one_line(error)}") from None


def load_adapter_for_training(adapter: Adapter, folder: Path) -> None:
    """Take a student's weights over into a new adapter, to be trained further.

    Raises:
        InputError: they don't fit.
    """
    try:
        adapter.load_for_training(folder)
    except MISFITS as error:
        raise InputError(f"the adapter in {folder} does not fit: {one_line(error)}") from None
