"""Kill a distillation at random moments, resume it each time, and compare its adapter with an unbroken run's.

python -m boostdiff.benchmarks.kill_and_resume [--kills 20] [-- more options of `boostdiff distill`]
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
from ..engine.student import read_student

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def seconds_to_first_checkpoint(command: list[str], unfinished: Path) -> float:
    """How long a run takes to get going: kills before that would never let it advance."""
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    while not (unfinished / "checkpoint.safetensors").exists():
        if process.poll() is not None:
            raise BoostDiffError("the run ended before its first checkpoint: give it more --updates")
        time.sleep(0.05)
    process.kill()
    process.wait()
    return time.monotonic() - began


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs over the run.")] = 20,
    updates: Annotated[int, typer.Option(min=10, help="Of the run.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Print how each leg ended, and whether the bytes are equal; exit code 1 if not."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="boostdiff-kill-") as scratch:
        folders = {name: Path(scratch) / name for name in ("whole", "cut")}

        def command(name: str, *more: str) -> list[str]:
            own = ["--updates", str(updates), "--checkpoint-every", "1", "--output", str(folders[name])]
            return [sys.executable, "-m", "boostdiff", "distill", *own, *context.args, *more]

        subprocess.run(command("whole"), check=True, stderr=subprocess.DEVNULL)  # noqa: S603
        unfinished = folders["cut"].with_name("cut.unfinished")
        start = seconds_to_first_checkpoint(command("cut"), unfinished)
        done = 1
        while done < kills and not folders["cut"].exists():
            process = subprocess.Popen(command("cut", "--resume"), stderr=subprocess.DEVNULL)  # noqa: S603
            try:
                process.wait(timeout=start * moments.uniform(0.2, 1.6))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                log = (unfinished / "log.jsonl").read_text(encoding="utf-8")
                print(f"kill {done}: {log.count(chr(10))} updates logged", flush=True)
        if not folders["cut"].exists():
            subprocess.run(command("cut", "--resume"), check=True, stderr=subprocess.DEVNULL)  # noqa: S603
        whole, cut = (read_student(folders[name]).adapter_files for name in ("whole", "cut"))
    print(f"{done} kills over {updates} updates: {'equal' if whole == cut else 'DIFFERENT'} bytes ({whole})")
    raise typer.Exit(int(whole != cut))


if __name__ == "__main__":
    app()
