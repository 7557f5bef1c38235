import re
from pathlib import Path

import pytest
from boostdiff.benchmarks.studies.layouts import layouts, table
from boostdiff.engine.model import ModelFiles


def test_every_layout_and_number_of_rows_is_timed(
    tiny_files: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts(str(tiny_files.folder), rows="1,2", runs=3, output=tmp_path / "layouts.md", device="cpu")
    printed = capsys.readouterr().out
    assert printed.endswith((tmp_path / "layouts.md").read_text(encoding="utf-8"))
    timed = re.findall(r"\| (contiguous|channels last) +\| torch +\| +(\d) \| +([\d.]+) \|", printed)
    assert [(layout, rows) for layout, rows, _ in timed] == [
        (layout, rows) for layout in ("contiguous", "channels last") for rows in "12"
    ]
    assert all(float(milliseconds) > 0 for *_, milliseconds in timed)


def test_the_share_of_the_peak_counts_all_rows() -> None:
    # Eight rows of 10¹¹ operations in 4 ms are 200·10¹² per second.
    assert (
        table([("contiguous", "captured", 8, 0.004)], flops=1e11, peak=400).splitlines()[-1].split("|")[-2].strip()
        == "50%"
    )
