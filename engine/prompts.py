"""Prompts: the files that hold them, and how many tokens of them a text encoder takes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError, one_line
from .families import FAMILIES
from .files import csv_rows, is_unicode, json_lines, lines_of, read_text

TEXT_FIELDS = ("text", "prompt", "caption")
_OTHER_SUFFIXES = {".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".rtf"}
_OTHER_FORMATS = re.compile(r"\s*(<\?xml|<!doctype|<html|\{\\rtf|%yaml|%pdf)", re.IGNORECASE)


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line; JSON lines or CSV by the field text, prompt or caption; or COCO captions.

    The format is known by the file's ending or its content. Blank lines and blank captions are skipped; a caption that
    spans lines becomes one line.

    Source of COCO's format: https://cocodataset.org/#format-data (`{"annotations": [{"caption": …}, …]}`).

    Raises:
        InputError: the file is missing, a pipe, not UTF-8, malformed, or has no prompt.
    """
    # Those of `os.path` say no of a name that is too long, too.
    if os.path.exists(path) and not path.is_file() and not path.is_dir():
        # A pipe has nothing at a second reading: not for JSON lines, and not for a resumed run that compares contents.
        raise InputError(f"the prompt file {path} is a pipe or a device, and it is read more than once: pass a file")
    text = read_text(path, "the prompt file ")
    suffix = path.suffix.lower()
    if suffix in _OTHER_SUFFIXES or _OTHER_FORMATS.match(text):
        raise InputError(f"the prompt file {path} is of another format: pass one prompt a line, JSON lines or CSV")
    lines = [line.strip() for line in lines_of(text) if line.strip()]
    # Prompts have commas: by these a table is known by its name alone.
    heading = re.split(r"[;\t]", lines[0]) if lines else []
    first = _parsed(lines[0]) if lines else None
    if suffix in {".jsonl", ".ndjson"} or (
        suffix != ".json" and isinstance(first, dict) and "annotations" not in first
    ):
        prompts = _texts(json_lines(path), path)
    elif suffix in {".csv", ".tsv"} or (len(heading) > 1 and _field(name.strip(' "') for name in heading)):
        prompts = _texts(csv_rows(path), path)
    elif suffix == ".json" or isinstance(_parsed(text), dict | list):
        prompts = _coco_captions(text, path)
    else:
        prompts = lines
    prompts = [" ".join(prompt.split()) if prompts is not lines else prompt for prompt in prompts if prompt.strip()]
    if broken := next((prompt for prompt in prompts if not is_unicode(prompt)), None):
        raise InputError(f"the prompt file {path} holds half a character, which is no text: {broken!a}")
    if not prompts:
        raise InputError(f"the prompt file {path} is empty: it has no captions and no lines with a prompt")
    return prompts


def _parsed(text: str) -> Any:
    """The value of JSON; None of other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _field(names: Iterable[str]) -> str | None:
    """The one of `TEXT_FIELDS` that is among some names."""
    found = set(names)
    return next((field for field in TEXT_FIELDS if field in found), None)


def _texts(rows: Iterable[tuple[int, dict[str, Any]]], path: Path) -> list[str]:
    texts, field = [], None
    for number, row in rows:
        field = field or _field(row)
        value = row.get(field) if field else None
        if not isinstance(value, str):
            fields = field or ", ".join(TEXT_FIELDS[:-1]) + f" or {TEXT_FIELDS[-1]}"
            raise InputError(f"the prompt file {path} line {number} lacks the text {fields}")
        texts.append(value)
    return texts


def _coco_captions(text: str, path: Path) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the prompt file {path} is not JSON: {one_line(error)}") from None
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


def token_limit(pipeline: Any) -> int:
    """The most tokens of a text that any text encoder of a pipeline takes, its start and end among them."""
    return max(limit for _, limit in _tokenizers(pipeline).values())


def is_truncated(pipeline: Any, text: str) -> bool:
    """Whether a text has more tokens than any text encoder takes, so that its end is lost."""
    return _cut_by(pipeline, text) == _tokenizers(pipeline).keys()


def truncation_note(pipeline: Any, texts: Iterable[str], what: str = "prompts") -> str | None:
    """One line that says how many of several texts are truncated, and to how many tokens; None where all are used.

    Those that one text encoder cuts and another reads whole are counted apart.
    """
    distinct, tokenizers = list(dict.fromkeys(texts)), _tokenizers(pipeline)
    cuts = [_cut_by(pipeline, text) for text in distinct]
    lost, notes = cuts.count(set(tokenizers)), []
    if lost:
        notes.append(f"{lost} of {len(distinct)} {what} are cut to {token_limit(pipeline)} tokens")
    if partly := [names for names in cuts if names and names != tokenizers.keys()]:
        short: set[str] = set().union(*partly)
        limit = min(tokenizers[name][1] for name in short)
        cutting, reading = _kinds(pipeline, short), _kinds(pipeline, tokenizers.keys() - short)
        notes.append(
            f"{len(partly)} of {len(distinct)} {what} are cut to {limit} tokens in {cutting}, not in {reading}"
        )
    return "; ".join(notes) or None


def _tokenizers(pipeline: Any) -> dict[str, tuple[Any, int]]:
    """Tokenizers by their names in the pipeline, and the most tokens that they may make."""
    family = FAMILIES[type(pipeline).__name__]
    found = {name: getattr(pipeline, name, None) for name in family.tokenizers}
    return {
        name: (tokenizer, family.max_tokens(pipeline, name))
        for name, tokenizer in found.items()
        if tokenizer is not None
    }


def _kinds(pipeline: Any, names: Iterable[str]) -> str:
    """Tokenizers in words, such as "CLIP"."""
    classes = {type(getattr(pipeline, name)).__name__ for name in names}
    return " and ".join(sorted(re.sub(r"Tokenizer(Fast)?$", "", name) for name in classes))


def _cut_by(pipeline: Any, text: str) -> set[str]:
    """The tokenizers that make more tokens of a text than their text encoders take."""
    return {
        name for name, (tokenizer, limit) in _tokenizers(pipeline).items() if len(tokenizer(text)["input_ids"]) > limit
    }
