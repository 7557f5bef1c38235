"""`boostdiff bench` without a student: configurations alone, and comparisons."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from boostdiff.cli import main


def run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["boostdiff", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


def test_random_weights_then_compare(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    measured = ["--model", "tiny", "--random-weights", "--speed-only", "--steps", 2, "--runs", 3, "--device", "cpu"]
    assert run([*measured, "--batch-sizes", "1,2", "--json"], monkeypatch) == 0
    report = json.loads(capfd.readouterr().out)
    assert {row["batch_size"] for row in report["speed"]["rows"]} == {1, 2}
    assert report["quality"] is None
    assert {path.name for path in (tmp_path / "outputs/bench").iterdir()} == {
        "report.json",
        "report.html",
        "speed.png",
    }
    path = "outputs/bench/report.json"
    assert run(["--compare", path, path, "--json"], monkeypatch) == 0
    differences = json.loads(capfd.readouterr().out)
    assert all(row["change"] == 0 for row in differences["differences"])
    assert run(["--compare", path, path], monkeypatch) == 0
    shown = capfd.readouterr().err
    assert "A against B" in shown
    assert "torch student over" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--random-weights"], "pass --speed-only"),
        (["--random-weights", "--speed-only", "--model", "missing"], "also sd15, sd21-base"),
        (["--batch-sizes", "1;2"], "no list of whole numbers"),
        (["--compare", "a.json", "b.json"], "can't read a.json"),
    ],
)
def test_wrong_input_ends_in_one_line(
    arguments: list[object],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments, monkeypatch) == 2
    shown = capfd.readouterr().err
    assert shown.startswith("boostdiff: error: ")
    assert shown.count("\n") == 1
    assert says in shown
