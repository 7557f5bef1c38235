"""Text encoders and tokenizers of a model's folder, read without the rest of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .errors import InputError, one_line
from .files import read_json, without_bom

if TYPE_CHECKING:
    from .model import ModelFiles


def load_text(files: ModelFiles, names: Iterable[str], *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Text encoders and tokenizers of a folder, by their names in a pipeline; those that it leaves out are not there.

    Raises:
        InputError: a file is missing, damaged, incomplete or not safetensors, or can't be fetched.
    """
    files.fetch()
    index, found = read_json(files.folder / "model_index.json"), dict[str, Any]()
    with without_bom(files.folder) as root:
        for name in names:
            if name in files.absent_components:
                continue
            known, folder = getattr(transformers, index[name][1]), files.folder / name
            try:
                if "tokenizer" in name:
                    found[name] = known.from_pretrained(root / name, local_files_only=True)
                    continue
                encoder, report = known.from_pretrained(
                    root / name,
                    local_files_only=True,
                    dtype=dtype,
                    use_safetensors=True,
                    variant=variant_in(folder),
                    output_loading_info=True,
                )
            except (torch.OutOfMemoryError, MemoryError):
                raise
            # On damaged settings transformers and tokenizers raise nearly anything, the last bare exceptions.
            except Exception as error:
                raise InputError(f"can't load {folder}: {one_line(error)}") from None
            check_complete(report, folder)
            found[name] = encoder.to(device).requires_grad_(False).eval()
    return found


def variant_in(folder: Path) -> str | None:
    """ "fp16" where there is nothing else."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def check_complete(report: dict[str, Any], folder: str | Path) -> None:
    """Refuse a model whose file lacked tensors, for which transformers has drawn random numbers.

    `report` is what `from_pretrained` gives with `output_loading_info`.

    Raises:
        InputError: there are such tensors.
    """
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{folder} lacks tensors ({len(missing)}, such as {missing[0]}): save or download it again")
