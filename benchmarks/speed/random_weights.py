"""A model from its configuration files alone: random weights are as fast as trained ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

from ...engine.errors import InputError
from ...engine.files import read_json
from ...engine.model import Model, ModelFiles, component_from_config, default_dtype, locate, prepare_for_inference

CONFIGS = Path(__file__).parents[1] / "configs"
"""Configurations of public models."""

PUBLIC = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
"""Their names, which the command line takes."""


def locate_configs(model: str) -> ModelFiles:
    """Find a model's configuration: one of `PUBLIC`, else as `engine.model.locate`."""
    if model in PUBLIC:
        return dataclasses.replace(locate(str(CONFIGS / model)), name=model)
    try:
        return locate(model)
    except InputError as error:
        raise InputError(f"{error}; for random weights also {', '.join(PUBLIC)}") from None


def random_model(files: ModelFiles, *, device: torch.device, seed: int = 0) -> Model:
    """Build a pipeline from a model's configuration, with randomly initialized weights; weight files are not read.

    The weights depend on the seed and the kind of device.
    """
    index = read_json(files.folder / "model_index.json")
    dtype = default_dtype(device, files.family)
    components: dict[str, Any] = {}
    # On the device: billions of random numbers take a processor minutes.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        for name in sorted(files.family.component_classes.keys() - files.absent_components.keys()):
            folder, (library, class_name) = files.folder / name, index[name]
            if "Tokenizer" in class_name:
                component = _tokenizer(folder, class_name)
            else:
                component = component_from_config(folder, library, class_name)
            components[name] = component
            if isinstance(component, torch.nn.Module):
                # At once: in float32 all of them may not fit. By torch's method: that of diffusers warns of float32
                # layers that these do not have.
                torch.nn.Module.to(component, dtype)
    pipeline = files.family.assemble(components, index)
    prepare_for_inference(pipeline, files.family)
    return Model(files=files, pipeline=pipeline.to(device))


def _tokenizer(folder: Path, class_name: str) -> Any:
    """The model's tokenizer where its words are there; else a stand-in, since prompts are padded to one length."""
    if (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file():
        return getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    encoder = read_json(folder.with_name(folder.name.replace("tokenizer", "text_encoder")) / "config.json")
    encoder = encoder.get("text_config", encoder)
    stand_in = transformers.CLIPTokenizer(model_max_length=encoder.get("max_position_embeddings", 512))
    return stand_in.train_new_from_iterator(["a stand-in"], vocab_size=encoder["vocab_size"])
