"""What commands share: the console, a progress bar, JSON output, and errors in one line."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# No command needs TensorFlow or JAX, and importing them beside torch takes seconds.
os.environ.setdefault("USE_TF", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# How often OpenMP's threads look for work before they sleep. Where another process takes one of two cores, the thread
# that waits keeps the other from the free core: by the default, 300,000, an update of `distill` then takes 4 to 9 s in
# place of 0.4, by 5,000 1.0, and where nothing else runs as long as before.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Of a terminal whose width is unknown; rich would print nothing in it.
if os.environ.get("COLUMNS") == "0":
    del os.environ["COLUMNS"]

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .errors import BoostDiffError, one_line
from .files import is_full_disk, is_unusable_path
from .options import check_not_empty

console = Console(stderr=True, emoji=False)

# From 0.26 on typer carries a copy of click: reach the exceptions through typer, whichever it is.
_UsageError: Any = typer.BadParameter.__base__


def quiet_libraries() -> None:
    """Warnings and progress bars of diffusers and transformers help no user."""
    # diffusers imports torchao where it is installed, which warns of what this machine lacks; the hub's client tells of
    # each retry.
    for name in ("torchao", "torch.utils._pytree", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def is_main_process() -> bool:
    """Whether this is the one of `accelerate launch`'s processes that speaks."""
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """Plain JSON values, on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


class _NotedProgress(Progress):
    """Progress bars with their notes below: beside them they would take bar and times from a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """See `Progress.get_renderables`."""
        yield from super().get_renderables()
        for task in self.tasks:
            if note := task.fields["note"]:
                yield Text(f"  {note}", style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Any]:
    """A bar with an estimate on standard error; yields `advance(count, **columns)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = _NotedProgress(*columns, console=console)
    task = progress.add_task(description, total=total, note="")

    def advance(count: int = 1, **fields: Any) -> None:
        # Started late: wrong input must leave nothing but its one line on standard error.
        if not progress.live.is_started and is_main_process():
            progress.start()
        progress.update(task, advance=count, **fields)

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


class _Lenient(io.FileIO):
    """A standard stream that takes all: what a full disk or a closed pipe can't take is lost."""

    full: OSError | None = None
    """Why something was lost, beside a reader that had enough."""

    def write(self, content: Any, /) -> int:
        """See `io.FileIO.write`."""
        try:
            return super().write(content) or 0
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.full = error
            return len(content)


def next_command(command: str, **options: tuple[object, object]) -> str:
    """What to run next, with those options that are not their defaults: by name `(value, default)`."""
    given = {name: str(value) for name, (value, default) in options.items() if str(value) != str(default)}
    return shlex.join(["boostdiff", *command.split(), *(word for name in given for word in (f"--{name}", given[name]))])


def _prepare_streams() -> _Lenient:
    """Let standard output and standard error take anything; returns what is below standard output.

    In a plain locale the process starts anew in Python's UTF-8 mode: words and paths beyond ASCII come through.
    """
    if sys.getfilesystemencoding() == "ascii":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file to be opened takes the number, and gets what libraries print.
            os.open(os.devnull, os.O_RDWR)
    streams = {"stdout": _Lenient(1, "w", closefd=False), "stderr": _Lenient(2, "w", closefd=False)}
    for name, raw in streams.items():
        stream = getattr(sys, name)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        lenient = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="replace", line_buffering=True)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, lenient)
    return streams["stdout"]


def run(app: typer.Typer) -> None:
    """Run a command and end the process: errors as one line on standard error and exit code 1 or 2."""
    output = _prepare_streams()
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        check_not_empty(app, sys.argv[1:])
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if not code and output.full:
            raise BoostDiffError(f"not all could be written to standard output: {output.full.strerror}")
        # What typer makes of Ctrl-C.
        sys.exit(_report(typer.Abort()) if code == 130 else code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(_report(typer.Abort()))


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has an exception of its own for GPUs alone, and here it may not even be imported."""
    kinds = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in kinds or bool(re.search(r"can't allocate memory|not enough memory", one_line(error)))


def _report(error: Exception) -> int:
    """Print one line, and give the exit code."""
    if isinstance(error, BoostDiffError):
        message, code = str(error), error.exit_code
    elif isinstance(error, _UsageError):
        # `boostdiff` without arguments ends here too, with the help printed and no message.
        message, code = error.format_message(), 2
    elif is_full_disk(error):
        message, code = f"the disk is full: free some space, or choose another --output ({error})", 2
    elif is_unusable_path(error):
        message, code = f"can't use {error.filename}: {error.strerror}", 2  # type: ignore[attr-defined]
    elif _is_out_of_memory(error):
        message, code = "out of memory: pass smaller sizes or batches, stop what else runs, or pass another --device", 1
    elif isinstance(error, typer.Abort):
        message, code = "interrupted", 130
    else:
        name, text = type(error).__name__, one_line(error)
        message, code = f"{name if text == name else f'{name}: {text}'} (--debug shows where)", 1
    if message:
        sys.stderr.write(f"boostdiff: error: {' '.join(message.split())}\n")
    return code
