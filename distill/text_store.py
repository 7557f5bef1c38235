"""Text embeddings, each computed once: in memory, or on disk, so that a run holds no text encoder in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..engine.conditions import PromptEmbeds
from ..engine.errors import InputError, one_line
from ..engine.files import give_modes, read_json
from ..engine.model import Model, ModelFiles
from ..engine.text_encoders import load_text
from ..engine.versions import versions

CACHED_BYTES = 2**30


class _StandIn(SimpleNamespace):
    """An unneeded component, but for what pipelines read of it; a plain `SimpleNamespace` has no `__module__`."""


class TextStore:
    """A folder with a file of embeddings for each prompt.

    Several models, sizes, precisions and versions of the libraries that encode may share it.
    """

    def __init__(self, folder: Path, files: ModelFiles, dtype: torch.dtype) -> None:
        self.folder, self.files, self.dtype = folder, files, dtype
        hashes = files.other_sha256()
        parts = {name: hashes.get(name) for name in (*files.family.text_encoders, *files.family.tokenizers)}
        size = files.family.latent_shape(files.denoiser_config)
        self._index = read_json(files.folder / "model_index.json")
        pixels = files.family.pixels_per_latent(files.vae_config)
        settings, installed = files.family.settings(self._index), versions()
        # Instructions, masks and padding of prompts are diffusers' and transformers' code.
        libraries = [installed[name] for name in ("diffusers", "transformers")]
        self.identity = [files.family.name, parts, list(size), pixels, str(dtype), settings, libraries]

    def path(self, prompt: str, *, negative: bool) -> Path:
        """Where a prompt's embeddings lie."""
        digest = hashlib.sha256(json.dumps([self.identity, negative, prompt]).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def read(self, prompt: str, *, negative: bool) -> PromptEmbeds:
        """A prompt's embeddings, a batch of 1 on the CPU.

        Raises:
            InputError: the file is missing or damaged.
        """
        path = self.path(prompt, negative=negative)
        try:
            return PromptEmbeds(**load_file(path))
        except (OSError, SafetensorError) as error:
            raise InputError(f"can't read the text embeddings in {path}: {one_line(error)}; delete the file") from None

    @torch.no_grad()
    def fill(self, prompts: Sequence[str], negatives: Sequence[str], device: torch.device) -> int:
        """Encode what is not there yet, with the text encoders alone in memory; how many texts that were.

        Raises:
            InputError: the folder can't be written, or a text encoder can't be loaded.
        """
        wanted = dict.fromkeys([(text, False) for text in prompts] + [(text, True) for text in negatives])
        missing = [(text, negative) for text, negative in wanted if not self.path(text, negative=negative).exists()]
        if not missing:
            return 0
        pipeline, family = self._text_pipeline(device), self.files.family
        for text, negative in missing:
            embeds = family.embed_negative(pipeline, text) if negative else family.embed(pipeline, [text])
            path = self.path(text, negative=negative)
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            try:
                # A link may lead to a folder that is to be made.
                path.parent.resolve().mkdir(parents=True, exist_ok=True)
                save_file({name: x.cpu().contiguous() for name, x in embeds.tensors().items()}, partial)
                give_modes(partial)
                partial.replace(path)
            except OSError as error:
                # Below a file nothing can be removed, either.
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise InputError(f"can't write text embeddings into {self.folder}: {one_line(error)}") from None
        return len(missing)

    def _text_pipeline(self, device: torch.device) -> Any:
        """A stock pipeline of tokenizers and text encoders; of the other components it has the configurations."""
        files, family = self.files, self.files.family

        def stand_in(config: dict[str, Any]) -> _StandIn:
            # Read off the module, of a video VAE.
            more = {"temperal_downsample": config.get("temperal_downsample")}
            return _StandIn(config=FrozenDict(config), dtype=self.dtype, device=device, **more)

        components: dict[str, Any] = {
            family.denoiser: stand_in(files.denoiser_config),
            "vae": stand_in(files.vae_config),
            "scheduler": getattr(diffusers, self._index["scheduler"][1]).from_config(dict(files.scheduler_config)),
        }
        names = (*family.tokenizers, *family.text_encoders)
        components |= load_text(files, names, device=device, dtype=self.dtype)
        return family.assemble(components, self._index)


class TextCache:
    """Embeddings of prompts (or negative prompts), each computed once, kept on the CPU in at most `CACHED_BYTES`."""

    def __init__(self, model: Model, *, negative: bool = False, store: TextStore | None = None) -> None:
        """Embed by the model's text encoders, or read from a store that has been filled."""
        self.model = model
        family, pipeline = model.family, model.pipeline
        if store is not None:
            # Few, as reading one again is cheap.
            self._embedded = lru_cache(maxsize=100)(lambda prompt: store.read(prompt, negative=negative))
            return
        numbers = sum(math.prod(shape) for shape in family.prompt_shapes(pipeline).values())
        # One at a time goes through the text encoder: the batch around a prompt changes its last bits, and a resumed
        # run must give the bytes of an uninterrupted one.
        self._embedded = lru_cache(maxsize=max(1, CACHED_BYTES // (4 * numbers)))(
            lambda prompt: (
                family.embed_negative(pipeline, prompt) if negative else family.embed(pipeline, [prompt])
            ).to("cpu")
        )

    def __call__(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of B prompts, float32, on the model's device."""
        found = PromptEmbeds.cat([self._embedded(prompt) for prompt in prompts])
        return found.to(self.model.device, torch.float32)
