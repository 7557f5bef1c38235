import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from boostdiff.benchmarks.bench import SCHEMA_VERSION
from boostdiff.benchmarks.report.compare import CAPTIONS, QUALITY, compare_reports, terminal_comparison
from boostdiff.benchmarks.report.tables import Table
from boostdiff.engine.errors import InputError
from rich.console import Console


def estimate(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "coverage": 0.95}


@pytest.fixture
def report() -> dict[str, Any]:
    ratio = {
        "slower": {"runner": "torch", "mode": "teacher"},
        "faster": {"runner": "torch", "mode": "student"},
        "part": "images",
        "batch_size": 8,
        "ceiling": 1.9,
    }
    row = {"runner": "torch", "mode": "student", "batch_size": 8, "images_per_second": estimate(10, 1)}
    image = dict.fromkeys((*QUALITY, *CAPTIONS, "distance_interval"))
    return {
        "schema_version": SCHEMA_VERSION,
        "speed": {"ratios": [ratio | {"estimate": estimate(1.8, 0.1)}], "rows": [row]},
        "quality": {
            "rows": [image | {"name": "student lora", "distance": 220.0, "kid": 0.5}],
            "caption_label": "caption score (emoji64-clip)",
        },
        "provenance": {"steps": 20, "hardware": {"cpu": "one"}, "students": {"a": {"rank": 8}}},
    }


def written(folder: Path, *reports: Any) -> list[Path]:
    paths = [folder / f"{index}.json" for index in range(len(reports))]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(json.dumps(report))
    return paths


def test_differences_and_settings(report: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(report)
    other["speed"]["ratios"][0]["estimate"] = estimate(1.9, 0.1)
    other["speed"]["rows"][0]["images_per_second"] = estimate(20, 1)
    other["quality"]["rows"][0] |= {"distance": 231.0, "kid": None}
    other["provenance"] |= {"hardware": {"cpu": "two"}, "students": {"b": {}}}
    comparison = compare_reports(*written(tmp_path, report, other))
    (ratio, rate, distance) = comparison.differences
    assert [row.apart for row in (ratio, rate, distance)] == [False, True, None]
    assert [row.change for row in (ratio, rate, distance)] == pytest.approx([1.9 / 1.8 - 1, 1.0, 0.05])
    assert (distance.name, distance.a.value, distance.b.value) == ("student lora, distance", 220, 231)
    assert comparison.settings == {"hardware.cpu": ("one", "two")}
    assert comparison.only == ["student lora, kid"]
    other["speed"]["ratios"][0]["estimate"] = estimate(1.9, 0.1) | {"coverage": 0.75}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal_comparison(compare_reports(*written(tmp_path, report, other))))
    shown = console.export_text()
    (line,) = [line for line in shown.splitlines() if "whole images, batch 8" in line]
    assert line.split()[-1] == "–", "intervals of 75% tell nothing"
    (line,) = [line for line in shown.splitlines() if "images/s" in line]
    assert line.split()[-1] == "yes"
    (line,) = [line for line in shown.splitlines() if "student lora, distance" in line]
    assert line.split()[-4:] == ["220", "231", "+5.0%", "–"]


def test_shares_and_captions_are_compared_with_their_intervals(report: dict[str, Any], tmp_path: Path) -> None:
    report["quality"]["rows"][0] |= {"gain_recovered": estimate(2.99, 0.1), "caption_score": estimate(20, 1)}
    rows = {row.name: row for row in compare_reports(*written(tmp_path, report, report)).differences}
    assert rows["student lora, gain recovered"].a.value == 2.99
    assert rows["student lora, caption score"].apart is False


def test_changes_of_differences_are_differences(report: dict[str, Any], tmp_path: Path) -> None:
    report["quality"]["rows"][0] |= {"delta_to_guided": estimate(-77, 9), "distance_to_teacher_image": 8e-17}
    other = copy.deepcopy(report)
    other["quality"]["rows"][0] |= {"delta_to_guided": estimate(43, 9), "distance_to_teacher_image": 3e-16}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(terminal_comparison(compare_reports(*written(tmp_path, report, other))))
    lines = console.export_text().splitlines()
    (delta,) = [line.split() for line in lines if "delta to guided" in line]
    assert delta[-4:] == ["-77", "43", "+120", "yes"]
    (image,) = [line.split() for line in lines if "distance to teacher image" in line]
    assert "%" not in image[-2]


def test_other_prompts_and_students_are_said(report: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(report)
    for each, prompts, adapter in ((report, "p", "a1"), (other, "q", "b2")):
        each["provenance"] |= {"hashes": {"prompts": prompts}, "students": {"s": {"adapter_sha256": adapter}}}
    settings = compare_reports(*written(tmp_path, report, other)).settings
    assert settings == {"hashes.prompts": ("p", "q"), "students": ("a1", "b2")}


def test_a_report_equals_itself(report: dict[str, Any], tmp_path: Path) -> None:
    comparison = compare_reports(*written(tmp_path, report, report))
    assert all(not row.change and not row.apart for row in comparison.differences)
    assert not comparison.settings
    assert not comparison.only


def test_what_is_no_report_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    (ratio, *_), estimated = report["speed"]["ratios"], estimate(1.0, 0.1)
    elsewhere = report | {"speed": {"ratios": [], "rows": []}, "quality": None}
    for other, message in (
        ({}, "no report of `boostdiff bench`"),
        (report | {"schema_version": 1}, "of version 1"),
        (report | {"speed": {}}, "damaged"),
        (report | {"provenance": None}, "damaged"),
        (report | {"provenance": ["x"]}, "damaged"),
        (report | {"speed": report["speed"] | {"ratios": [ratio | {"estimate": "fast"}]}}, "damaged"),
        (
            report | {"speed": report["speed"] | {"ratios": [ratio | {"estimate": estimated | {"value": "fast"}}]}},
            "damaged",
        ),
        (elsewhere, "no figure in common"),
    ):
        with pytest.raises(InputError, match=message):
            compare_reports(*written(tmp_path, report, other))
    with pytest.raises(InputError, match="can't read"):
        compare_reports(tmp_path / "missing.json", tmp_path / "0.json")


def test_a_table_without_rows_has_no_headings() -> None:
    table = Table.of([{"a": "1|2", "b": "3"}], main=(1,))
    assert table.markdown() == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"
    assert table.brief() == Table(headings=["b"], cells=[["3"]])
    assert Table.of([], main=(1,)).brief() == Table(headings=[], cells=[])
