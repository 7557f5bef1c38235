"""Prompt files."""

from __future__ import annotations

from pathlib import Path

from .errors import InputError


def read_prompts(path: Path) -> list[str]:
    """Read a UTF-8 file with one prompt a line; blank lines are skipped.

    Raises:
        InputError: the file is missing, not UTF-8, or has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"the prompt file {path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"can't read the prompt file {path}: {error.strerror}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"the prompt file {path} is empty: it needs one prompt a line")
    return prompts
