"""A distillation of `emoji64`, killed at random moments and resumed each time, gives an unbroken run's bytes."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from boostdiff.engine.student import read_student

KILLS, UPDATES, BATCH_SIZE = 20, 150, 8


def seconds_to_first_checkpoint(command: list[str], unfinished: Path) -> float:
    """How long a run takes to get going: kills before that would never let it advance."""
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (unfinished / "checkpoint.safetensors").exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.05)
    process.kill()
    process.wait()
    return time.monotonic() - began


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    moments = random.Random(0)
    folders = {name: tmp_path / name for name in ("whole", "cut")}

    def command(name: str, *more: str) -> list[str]:
        own = ["--updates", str(UPDATES), "--batch-size", str(BATCH_SIZE), "--checkpoint-every", "1"]
        return [sys.executable, "-m", "boostdiff", "distill", *own, "--output", str(folders[name]), *more]

    subprocess.run(command("whole"), check=True, stderr=subprocess.DEVNULL)
    unfinished = folders["cut"].with_name("cut.unfinished")
    start = seconds_to_first_checkpoint(command("cut"), unfinished)
    done = 1
    while done < KILLS and not folders["cut"].exists():
        process = subprocess.Popen(command("cut", "--resume"), stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=start * moments.uniform(0.2, 1.6))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            # A kill may come after the last update, when the student has its name already.
            log = ((unfinished if unfinished.exists() else folders["cut"]) / "log.jsonl").read_text(encoding="utf-8")
            print(f"kill {done}: {log.count(chr(10))} updates logged", flush=True)
    if not folders["cut"].exists():
        subprocess.run(command("cut", "--resume"), check=True, stderr=subprocess.DEVNULL)
    whole, cut = (read_student(folders[name]).adapter_files for name in ("whole", "cut"))
    assert whole == cut
