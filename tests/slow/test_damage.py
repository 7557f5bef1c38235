"""Small damages at random to what the commands read: never a traceback, never another result without a word.

`DAMAGES=50 pytest -m slow -s tests/slow/test_damage.py` tries fewer; the counts are printed by target and outcome.

A byte of a bare model folder can change without anything being able to know: other weights or settings are another
model. What is asked of it then is that the picture is the one that stock diffusers draws from the same folder.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boostdiff.cli import main
from boostdiff.engine.student import read_student
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from tiny import PROMPTS, save_images

DAMAGES = int(os.environ.get("DAMAGES", "1000"))
SHARES = {"model folder": 0.25, "student": 0.25, "engine": 0.3, "tar": 0.1, "prompts": 0.1}
"""How many of the damages go to each target: distillations take the longest."""

REFUSED, UNCHANGED, SAID = "exit 2, one line", "exit 0, the same result", "exit 0, the summary says what was left out"
FAILED = "exit 1, one line"
OTHER = "exit 0, another valid input: its result as stock libraries give it"

Judge = Callable[[Path, Any, str], str]
"""Names the outcome of exit 0, from the damaged path, the result and what was printed; fails where it is none."""


def run(*arguments: object) -> tuple[int, str]:
    """Run a command in this process; its exit code and all that it printed."""
    printed = io.StringIO()
    before = sys.argv
    sys.argv = ["boostdiff", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), printed.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command did not end")


def changed(value: Any, dice: random.Random) -> Any:
    """Another JSON value of the same kind, or none at all."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return dice.choice([value + 1, 2 * value, -value, 0, None, str(value)])
    if isinstance(value, str):
        return dice.choice(["", value[:-1], value + "x", None, 7])
    return dice.choice([0, "x", [], {}])


def damage(path: Path, dice: random.Random) -> str:
    """Flip a bit, cut the file, or change a value of a JSON file; what was done."""
    data = path.read_bytes()
    action = dice.choice(["flip", "cut", *(["value"] * 2 if path.suffix == ".json" else [])])
    if action == "flip" and data:
        place = dice.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :])
        return f"bit flipped in byte {place} of {len(data)}"
    if action == "value":
        root = parent = json.loads(data)
        while True:
            key = dice.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            if not isinstance(parent[key], (dict, list)) or not parent[key]:
                break
            parent = parent[key]
        old, parent[key] = parent[key], changed(parent[key], dice)
        path.write_text(json.dumps(root))
        return f"{key}: {old!r} became {parent[key]!r}"
    length = dice.randrange(max(1, len(data)))
    path.write_bytes(data[:length])
    return f"cut to {length} of {len(data)} bytes"


def pixels(folder: Path) -> np.ndarray:
    """The one picture that was drawn."""
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def adapter(folder: Path) -> dict[str, str]:
    return read_student(folder).adapter_files


def as_stock_draws(model: Path, result: np.ndarray, printed: str) -> str:
    """The teacher's picture of another model must be stock diffusers'."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(PROMPTS[0], guidance_scale=3.0, num_inference_steps=2, generator=generator).images[0]
    assert np.abs(np.asarray(image).astype(int) - result).max() <= 1
    return OTHER


def never(path: Path, result: Any, printed: str) -> str:
    raise AssertionError("another result, and nothing says so")


def other_samples(path: Path, result: Any, printed: str) -> str:
    """Samples that were left out are counted in the summary; a caption that can be read is a caption."""
    if "unreadable" in printed or "left out" in printed:
        return SAID
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        for name, file in files.items():
            assert file is not None
            if name.endswith(".png"):
                Image.open(file).load()
            else:
                file.read().decode()
    assert len(files) == 10
    return OTHER


def other_prompts(path: Path, result: Any, printed: str) -> str:
    assert path.read_text(encoding="utf-8").strip()
    return OTHER


@pytest.mark.slow
def test_small_damages(
    tiny_folder: Path,
    prompt_file: Path,
    students: dict[str, Path],
    engines: dict[str, Path],
    tmp_path: Path,
) -> None:
    images = tmp_path / "images"
    save_images(images)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for path in sorted(images.iterdir()):
            archive.add(path, arcname=path.name)
    output = tmp_path / "output"
    draws = ["--steps", 2, "--device", "cpu", "--output", output]
    # All new, as many as an epoch has: a fault that is never reached can't be said.
    size = ["--updates", 1, "--batch-size", 6, "--reuse", 1]
    trains = ["--model", tiny_folder, *size, "--device", "cpu", "--output", output]
    commands: dict[str, tuple[Path, Callable[[Path], list[object]], Callable[[Path], Any], Judge]] = {
        "model folder": (
            tiny_folder,
            lambda path: ["generate", PROMPTS[0], "--teacher", "--model", path, *draws],
            pixels,
            as_stock_draws,
        ),
        "student": (
            students["lora"],
            lambda path: ["generate", PROMPTS[0], "--model", tiny_folder, "--student", path, *draws],
            pixels,
            never,
        ),
        "engine": (
            engines["lora"],
            lambda path: ["generate", PROMPTS[0], "--runner", "onnx", "--engine", path, *draws],
            pixels,
            never,
        ),
        "tar": (tmp_path / "images.tar", lambda path: ["distill", "--images", path, *trains], adapter, other_samples),
        "prompts": (prompt_file, lambda path: ["distill", "--prompts", path, *trains], adapter, other_prompts),
    }
    dice = random.Random(0)
    outcomes: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    for target, (whole, command, result, judge) in commands.items():
        copy = tmp_path / "damaged" / whole.name
        counts = outcomes[target] = Counter()

        def attempt(copy: Path = copy, command: Any = command) -> tuple[int, str]:
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(output.with_name("output.unfinished"), ignore_errors=True)
            return run(*command(copy))

        def fresh(copy: Path = copy, whole: Path = whole) -> None:
            shutil.rmtree(copy.parent, ignore_errors=True)
            copy.parent.mkdir()
            (shutil.copytree if whole.is_dir() else shutil.copy)(whole, copy)

        fresh()
        code, printed = attempt()
        assert code == 0, printed
        expected = result(output)
        for _ in range(round(SHARES[target] * DAMAGES)):
            fresh()
            files = sorted(path for path in copy.rglob("*") if path.is_file()) if copy.is_dir() else [copy]
            path = dice.choice(files)
            done = damage(path, dice)
            try:
                code, printed = attempt()
                assert "Traceback" not in printed
                if code:
                    error = [line for line in printed.splitlines() if line.startswith("boostdiff: error: ")]
                    assert len(error) == 1
                    assert code in (1, 2)
                    # So ends an exception that nobody foresaw.
                    assert "--debug shows where" not in printed
                    outcome = REFUSED if code == 2 else FAILED
                else:
                    same = np.array_equal(expected, result(output)) if result is pixels else expected == result(output)
                    outcome = UNCHANGED if same else judge(copy, result(output), printed)
            except Exception as error:
                outcome = "WRONG"
                name = path.relative_to(copy.parent)
                wrong.append(f"{target}: {name}, {done}: {type(error).__name__} {error}\n    {printed.strip()[-300:]}")
                print(wrong[-1], flush=True)
            counts[outcome] += 1
        print(f"{target}: {dict(counts)}", flush=True)
    print(f"\n| {sum(sum(counts.values()) for counts in outcomes.values())} damages | {' | '.join(outcomes)} |")
    print("|---" * (len(outcomes) + 1) + "|")
    for name in dict.fromkeys(name for counts in outcomes.values() for name in counts):
        print(f"| {name} | {' | '.join(str(counts[name]) for counts in outcomes.values())} |")
    assert not wrong, f"{len(wrong)} wrong outcomes"
