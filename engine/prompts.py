"""Prompt files."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import InputError


def read_prompts(path: Path) -> list[str]:
    """Read a UTF-8 file with one prompt a line, or the captions of a COCO captions file, which ends in `.json`.

    Blank lines and blank captions are skipped; a caption that spans lines becomes one line.

    Source of the format: https://cocodataset.org/#format-data (`{"annotations": [{"caption": …}, …]}`).

    Raises:
        InputError: the file is missing, not UTF-8, malformed, or has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"the prompt file {path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"can't read the prompt file {path}: {error.strerror}") from None
    if path.suffix.lower() == ".json":
        prompts = [" ".join(caption.split()) for caption in _coco_captions(text, path) if caption.strip()]
        if not prompts:
            raise InputError(f"the prompt file {path} has no captions")
        return prompts
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"the prompt file {path} is empty: it needs one prompt a line")
    return prompts


def _coco_captions(text: str, path: Path) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the prompt file {path} is not JSON: {error}") from None
    annotations = value.get("annotations") if isinstance(value, dict) else None
    if not isinstance(annotations, list):
        raise InputError(f"the prompt file {path} is no COCO captions file: it lacks the list annotations")
    captions = []
    for number, annotation in enumerate(annotations, start=1):
        caption = annotation.get("caption") if isinstance(annotation, dict) else None
        if not isinstance(caption, str):
            raise InputError(f"the prompt file {path} lacks the text caption in annotation {number}")
        captions.append(caption)
    return captions
