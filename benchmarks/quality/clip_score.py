"""CLIP score: how well an image fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from ...engine import embedded
from ...engine.errors import InputError, one_line
from ...engine.files import hash_of, sha256_of
from ...engine.model import HASHED, HUB_ID
from ...engine.text_encoders import check_complete

BATCH = 32


class ClipScorer:
    """100 · max(cos(image, prompt), 0) by a CLIP model (Hessel et al. 2021, with torchmetrics' weight of 100)."""

    def __init__(self, name: str, *, device: torch.device) -> None:
        """Load from the safetensors of a folder, or of a hub id such as "openai/clip-vit-base-patch16"."""
        # Here, as most benchmarks need none of it.
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
            raise InputError(f"there is no CLIP model {name!r}: pass a folder or a hub id, ORGANIZATION/NAME")
        try:
            # The processor of PIL needs no torchvision, and is the one that CLIP was made with.
            self._images = CLIPImageProcessorPil.from_pretrained(name)
            self._tokens = AutoTokenizer.from_pretrained(name)
            self._model, report = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, HFValidationError) as error:
            raise InputError(
                f"can't load the CLIP model {name!r}: pass a folder or a hub id ({one_line(error)})"
            ) from None
        check_complete(report, name)
        self._model.to(device).eval().requires_grad_(False)
        path = Path(name).resolve()
        # The embedded caption model scores lower than CLIP does: its figures must not be taken for CLIP's.
        score = "caption score" if path == embedded.CAPTION_MODEL else "CLIP score"
        self.label = f"{score} ({path.name})"
        # Tokenizer and preprocessor, too.
        files = sorted(file for file in Path(name).glob("*") if file.suffix in HASHED)
        commit = getattr(self._model.config, "_commit_hash", None)
        self.sha256 = hash_of([sha256_of(file) for file in files]) if files else f"{name}@{commit}"

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores `(N,)` float32 of uint8 images `(N, 3, H, W)` by N prompts, on the CPU; 0 to 100."""
        of_images, of_prompts = self.embeddings(images, prompts)
        return (of_images * of_prompts).sum(dim=1).clamp_min(0) * 100

    @torch.inference_mode()
    def embeddings(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of length 1, each `(N, D)` float32 on the CPU, of uint8 images `(N, 3, H, W)` and N prompts."""
        of_images, of_prompts = [], []
        for start in range(0, len(images), BATCH):
            pixels = self._images(list(images[start : start + BATCH]), return_tensors="pt")
            tokens = self._tokens(
                list(prompts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            outputs = self._model(**pixels.to(self._model.device), **tokens.to(self._model.device))
            of_images.append(outputs.image_embeds.float().cpu())
            of_prompts.append(outputs.text_embeds.float().cpu())
        return torch.cat(of_images), torch.cat(of_prompts)
