"""Exported text encoders and VAE decoders, which stand in for the torch modules of a stock diffusers pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from .errors import InputError
from .family import Family
from .manifest import Manifest
from .model import default_dtype, locate
from .sessions import Session
from .text_encoders import load_text

HIDDEN_STATES = "hidden_states."
"""Prefix of a text encoder's outputs after each layer, numbered from 0, the embedding, as Optimum names them."""


class _ExportedPart(torch.nn.Module):
    """A session and the part's `config.json`. A module only so that pipelines see where it runs."""

    def __init__(self, session: Session, *, config: dict[str, Any]) -> None:
        super().__init__()
        self.session, self.config, self.device = session, FrozenDict(config), session.device
        self.dtype = next(iter(session.output_types.values()))


class ExportedTextEncoder(_ExportedPart):
    """A CLIP text encoder."""

    def forward(self, input_ids: torch.Tensor, attention_mask: None = None, **options: Any) -> Any:
        """As `CLIPTextModel.forward`, or `CLIPTextModelWithProjection.forward` where the graph has `text_embeds`.

        `input_ids` are `(B, L)`; no Stable Diffusion uses the mask; hidden states are there where a family needs them.
        """
        batch, length = input_ids.shape
        widths = {"pooler_output": (self.config["hidden_size"],), "text_embeds": (self.config.get("projection_dim"),)}
        hidden = (length, self.config["hidden_size"])
        results = {
            name: torch.empty(batch, *widths.get(name, hidden), dtype=self.dtype, device=self.device)
            for name in self.session.output_types
        }
        self.session.run({"input_ids": input_ids}, results)
        states = sorted(
            (name for name in results if name.startswith(HIDDEN_STATES)), key=lambda n: int(n.split(".")[1])
        )
        hidden_states = tuple(results.pop(name) for name in states) or None
        if "text_embeds" in results:
            return CLIPTextModelOutput(**results, hidden_states=hidden_states)
        return BaseModelOutputWithPooling(**results, hidden_states=hidden_states)


class ExportedVaeDecoder(_ExportedPart):
    """The decoding half of a VAE; the configuration is the whole VAE's."""

    def __init__(self, session: Session, *, config: dict[str, Any], pixels_per_latent: int) -> None:
        super().__init__(session, config=config)
        self.pixels_per_latent = pixels_per_latent
        # Pipelines of video VAEs read it off the module.
        self.temperal_downsample = config.get("temperal_downsample")

    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """As `AutoencoderKL.decode`: `(B, C, H, W)` to `(B, 3, f H, f W)`; the generator is not used there either.

        Of a video VAE one frame, `(B, C, 1, H, W)` to `(B, 3, 1, f H, f W)`.
        """
        if latents.ndim == 5:
            image = self.decode(latents[:, :, 0], return_dict=False)[0][:, :, None]
            return DecoderOutput(sample=image) if return_dict else (image,)
        factor = self.pixels_per_latent
        batch, _, height, width = latents.shape
        shape = (batch, 3, factor * height, factor * width)
        image = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.session.run({"latent_sample": latents}, {"sample": image})
        return DecoderOutput(sample=image) if return_dict else (image,)


def text_in_torch(manifest: Manifest, family: Family, *, device: torch.device) -> dict[str, Any]:
    """The text encoders that an engine does not hold, with their tokenizers, from the model that it was made from.

    Raises:
        InputError: the model is gone, or is another.
    """
    missing = [name for name in family.text_encoders if name not in family.exported_text_encoders]
    missing = [name for name in missing if name in manifest.inputs]
    if not missing:
        return {}
    try:
        files = locate(manifest.model)
    except InputError as error:
        raise InputError(f"the engine has no {missing[0]}, it is taken from the model's folder: {error}") from None
    names = [each for encoder in missing for each in (encoder, encoder.replace("text_encoder", "tokenizer"))]
    hashes = files.other_sha256()
    for name in names:
        if hashes.get(name) != manifest.inputs.get(name):
            raise InputError(f"{files.folder / name} is not what the engine was exported with: export again")
    return load_text(files, names, device=device, dtype=default_dtype(device, family))
