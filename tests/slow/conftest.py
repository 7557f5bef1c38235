"""A student of the embedded model, trained by the command line for the proofs that take minutes."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow") / "student"
    options = ["--updates", "60", "--batch-size", "16", "--output", str(folder)]
    subprocess.run([sys.executable, "-m", "boostdiff", "distill", *options], check=True)
    return folder
