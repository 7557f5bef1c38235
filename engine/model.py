"""Find and load a model: the embedded one, a diffusers folder or a hub id."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor

from . import embedded
from .contract import check_folder
from .errors import InputError, one_line
from .families import family_of
from .family import Family
from .files import read_json, sha256_of, without_bom
from .hub import configuration_of, fetch_weights
from .int8_weights import freeze_int8, int8_weights
from .schedulers import is_flow, make_scheduler
from .text_encoders import load_text, variant_in

HASHED = {".json", ".txt", ".model", ".safetensors"}
"""Suffixes of the files that make a model."""

LARGE_PARAMETERS = 100e6
"""Parameters from which comparing everything at full size takes minutes on a CPU, and memory is a concern."""


def component_from_config(folder: Path, library: str, class_name: str) -> Any:
    """A component of a pipeline from its configuration, its weights random: a module, or a scheduler.

    Raises:
        InputError: the configuration is of no such class.
    """
    known = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    path = folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")
    try:
        config = read_json(path)
        return known.from_config(config) if library == "diffusers" else known(known.config_class(**config))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path} describes no usable {class_name}: {one_line(error)}") from None


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@lru_cache
def _sha256_at(path: Path, size: int, modified: int) -> str:
    return sha256_of(path)


def _sha256(path: Path) -> str:
    """Of a model's file. Weights can be gigabytes: they are read once a process while they keep their size and time."""
    if path.suffix != ".safetensors":
        return sha256_of(path)
    path = path.resolve()
    return _sha256_at(path, path.stat().st_size, path.stat().st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model folder whose configuration has been read, its weights not.

    Attributes:
        name: name that the user gave it.
        folder: pipeline folder.
        family: model family.
        denoiser_config: the denoiser's configuration, as the pipeline will have it.
        vae_config: the VAE's.
        scheduler_config: the scheduler's.
        hub_id: where its weights come from, if they may not be in the folder yet; see `fetch`.
    """

    name: str
    folder: Path
    family: Family
    denoiser_config: dict[str, Any]
    vae_config: dict[str, Any] = field(default_factory=dict)
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    hub_id: str | None = None

    def fetch(self) -> None:
        """Fetch a hub id's weights, unless they are there. Called by what reads them: all else can be checked before.

        Raises:
            InputError: the hub can't be reached, or gives none.
        """
        if self.hub_id is not None:
            fetch_weights(self.hub_id, self.folder.name)

    @property
    def flow(self) -> bool:
        """Whether it is a flow-matching model."""
        return is_flow(self.scheduler_config)

    @property
    def denoiser_folder(self) -> Path:
        """Where the denoiser lies."""
        return self.folder / self.family.denoiser

    @property
    def absent_components(self) -> dict[str, None]:
        """Optional components that the folder leaves out, as `from_pretrained` wants to be told."""
        return self.family.absent_components(read_json(self.folder / "model_index.json"))

    def denoiser_weights(self) -> tuple[str | None, list[Path]]:
        """The denoiser's safetensors files and their variant (`None` or "fp16").

        Raises:
            InputError: there are none, or they can't be fetched.
        """
        self.fetch()
        for variant, infix in ((None, ""), ("fp16", ".fp16")):
            stem = f"diffusion_pytorch_model{infix}"
            folder = self.denoiser_folder
            files = [*folder.glob(f"{stem}.safetensors"), *sorted(folder.glob(f"{stem}-?????-of-?????.safetensors"))]
            if files:
                return variant, files
        _refuse_broken_links(self.denoiser_folder)
        # Such as diffusion_pytorch_model.bf16.safetensors.
        if others := sorted({path.name.split(".")[1] for path in folder.glob("diffusion_pytorch_model.*.safetensors")}):
            raise InputError(
                f"{folder} holds the variant {' and '.join(others)} alone, and only fp16 is read: load the pipeline "
                f"in Python with from_pretrained(…, variant={others[0]!r}), and save it with save_pretrained(FOLDER)"
            )
        raise InputError(
            f"{self.denoiser_folder} holds no diffusion_pytorch_model.safetensors: "
            "only safetensors weights are read; convert others with diffusers' save_pretrained"
        )

    def denoiser_sha256(self) -> str:
        """One hash for the denoiser's weight files."""
        _, files = self.denoiser_weights()
        return "-".join(map(_sha256, files))

    def other_sha256(self) -> dict[str, str]:
        """One hash for each component but the denoiser's weights: its configuration, words and safetensors files."""
        self.fetch()
        hashes = {
            "model_index": sha256_of(self.folder / "model_index.json"),
            "denoiser_config": sha256_of(self.denoiser_folder / "config.json"),
        }
        for component in ("vae", "scheduler", *self.family.text_encoders, *self.family.tokenizers):
            if component in self.absent_components:
                continue
            _refuse_broken_links(self.folder / component)
            files = sorted(path for path in (self.folder / component).glob("*") if path.suffix in HASHED)
            hashes[component] = "-".join(_sha256(path) for path in files)
        return hashes

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters of all components that have any, by name; made on the meta device."""
        index = read_json(self.folder / "model_index.json")
        counted = {}
        for name in (self.family.denoiser, "vae", *self.family.text_encoders):
            if name not in self.absent_components:
                with torch.device("meta"):
                    component = component_from_config(self.folder / name, *index[name])
                counted[name] = sum(parameter.numel() for parameter in component.parameters())
        return counted

    def empty_denoiser(self) -> Any:
        """The denoiser on the meta device: shapes without memory."""
        with torch.device("meta"):
            return component_from_config(self.denoiser_folder, "diffusers", self.family.denoiser_class.__name__)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model: its files, and the stock diffusers pipeline on its device."""

    files: ModelFiles
    pipeline: DiffusionPipeline

    @property
    def family(self) -> Family:
        """How it works."""
        return self.files.family

    @property
    def denoiser(self) -> Any:
        """The denoising network: a `UNet2DConditionModel` or a transformer of diffusers."""
        return getattr(self.pipeline, self.family.denoiser)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        denoiser = self.denoiser
        # The property that diffusers gives a module looks at all within it: 40 ms of SDXL with a LoRA.
        return next(denoiser.parameters()).device if isinstance(denoiser, torch.nn.Module) else denoiser.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents."""
        return self.family.latent_shape(self.denoiser.config)

    def make_scheduler(self, sampler: str, *, spacing: str | None = None) -> SchedulerMixin:
        """A fresh scheduler for images of the model's size, see `schedulers.make_scheduler`."""
        config = self.pipeline.scheduler.config
        return make_scheduler(sampler, config, spacing=spacing, **self.family.timesteps(config, self.latent_shape))


def resolve_device(name: str) -> torch.device:
    """`auto` takes the accelerator where there is one.

    Raises:
        InputError: the device's name is unknown, or this machine lacks it.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        # There and back: the device meta keeps no numbers.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"can't use the device {name!r}: {one_line(error).partition('. ')[0]}") from None
    return device


def default_dtype(device: torch.device, family: Family) -> torch.dtype:
    """FP32 on a CPU; on an accelerator the family's half precision, FP16 as a rule."""
    return torch.float32 if device.type == "cpu" else family.half


def locate(model: str, *, weights: bool = True) -> ModelFiles:
    """Find `emoji64`, a pipeline folder, or a hub id such as "organization/name", and read its configuration.

    Of a hub id the configuration alone is fetched; its weights when they are first read, without `weights` never.

    Raises:
        InputError: there is no such model, or it is not one that can be used.
    """
    folder = embedded.MODEL_DIR if model == embedded.MODEL_NAME else Path(model)
    # Those of `os.path` say no of a name that is too long, too.
    if os.path.isfile(folder):
        raise InputError(
            f"{folder} is one file: make a pipeline folder of it once, in Python, with diffusers' "
            f"StableDiffusionPipeline.from_single_file({str(folder)!r}).save_pretrained(FOLDER) "
            "(of SDXL, StableDiffusionXLPipeline), and pass that"
        )
    hub_id = None if os.path.exists(folder) else model
    if hub_id:
        missing = f"there is no model {hub_id!r}: pass {embedded.MODEL_NAME}, a diffusers pipeline folder or a hub id"
        if not HUB_ID.fullmatch(hub_id):
            raise InputError(missing)
        folder = configuration_of(hub_id, missing=missing)
    if not (folder / "model_index.json").is_file():
        _refuse_broken_links(folder)
        raise InputError(f"{folder} is no diffusers pipeline folder: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    family = family_of(index)
    components = check_folder(folder, family, index)
    return ModelFiles(
        name=model,
        folder=folder,
        family=family,
        denoiser_config=family.denoiser_config(components[family.denoiser]),
        vae_config=components["vae"],
        scheduler_config=family.scheduler_config(components["scheduler"]),
        hub_id=hub_id if weights else None,
    )


def _refuse_broken_links(folder: Path) -> None:
    """A hub's cache holds links, which lead nowhere where they alone were copied."""
    if broken := next((path for path in sorted(folder.glob("*")) if not path.exists()), None):
        raise InputError(f"{broken} is a link to nothing: copy the files that such links lead to, as `cp -rL` does")


def load(
    files: ModelFiles,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    text_encoders: bool = True,
    int8: bool = False,
) -> Model:
    """Load the whole pipeline from safetensors, by default in `default_dtype`.

    With `int8`, the weights of the denoiser's linear layers are held in 8 bits, with a scale per output (torchao's
    `Int8WeightOnlyConfig`), and multiplied in `dtype`, see `int8_weights`.

    Raises:
        InputError: a file is missing, damaged or not safetensors.
    """
    dtype = dtype or default_dtype(device, files.family)
    variant, _ = files.denoiser_weights()
    names = files.family.text_encoders if text_encoders else ()
    encoders = load_text(files, names, device=torch.device("cpu"), dtype=dtype)
    vae = getattr(diffusers, read_json(files.folder / "model_index.json")["vae"][1])
    try:
        with without_bom(files.folder) as folder:
            # Its variant need not be the denoiser's.
            options = {"variant": variant_in(files.folder / "vae"), "use_safetensors": True, "local_files_only": True}
            decoder = vae.from_pretrained(folder / "vae", dtype=dtype, **options)
            pipeline = files.family.pipeline_class.from_pretrained(
                folder,
                dtype=dtype,
                vae=decoder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=True,
                **files.absent_components | dict.fromkeys(files.family.text_encoders) | encoders,
                **({"quantization_config": int8_weights(files.family.denoiser)} if int8 else {}),
                **files.family.load_options,
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # On damaged settings diffusers, transformers and tokenizers raise nearly anything, the last bare exceptions.
    except Exception as error:
        raise InputError(f"can't load the model in {files.folder}: {one_line(error)}") from None
    for name, component in pipeline.components.items():
        # diffusers leaves what a file lacks without numbers.
        tensors = component.state_dict().items() if isinstance(component, torch.nn.Module) else ()
        if lacking := [key for key, tensor in tensors if tensor.is_meta]:
            raise InputError(
                f"{files.folder / name} lacks tensors ({len(lacking)}, such as {lacking[0]}): save the model again, "
                "without a LoRA that is loaded (fuse_lora, unload_lora_weights)"
            )
    _check_special_tokens(pipeline, files)
    if int8:
        freeze_int8(getattr(pipeline, files.family.denoiser))
    prepare_for_inference(pipeline, files.family)
    return Model(files=files, pipeline=pipeline.to(device))


def _check_special_tokens(pipeline: DiffusionPipeline, files: ModelFiles) -> None:
    for name, encoder in zip(files.family.tokenizers, files.family.text_encoders, strict=True):
        if getattr(pipeline, encoder) is None:
            continue
        known = getattr(pipeline, encoder).config.get_text_config().vocab_size
        tokenizer = getattr(pipeline, name)
        if tokenizer.pad_token is None:
            raise InputError(
                f"{files.folder / name} has no padding token: tokenizer_config.json must name its pad_token"
            )
        unknown = [word for word in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(word) >= known]
        if unknown:
            raise InputError(
                f"{files.folder / name} has special tokens that {encoder} does not know: {', '.join(unknown)}"
            )


def prepare_for_inference(pipeline: DiffusionPipeline, family: Family) -> None:
    """Make a pipeline, its weights in their final dtype, ready to draw, in place.

    That is frozen, laid out for speed, and in FP32 where FP16 overflows.
    """
    pipeline.set_progress_bar_config(disable=True)
    # The VAE is all convolutions, which run faster on this layout (by a third on a CPU).
    if not family.video_vae:
        pipeline.vae.to(memory_format=torch.channels_last)
    denoiser = getattr(pipeline, family.denoiser)
    for name in (family.denoiser, "vae", *family.present_text_encoders(pipeline)):
        getattr(pipeline, name).requires_grad_(False).eval()
    if denoiser.dtype != torch.float16:
        return
    if family.upcasts(pipeline.vae.config):
        pipeline.vae.float()
    keep_attention_in_fp32(denoiser)


def set_attention(denoiser: torch.nn.Module, processor: Any) -> None:
    """As diffusers' `set_attn_processor`, of UNets; processors for live negative prompts stay, and compute as this one.

    Transformers, whose attention is of other classes, are left as they are, and so is attention with keys and values
    of its own for the text (`SimpleCrossAttnDownBlock2D`), which the plain processors would leave out.
    """
    for module in denoiser.modules() if isinstance(denoiser, UNet2DConditionModel) else ():
        if isinstance(module, Attention):
            if hasattr(module.processor, "stock"):
                module.processor.stock = processor
            elif module.added_kv_proj_dim is None:
                module.set_processor(processor)


def keep_attention_in_fp32(denoiser: Any) -> bool:
    """Let a UNet's attention scores be computed in FP32 where its `upcast_attention` asks for it, and say so.

    diffusers' default processor ignores it; Stable Diffusion 2.1 at 768 pixels overflows in FP16 without.
    """
    wanted = bool(denoiser.config.get("upcast_attention"))
    if wanted:
        set_attention(denoiser, AttnProcessor())
    return wanted
