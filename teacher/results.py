"""Results that are kept as they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..engine.files import read_json, write_json

T = TypeVar("T")


def remembered(path: Path, key: str, measure: Callable[[], T]) -> T:
    """A result by its key: read from a JSON file if it is there, else measured and added to the file.

    Args:
        path: the file; it is made, with its folder, when first needed.
        key: names all that the result depends on.
        measure: gives a plain JSON value.

    Raises:
        InputError: the file is there, but is no JSON object.
    """
    known = read_json(path) if path.exists() else {}
    if key not in known:
        known[key] = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return known[key]
