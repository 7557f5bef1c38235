"""Adapters: what is trained while the denoiser stays frozen. Each class attaches, saves, loads and merges one.

Teacher and student share one denoiser: `disabled()` turns it back into the teacher for as long as the block lasts.
To add one, write its class here; `METHODS`, `make_adapter`, `DistillConfig.method` and, with its rate,
`distill.config.LEARNING_RATES` name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from .errors import BoostDiffError, InputError, one_line
from .families import family_of_denoiser

ADAPTER_NAME = "boostdiff"
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
BITFIT_FILE = "bitfit.safetensors"
SOFT_PROMPT_FILE = "soft_prompt.safetensors"
LORA_METHODS = ("lora", "dora")
"""Methods whose file diffusers' `load_lora_weights` reads."""


class Adapter(ABC):
    """Trainable float32 parameters on a frozen denoiser of any precision; run it under autocast if that is a lower one.

    An instance is there for training. What it saved is put onto a denoiser for use by `load`, in stock diffusers
    too, and folded into its weights by `merge`.

    Attributes:
        file: name of what `save` writes; adapters on top of another have theirs beside that one's.
    """

    file: ClassVar[str]

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    @abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, in a fixed order."""

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters().values())

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the denoiser is the teacher, bit for bit."""

    @abstractmethod
    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the adapter as safetensors into a folder and return its files."""

    @staticmethod
    @abstractmethod
    def load(denoiser: Any, folder: str | Path) -> None:
        """Put what `save` wrote onto the denoiser of the model that it was trained on.

        Raises:
            SafetensorError, RuntimeError, ValueError, KeyError: it does not fit.
        """

    @abstractmethod
    def load_for_training(self, folder: Path) -> None:
        """Take over what `save` wrote, to be trained further.

        Raises:
            SafetensorError, RuntimeError, ValueError, KeyError: it does not fit.
        """

    def scale(self, factor: float, largest: float | None = None) -> None:
        """Multiply what the adapter adds to the denoiser, in training; of LoRA, BitFit and live negative prompts.

        Args:
            factor: above 0; of a guidance-conditioned student that at its largest guidance scale.
            largest: that scale; None for a student of one.

        Raises:
            NotImplementedError: what this adapter adds is not proportional to its parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} can't be scaled")

    @staticmethod
    def merge(denoiser: Any) -> None:
        """Fold what `load` put onto a denoiser into its weights; nothing where it is there already, or stays as a hook.

        Raises:
            BoostDiffError: it can't be merged.
        """

    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over trained parameters by name; a ValueError where names or shapes are not this adapter's."""
        copy_by_name(self.parameters(), weights)

    def swapped(self, weights: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """A context in which the denoiser has other trained parameters, by name: those of a frozen student."""
        return swapped(self.parameters(), weights)


@torch.no_grad()
def copy_by_name(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Fill parameters with tensors of the same names and shapes; a ValueError where they are others."""
    if weights.keys() != parameters.keys():
        raise ValueError(f"its {len(weights)} tensors are of another adapter, not the {len(parameters)} of this one")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(weights[name])


@contextmanager
def swapped(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """A context in which parameters hold other tensors of the same names."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def trained_copies(denoiser: Any, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Let parameters of a frozen denoiser be trained, and return what they held, by name."""
    for module in denoiser.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            # Normalization wants scale and bias of one precision.
            module.float()
    base = {name: parameter.data for name, parameter in parameters.items()}
    for parameter in parameters.values():
        # A copy, and in float32 whatever the frozen weights are in: half precision loses small updates.
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_(True)
    return base


@torch.no_grad()
def multiply_change(parameters: dict[str, torch.nn.Parameter], base: dict[str, torch.Tensor], factor: float) -> None:
    """Multiply the parameters' difference from `base`, by name."""
    for name, parameter in parameters.items():
        before = base[name].to(parameter)
        parameter.copy_(before + factor * (parameter - before))


def _lora_tensors(folder: str | Path, prefix: str) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors, whose names begin with a prefix."""
    tensors = load_file(Path(folder) / LORA_FILE)
    if not tensors or not all(name.startswith(f"{prefix}.") for name in tensors):
        raise ValueError(f"{LORA_FILE} is no LoRA of a {prefix}")
    return tensors


def _on_b(
    tensors: dict[str, torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """LoRA's tensors by name, with the function's result in place of every B."""
    return {name: function(tensor) if ".lora_B." in name else tensor for name, tensor in tensors.items()}


def _biases(denoiser: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in denoiser.named_parameters() if name.endswith(".bias")}


def _prefix(denoiser: torch.nn.Module) -> str:
    """What the names in a LoRA file begin with."""
    return family_of_denoiser(denoiser).denoiser


class Lora(Adapter):
    """LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024), by peft."""

    file = LORA_FILE

    def __init__(self, denoiser: Any, method: str, *, rank: int, alpha: float, targets: list[str]) -> None:
        super().__init__(denoiser)
        self.method = method
        self.config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=targets,
            use_dora=method == "dora",
        )
        try:
            denoiser.add_adapter(self.config, adapter_name=ADAPTER_NAME)
        except (ValueError, TypeError) as error:
            raise InputError(f"{method} can't be put on this denoiser: {one_line(error)}") from None
        self._names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: self.denoiser.get_parameter(name) for name in self._names}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    @property
    def scaling(self) -> float:
        """α / r."""
        return self.config.lora_alpha / self.config.r

    @torch.no_grad()
    def scale(self, factor: float, largest: float | None = None) -> None:
        if self.method != "lora":
            super().scale(factor, largest)
        for name, parameter in self.parameters().items():
            if ".lora_B." in name:
                parameter.mul_(factor)

    def folded_state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors by peft's names, on the CPU; α / r is folded into B, so that the scale is one."""
        tensors = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER_NAME)
        folded = _on_b(tensors, lambda b: b * self.scaling)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in folded.items()}

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the file that diffusers' `load_lora_weights` reads."""
        pipeline.save_lora_weights(
            folder,
            **{f"{_prefix(self.denoiser)}_lora_layers": self.folded_state_dict()},
            weight_name=LORA_FILE,
            # One metadata key only: safetensors writes several in random order, and equal runs must give equal bytes.
            # Nothing is lost: without metadata diffusers takes alpha to be the rank, as the folded scale makes it.
            save_function=lambda weights, path: save_file(weights, path, metadata={"format": "pt"}),
        )
        return [folder / LORA_FILE]

    @staticmethod
    def load(denoiser: Any, folder: str | Path) -> None:
        prefix = _prefix(denoiser)
        denoiser.load_lora_adapter(_lora_tensors(folder, prefix), prefix=prefix, adapter_name=ADAPTER_NAME)

    def load_for_training(self, folder: Path) -> None:
        prefix = _prefix(self.denoiser)
        saved = {name.removeprefix(f"{prefix}."): tensor for name, tensor in _lora_tensors(folder, prefix).items()}
        # By peft's names, as `folded_state_dict` has them, where peft has the adapter's name in between.
        ours = {name.replace(f".{ADAPTER_NAME}", ""): name for name in self._names}
        named = {ours.get(name, ours.get(f"{name}.weight", name)): tensor for name, tensor in saved.items()}
        self.load_state_dict(_on_b(named, lambda b: b / self.scaling))

    @staticmethod
    @torch.no_grad()
    def merge(denoiser: Any) -> None:
        """See `Adapter.merge`; layer by layer, in float32, by peft's merge. The bare layers are put back."""
        for name, layer in [item for item in denoiser.named_modules() if isinstance(item[1], BaseTunerLayer)]:
            dtype = layer.get_base_layer().weight.dtype
            try:
                layer.float().merge(safe_merge=True)
            except (ValueError, NotImplementedError) as error:
                raise BoostDiffError(f"{name} can't be merged: {error}") from None
            layer.get_base_layer().to(dtype)
        denoiser.unload_lora()

    def save_kohya(self, folder: Path) -> Path:
        """Write a LoRA once more by the names that ComfyUI, A1111 and kohya's scripts read.

        The conversion is diffusers' (`convert_state_dict_to_kohya`), of a UNet's LoRA alone; each alpha is the rank.
        SDXL's `add_embedding` gets the name that it has in single files, the only one that all readers know.
        """
        tensors = convert_state_dict_to_kohya({f"unet.{name}": t for name, t in self.folded_state_dict().items()})
        for ours, theirs in (("add_embedding_linear_1", "label_emb_0_0"), ("add_embedding_linear_2", "label_emb_0_2")):
            tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / KOHYA_FILE, metadata={"format": "pt"})
        return folder / KOHYA_FILE


class BitFit(Adapter):
    """BitFit (Ben Zaken et al. 2022): every bias of the denoiser is trained, nothing else."""

    file = BITFIT_FILE

    def __init__(self, denoiser: Any) -> None:
        super().__init__(denoiser)
        self._base = trained_copies(denoiser, self.parameters())

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return _biases(self.denoiser)

    def disabled(self) -> AbstractContextManager[None]:
        return self.swapped(self._base)

    def scale(self, factor: float, largest: float | None = None) -> None:
        multiply_change(self.parameters(), self._base, factor)

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write every bias by its name."""
        save_file({name: p.detach().cpu().contiguous() for name, p in self.parameters().items()}, folder / BITFIT_FILE)
        return [folder / BITFIT_FILE]

    @staticmethod
    def load(denoiser: Any, folder: str | Path) -> None:
        """See `Adapter.load`: every bias of the denoiser is replaced."""
        copy_by_name(_biases(denoiser), load_file(Path(folder) / BITFIT_FILE))

    def load_for_training(self, folder: Path) -> None:
        self.load(self.denoiser, folder)


def text_width(config: Any) -> int:
    """Width of the text embeddings that a UNet is given."""
    if config.get("encoder_hid_dim_type") == "text_proj":
        return int(config["encoder_hid_dim"])
    width = config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


class SoftPromptHook(torch.nn.Module):
    """Appends learned tokens `(k, D)` to the UNet's text embedding as long as it is enabled."""

    def __init__(self, denoiser: Any, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = torch.nn.Parameter(tokens.to(denoiser.device))
        self.enabled = True
        denoiser.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As a forward pre-hook: `encoder_hidden_states` `(B, L, D)` becomes `(B, L + k, D)`."""
        if not self.enabled:
            return None
        hidden = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        # Not `len`, which a traced graph would hold as a number.
        longer = torch.cat([hidden, self.tokens.to(hidden).expand(hidden.shape[0], -1, -1)], dim=1)
        if len(args) > 2:
            return (*args[:2], longer, *args[3:]), kwargs
        return args, kwargs | {"encoder_hidden_states": longer}


class SoftPrompt(Adapter):
    """Prompt tuning (Lester et al. 2021): learned tokens behind the text embedding, the UNet untouched."""

    file = SOFT_PROMPT_FILE

    def __init__(self, denoiser: Any, tokens: int) -> None:
        super().__init__(denoiser)
        self.prompt = SoftPromptHook(denoiser, 0.02 * torch.randn(tokens, text_width(denoiser.config)))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"soft_prompt.tokens": self.prompt.tokens}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.prompt.enabled = False
        try:
            yield
        finally:
            self.prompt.enabled = True

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write `tokens` `(k, D)`."""
        save_file({"tokens": self.prompt.tokens.detach().cpu().contiguous()}, folder / SOFT_PROMPT_FILE)
        return [folder / SOFT_PROMPT_FILE]

    @staticmethod
    def load(denoiser: Any, folder: str | Path) -> None:
        """See `Adapter.load`: a hook, which exported graphs take with them."""
        tokens = load_file(Path(folder) / SOFT_PROMPT_FILE)["tokens"]
        if tokens.ndim != 2 or tokens.shape[1] != text_width(denoiser.config):
            raise ValueError(f"its tokens have shape {tuple(tokens.shape)}, not (k, {text_width(denoiser.config)})")
        SoftPromptHook(denoiser, tokens).requires_grad_(False)

    def load_for_training(self, folder: Path) -> None:
        self.load_state_dict({"soft_prompt.tokens": load_file(folder / SOFT_PROMPT_FILE)["tokens"]})


METHODS: dict[str, type[Adapter]] = {
    **dict.fromkeys(LORA_METHODS, Lora),
    "bitfit": BitFit,
    "soft-prompt": SoftPrompt,
}
"""What handles each method."""
