"""Models of the hub: their configuration at once, their weights, which can be gigabytes, when they are needed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from textwrap import shorten

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from .errors import InputError


def _says(error: Exception) -> str:
    # Diffusers says of all errors that its cache lacks the model, and points to the cause. What a repository asks for
    # stands in later lines.
    return f"the hub says: {shorten(str(error.__cause__ or error), width=500)}"


def configuration_of(hub_id: str, *, missing: str) -> Path:
    """The folder of a model in the hub's cache, its configuration in it, with or without its weights.

    Raises:
        InputError: there is no such model, as `missing` says, or the hub can't be reached.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["model_index.json", "*/*.json"]))
    # The hub client raises dozens of types, from "repository not found" to the socket's.
    except Exception as error:
        raise InputError(f"{missing} (no such folder here or in the hub's cache, and {_says(error)})") from None


@lru_cache
def fetch_weights(hub_id: str, revision: str) -> None:
    """Fetch into that folder what else its pipeline is loaded from: no pickles, no safety checker.

    `revision` is the configuration's, the name of its folder.

    Raises:
        InputError: the hub can't be reached, or gives no safetensors weights.
    """
    reasons = []
    # Some repositories hold the fp16 variant alone.
    for variant in (None, "fp16"):
        try:
            # A part that is passed is not fetched.
            folder = DiffusionPipeline.download(
                hub_id, revision=revision, use_safetensors=True, variant=variant, safety_checker=None
            )
        except Exception as error:
            reasons.append(_says(error))
            continue
        if any(path for part in ("unet", "transformer") for path in (Path(folder) / part).glob("*.safetensors")):
            return
    if len(reasons) == 2:
        raise InputError(f"can't fetch the weights of {hub_id}: {reasons[0]}")
