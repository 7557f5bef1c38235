"""Kill exports at random moments, and look at what stands after each.

python -m boostdiff.benchmarks.kill_export [--student DIR] [--kills 10] [-- more options of `boostdiff export`]
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from ..engine.errors import BoostDiffError
from ..engine.manifest import read_manifest, verified_file

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def verified(engine: Path) -> dict[str, str]:
    """SHA-256 by file of an engine, each compared with its manifest.

    Raises:
        InputError: it is not whole.
    """
    manifest = read_manifest(engine)
    for name in manifest.files:
        verified_file(engine, manifest, name)
    return manifest.files


def run(command: list[str], seconds: float | None = None) -> bool:
    """Run a command, killed after so many seconds; whether it came to its end before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if process.returncode:
        raise BoostDiffError(f"the export ended with code {process.returncode}: run it by hand to see why")
    return True


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    student: Annotated[Path, typer.Option(help="Its folder.")] = Path("outputs/student"),
    kills: Annotated[int, typer.Option(min=1, help="Exports over the first, each killed.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Print what stands after each kill; fails if it is ever anything but the whole engine."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="boostdiff-kill-") as scratch:
        engine = Path(scratch) / "engine"
        options = ["--student", str(student), "--output", str(engine), "--force", *context.args]
        command = [sys.executable, "-m", "boostdiff", "export", *options]
        began = time.monotonic()
        run(command)
        duration, expected = time.monotonic() - began, verified(engine)
        for number in range(1, kills + 1):
            seconds = duration * moments.uniform(0.05, 1)
            ended = run(command, seconds)
            if verified(engine) != expected:
                raise BoostDiffError(f"kill {number} after {seconds:.1f} s: other bytes in the engine")
            beside = len(list(engine.parent.iterdir())) - 1
            how = "too late, it had ended" if ended else f"{beside} unfinished beside the whole engine"
            print(f"kill {number} after {seconds:.1f} of {duration:.1f} s: {how}", flush=True)
        run(command)
        left = sorted(path.name for path in engine.parent.iterdir() if path != engine)
        if verified(engine) != expected or left:
            raise BoostDiffError(f"the last export gave other bytes, or left {', '.join(left)}")
    print(f"{kills} exports killed over a standing engine: it stayed whole, and the next one gave the same bytes")


if __name__ == "__main__":
    app()
