"""The parts of a pipeline as graphs: their inputs and outputs, what varies, and what they are compared on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.conditions import PromptEmbeds
from ..engine.exported_parts import HIDDEN_STATES
from ..engine.family import Family
from ..engine.memory import give_back_memory, give_back_pages
from ..engine.model import LARGE_PARAMETERS, Model
from ..engine.runners import DENOISER_OUTPUT
from .config import ExportConfig

TRACE_BATCH = 2
"""A batch of one would be frozen into the graph."""
TEXT_CHUNKS = 3
"""The longest text that a plan takes, in multiples of the text encoder's length."""
VAE_BATCH = 4
"""The largest batch of a VAE decoder's plan: its activations are the largest of all."""


@dataclass(kw_only=True)
class Case:
    """One comparison.

    Attributes:
        where: the case in words.
        inputs: tensors by name, float32.
        expected: outputs by name, float32 on the CPU.
    """

    where: str
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor] = field(default_factory=dict)


Axis = tuple[Any, tuple[int, ...]]
"""A `torch.export.Dim`, and the smallest, best and largest size in a plan."""


@dataclass(kw_only=True)
class Part:
    """A module to export.

    Attributes:
        name: name of its folder in the engine.
        module: takes `inputs` by keyword and gives a tuple of tensors.
        inputs: example inputs by name, a batch of `TRACE_BATCH`.
        outputs: names of what it gives.
        axes: by input, the axes that vary.
        cases: inputs that its graphs are compared on.
        half: whether it may run in FP16.
        large: whether memory is a concern: references are then computed an image at a time.
    """

    name: str
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, Axis]]
    cases: list[Case]
    half: bool = True
    large: bool = False

    @property
    def dynamic(self) -> dict[str, dict[int, Any]]:
        """The axes as `torch.export` takes them."""
        return {name: {axis: dim for axis, (dim, _) in axes.items()} for name, axes in self.axes.items()}

    @property
    def profile(self) -> dict[str, list[tuple[int, ...]]]:
        """Smallest, best and largest shape of each input in a plan."""

        def shape(name: str, index: int) -> tuple[int, ...]:
            sizes = {axis: sizes[index] for axis, (_, sizes) in self.axes[name].items()}
            return tuple(sizes.get(axis, size) for axis, size in enumerate(self.inputs[name].shape))

        return {name: [shape(name, index) for index in range(3)] for name in self.inputs}

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
            step = 1 if self.large else batch
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


class _Denoiser(torch.nn.Module):
    def __init__(self, denoiser: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.denoiser, self.family = denoiser, family

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        # Named one by one, as the exporter asks: all that some family has.
        inputs = locals()
        given = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}
        return (self.family.forward(self.denoiser, given),)


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
    def __init__(self, vae: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.vae, self.family = vae, family

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.family.decode_latents(self.vae, latent_sample),)


def _cycled(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    return tensor[torch.arange(batch, device=tensor.device) % len(tensor)]


def _batches(config: ExportConfig, *, large: bool) -> list[int]:
    """Batches that a part is compared at: of a large one two, as ONNX Runtime would take minutes for more."""
    return sorted({2, *config.batch[: 1 if large else 3]})


def _batch_axis(batches: Sequence[int]) -> Axis:
    # From 64 on diffusers' upsampling makes a copy first: torch.export would find that out, and trace all again.
    return torch.export.Dim("batch", min=1, max=63), tuple(batches)


def _size_axes(sizes: Sequence[tuple[int, int]], dim: Callable[[str], Any]) -> dict[int, Axis]:
    """Height and width of latents."""
    return {2: (dim("height"), tuple(h for h, _ in sizes)), 3: (dim("width"), tuple(w for _, w in sizes))}


def latent_sizes(model: Model, config: ExportConfig) -> tuple[tuple[int, int], ...]:
    """Smallest, best and largest (height, width) of the latents; sizes that can't be drawn are refused before."""
    if config.size is None:
        _, height, width = model.latent_shape
        return ((height, width),) * 3
    factor = model.pipeline.vae_scale_factor
    return tuple((size // factor, size // factor) for size in config.size)


def denoiser_part(
    model: Model, merged: Any, text: PromptEmbeds, config: ExportConfig, timesteps: Sequence[int]
) -> Part:
    """The merged denoiser, in float32.

    Args:
        text: real embeddings of a few prompts, which the cases cycle through.
        timesteps: timesteps that a small one is compared at; a large one at the middle one.
    """
    sizes = latent_sizes(model, config)
    channels = model.latent_shape[0]
    generator = torch.Generator().manual_seed(0)

    def noise(batch: int, size: tuple[int, int]) -> torch.Tensor:
        return torch.randn(batch, channels, *size, generator=generator).to(merged.device)

    inputs = model.family.example_inputs(model.pipeline, TRACE_BATCH, merged) | {"sample": noise(TRACE_BATCH, sizes[1])}
    axes: dict[str, dict[int, Axis]] = {name: {0: _batch_axis(config.batch)} for name in inputs}
    if model.family.text_chunks:
        length = inputs["encoder_hidden_states"].shape[1]
        # Traced with two chunks of text: a dimension of its smallest size would be frozen.
        inputs["encoder_hidden_states"] = torch.cat([inputs["encoder_hidden_states"]] * 2, dim=1)
        chunks = tuple(length * count for count in (1, 1, TEXT_CHUNKS))
        axes["encoder_hidden_states"][1] = (length * torch.export.Dim("chunks", min=1, max=64), chunks)
    if (lengths := model.family.text_lengths) is not None:
        tokens = torch.export.Dim("tokens", min=lengths[0], max=lengths[2]), lengths
        for name in inputs.keys() & {"encoder_hidden_states", "encoder_hidden_states_mask", "encoder_attention_mask"}:
            axes[name][1] = tokens
    if sizes[0] != sizes[2]:
        multiple = model.family.latent_multiple(merged.config, exported=True)
        axes["sample"] |= _size_axes(sizes, lambda side: multiple * torch.export.Dim(side, min=1, max=1024))
    large = merged.num_parameters() >= LARGE_PARAMETERS
    return Part(
        name=model.family.denoiser,
        module=_Denoiser(merged, model.family),
        inputs=inputs,
        outputs=(DENOISER_OUTPUT,),
        axes=axes,
        cases=_denoiser_cases(
            inputs | text.tensors(), noise, sizes, config, timesteps, large=large, chunks=model.family.text_chunks
        ),
        large=large,
    )


def _denoiser_cases(
    inputs: dict[str, torch.Tensor],
    noise: Callable[[int, tuple[int, int]], torch.Tensor],
    sizes: tuple[tuple[int, int], ...],
    config: ExportConfig,
    timesteps: Sequence[int],
    *,
    large: bool,
    chunks: bool,
) -> list[Case]:
    """What the denoiser is compared on: each batch, each timestep, other sizes, and text of two chunks."""
    best, smallest, middle = sizes[1], config.batch[0], timesteps[len(timesteps) // 2]
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

    cases: list[tuple[Any, ...]] = [(count, middle) for count in _batches(config, large=large)]
    if not large:
        cases += [(smallest, t) for t in timesteps if t != middle]
        cases += [(smallest, middle, size) for size in dict.fromkeys(sizes) if size != best]
        cases += [(max(2, smallest), middle, best, 2)] if chunks else []
    return [case(*arguments) for arguments in cases]


def text_encoder_part(model: Model, name: str, prompts: Sequence[str], config: ExportConfig) -> Part:
    """One text encoder, compared on the tokens of real prompts."""
    encoder = getattr(model.pipeline, name)
    tokenizer = getattr(model.pipeline, name.replace("text_encoder", "tokenizer"))
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids.to(encoder.device)
    projected = hasattr(encoder, "text_projection")
    outputs = ["text_embeds", "last_hidden_state"] if projected else ["last_hidden_state", "pooler_output"]
    if len(model.family.exported_text_encoders) > 1:
        outputs += [f"{HIDDEN_STATES}{i}" for i in range(encoder.config.num_hidden_layers + 1)]
    large = encoder.num_parameters() >= LARGE_PARAMETERS
    return Part(
        name=name,
        module=_TextEncoder(encoder, outputs),
        inputs={"input_ids": _cycled(ids, TRACE_BATCH)},
        outputs=tuple(outputs),
        axes={"input_ids": {0: _batch_axis(config.batch)}},
        cases=[
            Case(where=f"batch {count}", inputs={"input_ids": _cycled(ids, count)})
            for count in _batches(config, large=large)
        ],
        large=large,
    )


def vae_decoder_part(model: Model, config: ExportConfig) -> Part:
    """The VAE's decoder, of any size that the denoiser is exported for."""
    vae = model.pipeline.vae
    sizes = latent_sizes(model, config)
    generator = torch.Generator().manual_seed(0)
    # A large decoder's activations, not its weights, are what a CPU has no time for.
    large = vae.num_parameters() >= LARGE_PARAMETERS / 10

    def latents(batch: int, size: tuple[int, int]) -> torch.Tensor:
        noise = torch.randn(batch, model.latent_shape[0], *size, generator=generator)
        return model.family.denormalized(noise.to(vae.device), vae)

    def case(count: int, size: tuple[int, int]) -> Case:
        where = f"batch {count}, {size[0]}x{size[1]} latents"
        return Case(where=where, inputs={"latent_sample": latents(count, size)})

    batches = [min(b, VAE_BATCH) for b in config.batch]
    axes = {0: _batch_axis(batches)}
    if sizes[0] != sizes[2]:
        axes |= _size_axes(sizes, lambda side: torch.export.Dim(side, min=2, max=8192))
    cases = [(batches[0], sizes[1])]
    if not large:
        cases += [(count, sizes[1]) for count in sorted({2, *batches[1:]})]
        cases += [(batches[0], size) for size in dict.fromkeys(sizes) if size != sizes[1]]
    return Part(
        name="vae_decoder",
        module=_VaeDecoder(vae, model.family),
        inputs={"latent_sample": latents(TRACE_BATCH, sizes[1])},
        outputs=("sample",),
        axes={"latent_sample": axes},
        cases=[case(*arguments) for arguments in dict.fromkeys(cases)],
        large=large,
        half=not model.family.upcasts(vae.config),
    )
