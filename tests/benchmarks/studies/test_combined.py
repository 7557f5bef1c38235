import re
from pathlib import Path

import pytest
from boostdiff.benchmarks.studies.combined import combined


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
            (f"{folder}, fp16", batch, "20", "20"),
            (f"{folder}, fp32", batch, "20", "20"),
        )
    ]
    assert all(float(milliseconds) > 0 for *_, milliseconds, _ in rows)
    assert [float(ratio) for name, *_, ratio in rows if name.startswith("stock")] == [1.0, 1.0]
