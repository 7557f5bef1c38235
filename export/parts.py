"""The parts of a pipeline as graphs: what goes in and out, what varies, and what they are compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from ..engine.exported_parts import HIDDEN_STATES
from ..engine.families import PromptEmbeds
from ..engine.memory import give_back_memory, give_back_pages
from ..engine.model import LARGE_PARAMETERS, Model
from ..engine.runners import UNET_OUTPUT, unet_forward
from .config import ExportConfig

TRACE_BATCH = 2
"""A batch of one would be frozen into the graph."""
TEXT_CHUNKS = 3
"""The longest text that a plan takes, in multiples of the text encoder's own length."""
VAE_BATCH = 4
"""The largest batch of a VAE decoder's plan: its activations are the largest of all."""


@dataclass(kw_only=True)
class Case:
    """One comparison.

    Attributes:
        where: the case in words.
        inputs: tensors by name, float32.
        expected: outputs by name, float32 on the CPU.
        plan_only: whether it is too much for ONNX Runtime on a CPU, and so compared with plans alone.
    """

    where: str
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor] = field(default_factory=dict)
    plan_only: bool = False


@dataclass(kw_only=True)
class Part:
    """A module to export.

    Attributes:
        name: name of its folder in the engine.
        module: takes `inputs` by keyword and gives a tuple of tensors.
        inputs: example inputs by name, a batch of `TRACE_BATCH`.
        outputs: names of what it gives.
        dynamic: the dimensions that vary: by input, axis and `torch.export.Dim`.
        profile: smallest, best and largest shape of a plan, by input.
        cases: inputs that its graphs are compared on.
        half: whether it may run in FP16.
        one_by_one: whether references are computed an image at a time, to save memory.
        large: whether memory is a concern.
    """

    name: str
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, Any]]
    profile: dict[str, list[tuple[int, ...]]]
    cases: list[Case]
    half: bool = True
    one_by_one: bool = False
    large: bool = field(init=False)

    def __post_init__(self) -> None:
        self.large = sum(p.numel() for p in self.module.parameters()) >= LARGE_PARAMETERS

    def graph_cases(self) -> list[Case]:
        """The cases that ONNX Runtime has time for."""
        return [case for case in self.cases if not case.plan_only]

    def planned_cases(self) -> list[Case]:
        """The cases that lie within a plan's profile."""
        return [
            case
            for case in self.cases
            if all(
                smallest <= size <= largest
                for name, (low, _, high) in self.profile.items()
                for smallest, size, largest in zip(low, case.inputs[name].shape, high, strict=True)
            )
        ]

    @torch.inference_mode()
    def compute_references(self) -> None:
        """Compute what every case expects, in float32, before the module is cast or given away."""
        for case in self.cases:
            batch = len(next(iter(case.inputs.values())))
            step = 1 if self.one_by_one else batch
            results = []
            for start in range(0, batch, step):
                rows = {name: tensor[start : start + step] for name, tensor in case.inputs.items()}
                results.append([result.float().cpu() for result in self.module(**rows)])
            outputs = zip(self.outputs, zip(*results, strict=True), strict=True)
            case.expected = {name: torch.cat(pieces) for name, pieces in outputs}

    def release(self) -> None:
        """Give the module's memory back to the system, once it was exported: the exporter's caches hold on to it."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            storage = tensor.untyped_storage()
            if storage.resizable():
                storage.resize_(0)
            else:
                give_back_pages(storage)
        del self.module
        give_back_memory()

    def to_half(self) -> None:
        """Cast weights and inputs to FP16, but for timesteps, which go up to 1000 in fractions."""
        self.module.half()
        self.inputs = {
            name: x.half() if x.is_floating_point() and name != "timestep" else x for name, x in self.inputs.items()
        }


class _Unet(torch.nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        inputs = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            # diffusers concatenates it with sines in FP32: torch promotes, the exported graph would not.
            "text_embeds": text_embeds if text_embeds is None else text_embeds.float(),
            "time_ids": time_ids,
            "timestep_cond": timestep_cond,
        }
        return (unet_forward(self.unet, {name: tensor for name, tensor in inputs.items() if tensor is not None}),)


class _TextEncoder(torch.nn.Module):
    def __init__(self, encoder: torch.nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.outputs = encoder, outputs

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = self.encoder(input_ids, output_hidden_states=any(n.startswith(HIDDEN_STATES) for n in self.outputs))
        return tuple(
            results.hidden_states[int(name.removeprefix(HIDDEN_STATES))]
            if name.startswith(HIDDEN_STATES)
            else results[name]
            for name in self.outputs
        )


class _VaeDecoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


def _cycled(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return tensor[torch.arange(batch, device=tensor.device) % len(tensor)]


def _chosen_cases(
    case: Callable[..., Case],
    *,
    few: Iterable[tuple[Any, ...]],
    every: Iterable[tuple[Any, ...]],
    large: bool,
    device: torch.device,
    config: ExportConfig,
) -> list[Case]:
    """What a part is compared on: of a large one a few cases, and on a GPU every case of its plan.

    Args:
        case: makes one.
        few: its arguments, for a large part.
        every: its arguments, for a small part and for plans.
        large: whether all of them would take ONNX Runtime minutes: it runs them on a CPU, wherever the reference runs.
        device: where the reference runs.
        config: whether there will be plans.
    """
    chosen = dict.fromkeys(few if large else every)
    cases = [case(*arguments) for arguments in chosen]
    if large and config.trt and device.type != "cpu":
        others = [arguments for arguments in dict.fromkeys(every) if arguments not in chosen]
        cases += [replace(case(*arguments), plan_only=True) for arguments in others]
    return cases


def _batch_dim() -> Any:
    return torch.export.Dim("batch", min=1, max=256)


def latent_sizes(model: Model, config: ExportConfig) -> tuple[tuple[int, int], ...]:
    """Smallest, best and largest (height, width) of the latents to export for.

    Raises:
        InputError: the model can't make a size that was asked for.
    """
    _, *own = model.latent_shape
    multiple = 2 ** (len(model.unet.config.block_out_channels) - 1)
    return config.latent_size(factor=model.pipeline.vae_scale_factor, multiple=multiple, own=(own[0], own[1]))


def unet_part(
    model: Model, merged: UNet2DConditionModel, text: PromptEmbeds, config: ExportConfig, timesteps: Sequence[int]
) -> Part:
    """The merged UNet.

    Args:
        model: for its family and text lengths.
        merged: the student, in float32.
        text: real embeddings of a few prompts, which the cases cycle through.
        config: batches and sizes.
        timesteps: timesteps that a small UNet is compared at; a large one at some of them.
    """
    sizes = latent_sizes(model, config)
    channels = model.latent_shape[0]
    generator = torch.Generator().manual_seed(0)

    def noise(batch: int, size: tuple[int, int]) -> torch.Tensor:
        return torch.randn(batch, channels, *size, generator=generator).to(merged.device)

    inputs = model.family.example_inputs(model.pipeline, batch=TRACE_BATCH) | {"sample": noise(TRACE_BATCH, sizes[1])}
    length = inputs["encoder_hidden_states"].shape[1]
    # Traced with two chunks of text: a dimension of its smallest size would be frozen.
    inputs["encoder_hidden_states"] = torch.cat([inputs["encoder_hidden_states"]] * 2, dim=1)
    large = merged.num_parameters() >= LARGE_PARAMETERS
    return Part(
        name="unet",
        module=_Unet(merged),
        inputs=inputs,
        outputs=(UNET_OUTPUT,),
        dynamic=_unet_dynamic_shapes(inputs, length, sizes, len(merged.config.block_out_channels)),
        profile=_unet_profile(inputs, length, sizes, config.batch),
        cases=_unet_cases(inputs | text.tensors(), noise, sizes, config, timesteps, large=large),
        one_by_one=large,
    )


def _unet_dynamic_shapes(
    inputs: dict[str, torch.Tensor], length: int, sizes: tuple[tuple[int, int], ...], levels: int
) -> dict[str, dict[int, Any]]:
    """By input, the axes that vary: the batch, whole chunks of text, and sizes that halve `levels - 1` times."""
    batch = _batch_dim()
    dynamic: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
    dynamic["encoder_hidden_states"][1] = length * torch.export.Dim("chunks", min=1, max=64)
    if sizes[0] != sizes[2]:
        for axis, side in ((2, "height"), (3, "width")):
            dynamic["sample"][axis] = 2 ** (levels - 1) * torch.export.Dim(side, min=1, max=1024)
    return dynamic


def _unet_profile(
    inputs: dict[str, torch.Tensor], length: int, sizes: tuple[tuple[int, int], ...], batch: tuple[int, int, int]
) -> dict[str, list[tuple[int, ...]]]:
    """By input, its smallest, best and largest shape."""
    profile: dict[str, list[tuple[int, ...]]] = {
        name: [(b, *tensor.shape[1:]) for b in batch] for name, tensor in inputs.items()
    }
    _, channels, *_ = inputs["sample"].shape
    *_, width = inputs["encoder_hidden_states"].shape
    profile["sample"] = [(b, channels, *size) for b, size in zip(batch, sizes, strict=True)]
    chunks = (1, 1, TEXT_CHUNKS)
    profile["encoder_hidden_states"] = [(b, length * n, width) for b, n in zip(batch, chunks, strict=True)]
    return profile


def _unet_cases(
    inputs: dict[str, torch.Tensor],
    noise: Callable[[int, tuple[int, int]], torch.Tensor],
    sizes: tuple[tuple[int, int], ...],
    config: ExportConfig,
    timesteps: Sequence[int],
    *,
    large: bool,
) -> list[Case]:
    """What the UNet is compared on: each batch at each timestep, other sizes, and text of two chunks."""
    best, smallest = sizes[1], config.batch[0]
    device = inputs["sample"].device

    def case(count: int, t: int, size: tuple[int, int] = best, chunks: int = 1) -> Case:
        tensors = {name: _cycled(tensor, count) for name, tensor in inputs.items()}
        tensors["sample"] = noise(count, size)
        tensors["timestep"] = torch.full((count,), float(t), device=device)
        tensors["encoder_hidden_states"] = torch.cat([tensors["encoder_hidden_states"]] * chunks, dim=1)
        where = [f"batch {count}, timestep {t}"]
        where += [f"{size[0]}x{size[1]} latents"] if size != best else []
        where += [f"{chunks} chunks of text"] if chunks > 1 else []
        return Case(where=", ".join(where), inputs=tensors)

    every: list[tuple[Any, ...]] = [(count, t) for count in sorted({*config.batch, 2}) for t in timesteps]
    every += [(smallest, timesteps[1], size) for size in dict.fromkeys(sizes) if size != best]
    every += [(max(2, smallest), timesteps[1], best, 2)]
    few = [(1, timesteps[0]), (1, timesteps[-1]), (2, timesteps[len(timesteps) // 2])]
    if config.trt and smallest > 2:
        few += [(smallest, timesteps[0])]
    return _chosen_cases(case, few=few, every=every, large=large, device=device, config=config)


def text_encoder_part(model: Model, name: str, prompts: Sequence[str], config: ExportConfig) -> Part:
    """One text encoder, compared on the tokens of real prompts."""
    encoder = getattr(model.pipeline, name)
    tokenizer = getattr(model.pipeline, name.replace("text_encoder", "tokenizer"))
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids.to(encoder.device)
    projected = hasattr(encoder, "text_projection")
    outputs = ["text_embeds", "last_hidden_state"] if projected else ["last_hidden_state", "pooler_output"]
    if len(model.family.text_encoders) > 1:
        outputs += [f"{HIDDEN_STATES}{i}" for i in range(encoder.config.num_hidden_layers + 1)]

    def case(count: int) -> Case:
        return Case(where=f"batch {count}", inputs={"input_ids": _cycled(ids, count)})

    large = encoder.num_parameters() >= LARGE_PARAMETERS
    few = [(1,), (2,), *([(config.batch[0],)] if config.trt else [])]
    every = [(count,) for count in sorted({1, 2, *config.batch})]
    return Part(
        name=name,
        module=_TextEncoder(encoder, outputs),
        inputs={"input_ids": _cycled(ids, TRACE_BATCH)},
        outputs=tuple(outputs),
        dynamic={"input_ids": {0: _batch_dim()}},
        profile={"input_ids": [(b, ids.shape[1]) for b in config.batch]},
        cases=_chosen_cases(case, few=few, every=every, large=large, device=encoder.device, config=config),
        one_by_one=large,
    )


def vae_decoder_part(model: Model, config: ExportConfig) -> Part:
    """The VAE's decoder, of any size that the UNet is exported for."""
    vae = model.pipeline.vae
    sizes = latent_sizes(model, config)
    generator = torch.Generator().manual_seed(0)
    # A large decoder's activations, not its weights, are what a CPU has no time for.
    large = vae.num_parameters() >= LARGE_PARAMETERS / 10

    def latents(batch: int, size: tuple[int, int]) -> torch.Tensor:
        noise = torch.randn(batch, vae.config.latent_channels, *size, generator=generator)
        return (noise / vae.config.scaling_factor).to(vae.device)

    def case(count: int, size: tuple[int, int]) -> Case:
        where = f"batch {count}, {size[0]}x{size[1]} latents"
        return Case(where=where, inputs={"latent_sample": latents(count, size)})

    batches = [min(b, VAE_BATCH) for b in config.batch]
    dynamic: dict[int, Any] = {0: _batch_dim()}
    if sizes[0] != sizes[2]:
        dynamic |= {2: torch.export.Dim("height", min=2, max=8192), 3: torch.export.Dim("width", min=2, max=8192)}
    few = [(1, sizes[1]), *([(batches[0], sizes[1])] if config.trt else [])]
    every = [(count, sizes[1]) for count in sorted({1, 2, *batches})]
    every += [(batches[0], size) for size in dict.fromkeys(sizes) if size != sizes[1]]
    return Part(
        name="vae_decoder",
        module=_VaeDecoder(vae),
        inputs={"latent_sample": latents(TRACE_BATCH, sizes[1])},
        outputs=("sample",),
        dynamic={"latent_sample": dynamic},
        profile={
            "latent_sample": [(b, vae.config.latent_channels, *size) for b, size in zip(batches, sizes, strict=True)]
        },
        cases=_chosen_cases(case, few=few, every=every, large=large, device=vae.device, config=config),
        one_by_one=large,
        half=not model.family.upcasts(vae.config),
    )


def keep_attention_in_fp32(modules: Iterable[torch.nn.Module]) -> bool:
    """Where a configuration asks for it (`upcast_attention`, as Stable Diffusion 2.1 at 768 pixels does), let the
    attention scores be computed in FP32: they overflow in FP16, and diffusers' default processor does not mind.

    Returns:
        Whether any does.
    """
    wanted = False
    for module in modules:
        if isinstance(module, UNet2DConditionModel) and module.config.upcast_attention:
            module.set_attn_processor(AttnProcessor())
            wanted = True
    return wanted
