"""The folder that results are written into: which files may be replaced there, and in which order that happens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...engine.errors import InputError
from ...engine.files import read_json, write_json
from ...engine.manifest import ENGINE_MARKERS
from ...engine.student import INFO_FILE

REPORT_FILES = ("report.json", "report.html", "grid.png")
"""All that `bench` writes; as of every such list, the first holds the figures, and says that the others are ours."""


def files_of(name: str) -> tuple[str, ...]:
    """All that a table of this name is written as."""
    return tuple(f"{name}.{suffix}" for suffix in ("json", "md", "html"))


def check_replaceable(output: Path, names: Sequence[str]) -> None:
    """Make sure, before any long work, that files of these names in a folder are ours to replace.

    Raises:
        InputError: one is somebody else's, or the folder is that of a student, an engine or a model.
    """
    if mark := next((mark for mark in (INFO_FILE, *ENGINE_MARKERS) if (output / mark).exists()), None):
        raise InputError(
            f"the output {output} is the folder of a student, an engine or a model (it holds {mark}): "
            "choose another --output"
        )
    there = next((name for name in names if (output / name).exists()), None)
    if there and not _is_ours(output / names[0]):
        raise InputError(
            f"the output {output} holds a {there} that `boostdiff bench` did not write: choose another --output"
        )


def _is_ours(path: Path) -> bool:
    try:
        return "schema_version" in read_json(path)
    except InputError:
        return False


@contextmanager
def written_results(output: Path, names: Sequence[str], figures: dict[str, Any]) -> Iterator[Path]:
    """Write figures, plain JSON values, to the first of these names in a folder; all else there stays.

    Yields a new folder, whose files take the other names if the block ends well. Those that were there go away at once,
    as they show other figures.
    """
    output.mkdir(parents=True, exist_ok=True)
    # Before any picture is drawn: if that fails, hours of measuring must not be lost.
    write_json(output / names[0], figures)
    for name in names[1:]:
        (output / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output) as folder:
        yield Path(folder)
        for path in (Path(folder, name) for name in names[1:]):
            if path.is_file():
                path.replace(output / path.name)
