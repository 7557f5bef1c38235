"""A model from its configuration files alone: random weights are as fast as trained ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer

from ...engine.errors import InputError
from ...engine.files import read_json, sha256_of, staged_folder
from ...engine.guidance_input import make_adapter
from ...engine.model import Model, ModelFiles, default_dtype, locate, prepare_for_inference
from ...engine.student import INFO_FILE, StudentInfo
from ...engine.versions import versions

CONFIGS = Path(__file__).parents[1] / "configs"
"""Configurations of public models; the command line takes the names of their folders."""


def locate_configs(model: str) -> ModelFiles:
    """Find a model's configuration: a folder of `CONFIGS` by its name, else as `engine.model.locate`.

    Raises:
        InputError: there is no such model, or no family handles it.
    """
    names = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
    if model in names:
        return dataclasses.replace(locate(str(CONFIGS / model)), name=model)
    try:
        return locate(model)
    except InputError as error:
        raise InputError(f"{error}; with --random-weights also {', '.join(names)}") from None


def random_model(files: ModelFiles, *, device: torch.device, seed: int = 0) -> Model:
    """Build a pipeline with randomly initialized weights.

    Args:
        files: the model's configuration; weight files are not read.
        device: where to put it.
        seed: seed of the weights.

    Raises:
        InputError: a configuration is missing or describes nothing that can be built.
    """
    index = read_json(files.folder / "model_index.json")
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    dtype = default_dtype(device)
    components: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, (library, class_name) in entries.items():
            if name in {"safety_checker", "feature_extractor", "image_encoder"}:
                continue
            components[name] = _component(files.folder / name, library, class_name)
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            # torch's method: that of diffusers warns of float32 layers that these do not have.
            torch.nn.Module.to(part, dtype)
    pipeline = files.family.assemble(components)
    prepare_for_inference(pipeline, files.family)
    return Model(files=files, pipeline=pipeline.to(device))


def _component(folder: Path, library: str, class_name: str) -> Any:
    if "Tokenizer" in class_name:
        return _tokenizer(folder, class_name)
    known = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), class_name, None)
    if known is None:
        raise InputError(f"{folder.parent / 'model_index.json'} names {library}.{class_name}, which is unknown here")
    try:
        if library == "diffusers":
            kind = "scheduler" if folder.name == "scheduler" else ""
            return known.from_config(read_json(folder / f"{kind}_config.json".lstrip("_")))
        return known(known.config_class(**read_json(folder / "config.json")))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{folder} describes no usable {class_name}: {error}") from None


def _tokenizer(folder: Path, class_name: str) -> Any:
    """The model's tokenizer where its words are there; else a stand-in, since prompts are padded to one length."""
    if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
        return getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    encoder = read_json(folder.with_name(folder.name.replace("tokenizer", "text_encoder")) / "config.json")
    stand_in = transformers.CLIPTokenizer(model_max_length=encoder["max_position_embeddings"])
    return stand_in.train_new_from_iterator(["a stand-in"], vocab_size=encoder["vocab_size"])


def write_model(name: str, output: Path, *, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a pipeline folder with random weights.

    Args:
        name: a folder of `benchmarks/configs`, or any folder with a pipeline's configuration.
        output: the folder to write.
        dtype: of the weights in it.
        seed: seed of the weights.

    Raises:
        InputError: there is no such configuration, or the output can't be written.
    """
    model = random_model(locate_configs(name), device=torch.device("cpu"), seed=seed)
    with staged_folder(output, replaces="model_index.json") as folder:
        model.pipeline.to(dtype).save_pretrained(folder, safe_serialization=True)


def write_student(model: Path, output: Path, *, rank: int = 8, seed: int = 0) -> StudentInfo:
    """Write a LoRA of random factors for a model folder, described as `distill` describes what it trains.

    Raises:
        InputError: the model can't be used, or the output can't be written.
    """
    files = locate(str(model))
    pipeline = files.family.pipeline_class
    unet = files.empty_unet().to_empty(device="cpu")
    adapter = make_adapter("lora", unet, rank=rank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    with staged_folder(output, replaces=INFO_FILE) as folder:
        paths = adapter.save(folder, pipeline)
        info = StudentInfo(
            method="lora",
            guidance=3.0,
            model=files.name,
            unet_sha256=files.unet_sha256(),
            adapter_files={path.name: sha256_of(path) for path in paths},
            trainable_parameters=adapter.count(),
            settings={"rank": rank, "random": True},
            versions=versions(),
        )
        info.write(folder)
    return info


def random_folder(
    model: Annotated[str, typer.Argument(help="sd15, sd21-base, sdxl, or a folder with a pipeline's configuration.")],
    output: Annotated[Path, typer.Option(help="Folder for `model` and `student`.")],
    half: Annotated[bool, typer.Option("--half", help="Write FP16 weights.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of all weights.")] = 0,
) -> None:
    """A model folder of a public model's size with random weights, and a student for it, a LoRA that was not trained.

    For export and speed at full size; nothing is downloaded.
    """
    write_model(model, output / "model", dtype=torch.float16 if half else torch.float32, seed=seed)
    info = write_student(output / "model", output / "student", seed=seed)
    print(f"{output / 'model'}: random weights; {output / 'student'}: LoRA of {info.trainable_parameters:,} parameters")
