import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.studies import combined as study
from boostdiff.benchmarks.studies.combined import combined, timed_engines, timed_students
from boostdiff.engine import compiled
from boostdiff.engine.errors import InputError
from boostdiff.engine.manifest import read_manifest
from boostdiff.engine.model import Model


def test_each_engine_is_timed_in_each_of_its_precisions(
    engines: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    combined([engines["lora"]], steps=2, batch_sizes="1,2", runs=3, device="cpu")
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S.*?) +\| +(\d) \| +(\d+) \| +(\d+) \| +([\d.]+) \| +([\d.]+)x", printed, re.MULTILINE)
    named = [(name, batch, steps, passes) for name, batch, steps, passes, *_ in rows]
    folder = engines["lora"].name
    assert named == [
        row
        for batch in "12"
        for row in (
            ("stock diffusers with guidance", batch, "2", "4"),
            (f"{folder}, fp16", batch, "2", "2"),
            (f"{folder}, fp32", batch, "2", "2"),
        )
    ]
    assert all(float(milliseconds) > 0 for *_, milliseconds, _ in rows)
    assert [float(ratio) for name, *_, ratio in rows if name.startswith("stock")] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("own", "sampling"),
    [
        ({}, ("DPMSolverMultistepScheduler", "leading", 7)),
        ({"sampler": "ddim", "steps": 4, "timestep_spacing": "trailing"}, ("DDIM", "trailing", 4)),
    ],
)
def test_only_a_few_step_student_keeps_to_its_own_sampling(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, own: dict[str, object], sampling: tuple[str, str, int]
) -> None:
    manifest = read_manifest(engines["bitfit"])
    manifest = replace(manifest, student=manifest.student | own)
    monkeypatch.setattr(study, "read_manifest", lambda folder: manifest)
    base = {"prompts": ["a red cat"], "guidance": 3.0}
    with ExitStack() as opened:
        (timed,) = timed_engines([engines["bitfit"]], opened, base, "cpu", sampler="dpm++", steps=7)
        scheduler = timed.work.make_scheduler()
    assert (type(scheduler).__name__, scheduler.config.timestep_spacing, timed.work.steps) == sampling
    assert timed.passes == sampling[2]


@pytest.mark.parametrize("bfloat16", [True, False])
def test_students_are_timed_compiled(
    students: dict[str, Path], tiny: Model, monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    monkeypatch.setattr(compiled, "_compile", lambda denoiser, **options: denoiser)
    monkeypatch.setattr(compiled, "has_bfloat16", lambda device: bfloat16)
    base = {"prompts": ["a red cat"], "guidance": 3.0}
    folders = [students["lora"], students["bitfit"]]
    timed = list(timed_students(folders, tiny, base, sampler="dpm++", steps=3))
    precision = "bfloat16" if bfloat16 else "float32"
    assert [(row.name, row.passes) for row in timed] == [(f"{f.name}, compiled, {precision}", 3) for f in folders]
    for row in timed:
        assert row.variant.parts is not None
        assert row.variant.parts.pipeline.vae.dtype == getattr(torch, precision)
        assert row.variant.time(row.work)["total"] > 0


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(InputError, match="pass --engine or --student"):
        combined(device="cpu")
