"""Exports of a student of `emoji64`, killed at random moments over a standing engine, leave it whole."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from boostdiff.engine.manifest import read_manifest, verified_file

KILLS = 10


def verified(engine: Path) -> dict[str, str]:
    """SHA-256 by file of an engine, each compared with its manifest."""
    manifest = read_manifest(engine)
    for name in manifest.files:
        verified_file(engine, manifest, name)
    return manifest.files


def ended(command: list[str], seconds: float | None = None) -> bool:
    """Run a command, killed after so many seconds; whether it came to its end before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    assert process.returncode == 0
    return True


@pytest.mark.slow
def test_a_killed_export_leaves_the_standing_engine_whole(student: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    engine = tmp_path / "engine"
    options = ["--student", str(student), "--output", str(engine), "--force"]
    command = [sys.executable, "-m", "boostdiff", "export", *options]
    began = time.monotonic()
    assert ended(command)
    duration, expected = time.monotonic() - began, verified(engine)
    for number in range(1, KILLS + 1):
        seconds = duration * moments.uniform(0.05, 1)
        in_time = ended(command, seconds)
        assert verified(engine) == expected, f"kill {number} after {seconds:.1f} s: other bytes in the engine"
        beside = len(list(engine.parent.iterdir())) - 1
        how = "too late, it had ended" if in_time else f"{beside} unfinished beside the whole engine"
        print(f"kill {number} after {seconds:.1f} of {duration:.1f} s: {how}", flush=True)
    assert ended(command)
    assert verified(engine) == expected
    assert [path for path in engine.parent.iterdir() if path != engine] == []
