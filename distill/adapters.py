"""Adapters: what is trained while the UNet stays frozen.

Teacher and student share one UNet: `disabled()` turns it back into the teacher for as long as the block lasts.
Most methods are tuners of peft and share one path: to add one, give it a row in `PEFT_METHODS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import peft
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ..engine.errors import InputError, one_line
from ..engine.guidance import smooth_columns
from ..engine.student import (
    ADAPTER_NAME,
    BITFIT_FILE,
    GUIDANCE_FILE,
    KOHYA_FILE,
    LORA_FILE,
    LORA_METHODS,
    PEFT_FILE,
    SOFT_PROMPT_FILE,
    add_guidance_embedding,
    add_soft_prompt,
)

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_k", "to_out.0", "to_q", "to_v"),
    "transformer": ("to_k", "to_out.0", "to_q", "to_v", "proj_in", "proj_out", "net.0.proj", "net.2"),
}
"""Named sets of layers: the attention projections (the paper's), or all of the transformer blocks."""

PEFT_METHODS: dict[str, Callable[[int, float, list[str]], peft.PeftConfig]] = {
    "lora": lambda rank, alpha, targets: peft.LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets
    ),
    "dora": lambda rank, alpha, targets: peft.LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets, use_dora=True
    ),
    "loha": lambda rank, alpha, targets: peft.LoHaConfig(r=rank, alpha=alpha, target_modules=targets),
    "lokr": lambda rank, alpha, targets: peft.LoKrConfig(r=rank, alpha=alpha, target_modules=targets),
    "oft": lambda rank, alpha, targets: peft.OFTConfig(r=0, oft_block_size=rank, target_modules=targets),
    "hra": lambda rank, alpha, targets: peft.HRAConfig(r=rank + rank % 2, target_modules=targets),
    "ia3": lambda rank, alpha, targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
}
"""Configurations from (rank, alpha, target modules). LoRA: Hu et al. 2021; DoRA: Liu et al. 2024; LoHa: Hyeon-Woo
et al. 2022; LoKr: Edalati et al. 2022; OFT: Qiu et al. 2023 (the rank is its block size); HRA: Yuan et al. 2024 (an
even rank); (IA)³: Liu et al. 2022 (no rank)."""

METHODS = (*PEFT_METHODS, "bitfit", "soft-prompt")


class Adapter(ABC):
    """Trainable float32 parameters on a frozen UNet of any precision; run it under autocast if that is a lower one."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    @abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, in a fixed order."""

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters().values())

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the UNet is the teacher, bit for bit."""

    @abstractmethod
    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the adapter as safetensors into a folder and return its files."""

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over weights by name.

        Raises:
            ValueError: names or shapes are not this adapter's.
        """
        parameters = self.parameters()
        if weights.keys() != parameters.keys():
            raise ValueError("the checkpoint is of another adapter")
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(weights[name])


class PeftAdapter(Adapter):
    """Any tuner of peft that works layer by layer."""

    def __init__(self, unet: UNet2DConditionModel, method: str, config: peft.PeftConfig) -> None:
        super().__init__(unet)
        self.method, self.config = method, config
        try:
            unet.add_adapter(config, adapter_name=ADAPTER_NAME)
        except (ValueError, TypeError) as error:
            raise InputError(f"{method} can't be put on this UNet: {one_line(error)}") from None
        self._names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """See `Adapter.parameters`."""
        return {name: self.unet.get_parameter(name) for name in self._names}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Adapter.disabled`."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors by peft's names, on the CPU; LoRA's scale α / r is folded into B, so that it is one."""
        tensors = get_peft_model_state_dict(self.unet, adapter_name=ADAPTER_NAME)
        scale = self.config.lora_alpha / self.config.r if self.method in LORA_METHODS else 1.0
        return {
            name: (tensor * scale if ".lora_B." in name else tensor).detach().cpu().contiguous()
            for name, tensor in tensors.items()
        }

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the file that diffusers' `load_lora_weights` reads, or for other tuners peft's own two."""
        if self.method not in LORA_METHODS:
            save_file(self.state_dict(), folder / PEFT_FILE)
            self.config.save_pretrained(folder)
            return [folder / PEFT_FILE, folder / "adapter_config.json"]
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=self.state_dict(),
            weight_name=LORA_FILE,
            # One metadata key only: safetensors writes several in random order, and equal runs must give equal bytes.
            # Nothing is lost: without metadata diffusers takes alpha to be the rank, as the folded scale makes it.
            save_function=lambda weights, path: save_file(weights, path, metadata={"format": "pt"}),
        )
        return [folder / LORA_FILE]

    def save_kohya(self, folder: Path) -> Path:
        """Write a LoRA once more by the names that ComfyUI, A1111 and kohya's scripts read.

        The conversion is diffusers' own (`convert_state_dict_to_kohya`); each alpha is the rank.

        Raises:
            InputError: the adapter is no plain LoRA.
        """
        if self.method != "lora":
            raise InputError(f"--format kohya is for --method lora, not {self.method}")
        tensors = convert_state_dict_to_kohya({f"unet.{name}": t for name, t in self.state_dict().items()})
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / KOHYA_FILE, metadata={"format": "pt"})
        return folder / KOHYA_FILE


class BitFit(Adapter):
    """BitFit (Ben Zaken et al. 2022): every bias of the UNet is trained, nothing else."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        for module in unet.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                # Normalisation wants scale and bias of one precision.
                module.float()
        self._base = {}
        for name, parameter in self.parameters().items():
            self._base[name] = parameter.data
            # A copy, and in float32 whatever the frozen weights are in: half precision loses small updates.
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """See `Adapter.parameters`."""
        return {name: p for name, p in self.unet.named_parameters() if name.endswith(".bias")}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Adapter.disabled`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters().items():
            parameter.data, self._base[name] = self._base[name], parameter.data

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write every bias by its name; `boostdiff.engine.student.load_biases` reads it."""
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in self.parameters().items()},
            folder / BITFIT_FILE,
        )
        return [folder / BITFIT_FILE]


class SoftPrompt(Adapter):
    """Prompt tuning (Lester et al. 2021): learnt tokens behind the text embedding, the UNet untouched."""

    def __init__(self, unet: UNet2DConditionModel, tokens: int) -> None:
        super().__init__(unet)
        self.prompt = add_soft_prompt(unet, 0.02 * torch.randn(tokens, unet.config.cross_attention_dim))
        self.prompt.tokens.requires_grad_(True)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """See `Adapter.parameters`."""
        return {"soft_prompt.tokens": self.prompt.tokens}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """See `Adapter.disabled`."""
        self.prompt.enabled = False
        try:
            yield
        finally:
            self.prompt.enabled = True

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write `tokens` `(k, D)`; `boostdiff.engine.student.load_soft_prompt` reads it."""
        save_file({"tokens": self.prompt.tokens.detach().cpu().contiguous()}, folder / SOFT_PROMPT_FILE)
        return [folder / SOFT_PROMPT_FILE]


class GuidanceConditioned(Adapter):
    """Another adapter, and with it a guidance embedding: the student takes w as an input (Meng et al. 2023, §3.1).

    The embedding enters beside the timestep's, through a projection that starts at zero. The teacher, which is given
    no w, does not see it.
    """

    def __init__(self, unet: UNet2DConditionModel, inner: Adapter) -> None:
        super().__init__(unet)
        self.inner = inner
        self.projection = add_guidance_embedding(unet)
        self.projection.requires_grad_(True)
        # The other columns stay at zero: trained, they add noise at every scale that was not drawn.
        smooth = smooth_columns(self.projection.in_features).to(self.projection.weight.device)
        self.projection.weight.register_hook(lambda gradient: gradient * smooth)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """See `Adapter.parameters`."""
        name = "time_embedding.cond_proj.weight"
        return {**self.inner.parameters(), name: self.unet.get_parameter(name)}

    def count(self) -> int:
        """See `Adapter.count`: the projection's smooth columns alone."""
        columns = int(smooth_columns(self.projection.in_features).sum())
        return self.inner.count() + columns * self.projection.out_features

    def disabled(self) -> AbstractContextManager[None]:
        """See `Adapter.disabled`."""
        return self.inner.disabled()

    def save(self, folder: Path, pipeline: DiffusionPipeline) -> list[Path]:
        """Write the other adapter, and the projection in a file of its own."""
        weights = {"time_embedding.cond_proj.weight": self.projection.weight.detach().cpu().contiguous()}
        save_file(weights, folder / GUIDANCE_FILE)
        return [*self.inner.save(folder, pipeline), folder / GUIDANCE_FILE]


def make_adapter(
    method: str,
    unet: UNet2DConditionModel,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str = "attention",
    tokens: int = 16,
    guidance_input: bool = False,
) -> Adapter:
    """Put a new adapter on a frozen UNet; its initial weights come from torch's default generator.

    Args:
        method: one of `METHODS`.
        unet: its parameters must not require gradients.
        rank: of the low-rank methods.
        alpha: of LoRA and its kin; by default the rank.
        targets: a key of `TARGETS`, or comma-separated endings of module names.
        tokens: of a soft prompt.
        guidance_input: the student takes its guidance as an input.

    Raises:
        InputError: no layer has such a name, or the tuner can't take one that has.
    """
    adapter: Adapter
    if method == "bitfit":
        adapter = BitFit(unet)
    elif method == "soft-prompt":
        adapter = SoftPrompt(unet, tokens)
    else:
        modules = list(TARGETS.get(targets, tuple(part.strip() for part in targets.split(","))))
        adapter = PeftAdapter(unet, method, PEFT_METHODS[method](rank, alpha or rank, modules))
    return GuidanceConditioned(unet, adapter) if guidance_input else adapter
