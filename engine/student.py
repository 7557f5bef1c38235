"""A trained student on disk: its description, and putting it onto the model that it was trained for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import InputError, one_line
from .files import read_json, sha256_of, write_json
from .model import Model, ModelFiles

INFO_FILE = "student.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
PEFT_FILE = "adapter_model.safetensors"
BITFIT_FILE = "bitfit.safetensors"
SOFT_PROMPT_FILE = "soft_prompt.safetensors"
GUIDANCE_FILE = "guidance_embedding.safetensors"
ADAPTER_NAME = "boostdiff"
LORA_METHODS = ("lora", "dora")
"""Methods whose file diffusers' `load_lora_weights` reads."""

GUIDANCE_WIDTH = 256
"""Width of the guidance embedding, as in latent consistency models (Luo et al. 2023) and diffusers' examples."""


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """What `student.json` records.

    Attributes:
        method: "lora", "bitfit", ….
        guidance: the guidance scale w that was distilled in; of a range its middle.
        guidance_range: smallest and largest w of a student that takes w as an input, else None.
        negative_prompt: what guidance leads away from.
        model: what the user called the model.
        unet_sha256: of the UNet weights that the adapter belongs to.
        adapter_files: SHA-256 by file name.
        trainable_parameters: their number.
        settings: the resolved training configuration.
        versions: of boostdiff and the libraries that matter.
        result: what the training measured (updates, seconds, losses).
    """

    method: str
    guidance: float
    guidance_range: tuple[float, float] | None = None
    negative_prompt: str = ""
    model: str
    unet_sha256: str
    adapter_files: dict[str, str]
    trainable_parameters: int
    settings: dict[str, Any]
    versions: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter_sha256(self) -> str:
        """One hash for all of the adapter's files."""
        return "-".join(self.adapter_files[name] for name in sorted(self.adapter_files))

    def choose_guidance(self, guidance: float | None) -> float | None:
        """What to hand to the UNet as guidance: a number for a student that takes it as an input, else None.

        Args:
            guidance: what the user asked for, or None for the student's own.

        Raises:
            InputError: the student was not trained for it.
        """
        return choose_guidance(guidance, own=self.guidance, guidance_range=self.guidance_range)

    def check_negative_prompt(self, negative_prompt: str | None) -> None:
        """Refuse a negative prompt that the student was not trained for.

        Raises:
            InputError: it is another.
        """
        check_negative_prompt(negative_prompt, own=self.negative_prompt)

    def write(self, folder: Path) -> None:
        """Write `student.json`."""
        write_json(folder / INFO_FILE, asdict(self))


def check_negative_prompt(negative_prompt: str | None, *, own: str) -> None:
    """Refuse a negative prompt that a student was not trained for.

    Args:
        negative_prompt: what the user asked for, or None for the student's own.
        own: what it was distilled with, or "".

    Raises:
        InputError: it is another.
    """
    if negative_prompt not in (None, own):
        learnt = f"the negative prompt {own!r}" if own else "no negative prompt"
        raise InputError(
            f"this student was distilled with {learnt}, and one pass can't follow another: "
            "leave --negative-prompt out, distil with it, or pass --teacher"
        )


def choose_guidance(guidance: float | None, *, own: float, guidance_range: tuple[float, float] | None) -> float | None:
    """What to hand to the UNet as guidance: a number for a student that takes it as an input, else None.

    Args:
        guidance: what the user asked for, or None for the student's own.
        own: the scale that it was distilled at, or its default.
        guidance_range: lowest and highest scale that it was distilled for; None for a student of one scale.

    Raises:
        InputError: the student was not trained for it.
    """
    if guidance_range is None:
        if guidance not in (None, own):
            raise InputError(
                f"this student was distilled at guidance {own:g} and can't give {guidance:g}: "
                "leave --guidance out, distil another, or pass --teacher"
            )
        return None
    low, high = guidance_range
    wanted = own if guidance is None else guidance
    if not low <= wanted <= high:
        raise InputError(
            f"this student was distilled for guidance {low:g} to {high:g} and can't give {wanted:g}: "
            "choose one in between, distil another, or pass --teacher"
        )
    return wanted


def read_student(folder: Path, files: ModelFiles | None = None) -> StudentInfo:
    """Read and check a student's description.

    Args:
        folder: what `distill` wrote.
        files: the model it is to be used with.

    Raises:
        InputError: there is no student, its adapter was changed or belongs to another model.
    """
    if not (folder / INFO_FILE).is_file():
        raise InputError(f"there is no student in {folder}: run `boostdiff distill` first, or pass --student DIR")
    values = read_json(folder / INFO_FILE)
    names = {item.name for item in fields(StudentInfo)}
    if not names <= set(values) or not isinstance(values["adapter_files"], dict) or not values["adapter_files"]:
        raise InputError(f"{folder / INFO_FILE} is not a student's description; distil again")
    if values["guidance_range"] is not None:
        values["guidance_range"] = tuple(values["guidance_range"])
    info = StudentInfo(**{name: values[name] for name in names})
    for name, expected in info.adapter_files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise InputError(f"the student in {folder} is incomplete: {name} is missing")
        if sha256_of(path) != expected:
            raise InputError(f"{path} is damaged: its SHA-256 is not the one in {INFO_FILE}; distil again")
    if files is not None and files.unet_sha256() != info.unet_sha256:
        raise InputError(
            f"the student in {folder} belongs to another model ({info.model}), not to {files.name}: "
            "pass the --model it was trained on, or distil one for this model"
        )
    return info


def apply_student(model: Model, folder: Path, info: StudentInfo | None = None) -> StudentInfo:
    """Put the student's adapter onto the model's UNet, unmerged, as stock diffusers would.

    Args:
        model: the one it was trained for.
        folder: what `distill` wrote.
        info: its description where `read_student` has checked it already: hashing a large UNet takes seconds.

    Raises:
        InputError: see `read_student`; or the adapter's tensors don't fit the UNet.
    """
    info = info or read_student(folder, model.files)
    try:
        apply_adapter(model.unet, folder, info)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"the adapter in {folder} does not fit {model.files.name}: {one_line(error)}") from None
    return info


def apply_adapter(unet: UNet2DConditionModel, folder: Path, info: StudentInfo) -> None:
    """Put an adapter that was checked by `read_student` onto a UNet.

    Raises:
        SafetensorError, RuntimeError, ValueError, KeyError: its tensors don't fit.
    """
    if info.method in LORA_METHODS:
        unet.load_lora_adapter(load_file(folder / LORA_FILE), prefix="unet", adapter_name=ADAPTER_NAME)
    elif info.method == "bitfit":
        load_biases(unet, folder / BITFIT_FILE)
    elif info.method == "soft-prompt":
        load_soft_prompt(unet, folder / SOFT_PROMPT_FILE)
    else:
        load_peft_adapter(unet, folder)
    if info.guidance_range is not None:
        load_guidance_embedding(unet, folder / GUIDANCE_FILE)


@torch.no_grad()
def load_biases(unet: torch.nn.Module, path: str | Path) -> None:
    """Replace all biases of a UNet by those in a BitFit file; the one call that BitFit needs in stock diffusers.

    Args:
        unet: `pipe.unet` of the model that the file was trained on.
        path: `bitfit.safetensors`: every `.bias` parameter by its name.

    Raises:
        KeyError: the file's biases are not those of this UNet.
        ValueError: one has another shape.
    """
    biases = load_file(path)
    parameters = {name: p for name, p in unet.named_parameters() if name.endswith(".bias")}
    if biases.keys() != parameters.keys():
        raise KeyError(f"its {len(biases)} biases are not the {len(parameters)} of the UNet")
    for name, parameter in parameters.items():
        if parameter.shape != biases[name].shape:
            raise ValueError(f"{name} has shape {tuple(biases[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(biases[name])


def load_peft_adapter(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Put a tuner that peft saved onto a UNet.

    Args:
        unet: `pipe.unet` of the model that it was trained on.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: the configuration is of no known tuner, or the tensors are not those of this UNet.
    """
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"adapter_config.json is unusable: {error}") from None
    dtype = unet.dtype
    unet.add_adapter(config, adapter_name=ADAPTER_NAME)
    outcome = set_peft_model_state_dict(unet, load_file(Path(folder) / PEFT_FILE), adapter_name=ADAPTER_NAME)
    if outcome is not None and outcome.unexpected_keys:
        raise ValueError(f"{PEFT_FILE} has tensors that fit no layer: {outcome.unexpected_keys[0]}")
    unet.to(dtype).requires_grad_(False)


class SoftPromptHook(torch.nn.Module):
    """Appends learnt tokens `(k, D)` to the UNet's text embedding as long as it is enabled."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = torch.nn.Parameter(tokens)
        self.enabled = True

    def __call__(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As a forward pre-hook: `encoder_hidden_states` `(B, L, D)` becomes `(B, L + k, D)`."""
        if not self.enabled:
            return None
        hidden = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        longer = torch.cat([hidden, self.tokens.to(hidden).expand(len(hidden), -1, -1)], dim=1)
        if len(args) > 2:
            return (*args[:2], longer, *args[3:]), kwargs
        return args, kwargs | {"encoder_hidden_states": longer}


def add_soft_prompt(unet: UNet2DConditionModel, tokens: torch.Tensor) -> SoftPromptHook:
    """Make a UNet see `tokens` `(k, D)` behind every text embedding."""
    hook = SoftPromptHook(tokens.to(unet.device))
    unet.register_forward_pre_hook(hook, with_kwargs=True)
    return hook


def load_soft_prompt(unet: UNet2DConditionModel, path: str | Path) -> None:
    """Put a learnt soft prompt onto a UNet; the one call that it needs in stock diffusers.

    Raises:
        KeyError: the file holds no soft prompt.
        ValueError: its tokens are of another width.
    """
    tokens = load_file(path)["tokens"]
    if tokens.ndim != 2 or tokens.shape[1] != unet.config.cross_attention_dim:
        raise ValueError(f"its tokens have shape {tuple(tokens.shape)}, not (k, {unet.config.cross_attention_dim})")
    add_soft_prompt(unet, tokens).requires_grad_(False)


def add_guidance_embedding(unet: UNet2DConditionModel, width: int = GUIDANCE_WIDTH) -> torch.nn.Linear:
    """Give a UNet the input `timestep_cond`, through which a stock pipeline hands it any `guidance_scale`.

    The projection is float32 and starts at zero, so that nothing changes before it is trained: diffusers' own
    (`TimestepEmbedding.cond_proj`) starts at random.

    Raises:
        ValueError: the UNet has one already.
    """
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError("the UNet takes guidance as an input already")
    projection = torch.nn.Linear(width, unet.time_embedding.linear_1.in_features, bias=False, device=unet.device)
    torch.nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection
    unet.register_to_config(time_cond_proj_dim=width)
    return projection


@torch.no_grad()
def load_guidance_embedding(unet: UNet2DConditionModel, path: str | Path) -> None:
    """Give a UNet the guidance input that a range student was trained with.

    Raises:
        KeyError: the file holds no guidance embedding.
        ValueError: it is for another UNet.
    """
    weight = load_file(path)["time_embedding.cond_proj.weight"]
    projection = add_guidance_embedding(unet, weight.shape[1]).to(unet.dtype).requires_grad_(False)
    if weight.shape != projection.weight.shape:
        raise ValueError(f"its guidance embedding has shape {tuple(weight.shape)}")
    projection.weight.copy_(weight)
