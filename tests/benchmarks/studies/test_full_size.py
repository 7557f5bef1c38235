from pathlib import Path
from typing import Any

import pytest
from boostdiff import cli
from boostdiff.benchmarks.studies import full_size
from boostdiff.benchmarks.studies.__main__ import app
from boostdiff.benchmarks.studies.full_size import Stage, stages, summary, training_row
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.model import locate
from boostdiff.engine.student import read_student
from tiny import CPU
from typer.testing import CliRunner

OPTIONS = {"device": "cpu", "batch_sizes": "1,2", "steps": 2, "runs": 3, "updates": 2}


def planned(tmp_path: Path) -> dict[str, Stage]:
    return stages(model="sd21-base", work=tmp_path / "work", output=tmp_path / "results", **OPTIONS)


@pytest.fixture
def report() -> dict[str, Any]:
    """As `report.json` has it, of what is looked at."""
    return {"speed": {"flops": {"denoiser": 10**9}, "peaks": {"float16": 2.0, "bfloat16": 1.0}}}


def test_the_papers_run_by_the_pace_of_a_few_updates(report: dict[str, Any]) -> None:
    info = {"result": {"images_per_second": 256.0, "peak_memory": 2**30}}
    # 1600 updates of two seconds; 512 samples of four passes of 1 GFLOP in two seconds, of a peak of 2 TFLOP/s.
    assert training_row("training", info, report["speed"]) == ["training", "2.0", "0.9", "51%", "1.0"]


def test_the_summary_has_what_there_is(tmp_path: Path, report: dict[str, Any]) -> None:
    plan = planned(tmp_path)
    plan["speed"].done_file.parent.mkdir(parents=True)
    write_json(plan["speed"].done_file, report)
    text = summary(plan, {"engine": "exit code 1"}, model="tiny", device=CPU)
    assert f"- speed: {plan['speed'].done_file}" in text
    assert "- engine failed: exit code 1" in text
    assert "seconds per update" not in text
    for name, pace in (("training", 256.0), ("compiled-training", 512.0)):
        plan[name].done_file.parent.mkdir(parents=True)
        write_json(plan[name].done_file, {"result": {"images_per_second": pace, "peak_memory": 3 * 2**30}})
    text = summary(plan, {}, model="tiny", device=CPU)
    assert "| training | 2.0 | 0.9 |" in text
    assert "| compiled-training | 1.0 | 0.4 |" in text


def test_a_finished_stage_is_not_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stage = Stage(command=["json.tool", "--no-such-option"], done_file=tmp_path / "done")
    assert stage.run("engine") == "exit code 2 of `python -m json.tool --no-such-option`"
    stage.done_file.touch()
    assert stage.run("engine") is None
    assert "finished before" in capfd.readouterr().out


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    stage = Stage(command=["timeit", "-n", "1", "-s", "import time", "time.sleep(60)"], done_file=tmp_path / "done")
    reason = stage.run("engine", seconds=0.5)
    assert reason is not None
    assert reason.startswith("longer than 0.5 s: `python -m timeit")


def test_every_stage_is_a_command_with_options_that_exist(tmp_path: Path) -> None:
    for stage in planned(tmp_path).values():
        module, *arguments = stage.command
        command = {"boostdiff": cli.app, "boostdiff.benchmarks.studies": app}[module]
        # The parser names the first option that it doesn't know, and runs nothing.
        result = CliRunner().invoke(command, [*arguments, "--no-such-option"])
        assert "--no-such-option" in result.output
        assert result.exit_code == 2


@pytest.mark.slow
def test_a_stage_runs_on_a_model_of_its_own(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "results"), "--model", str(tiny_folder)]
    options += ["--batch-sizes", "1", "--steps", "1", "--runs", "3", "--device", "cpu"]
    result = CliRunner().invoke(app, ["full-size", *options, "--only", "speed"])
    assert result.exit_code == 0, capfd.readouterr()
    rows = read_json(tmp_path / "results/speed/report.json")["speed"]["rows"]
    assert {row["runner"] for row in rows} == {"torch", "stock diffusers"}
    assert (tmp_path / "results/summary.md").is_file()


def test_random_weights_as_a_model_and_a_student(tiny_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["random-folder", str(tiny_folder), "--output", str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    files = locate(str(tmp_path / "made/model"))
    assert files.denoiser_sha256() != locate(str(tiny_folder)).denoiser_sha256()
    assert read_student(tmp_path / "made/student", files).method == "lora"


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["full-size", "--work", str(tmp_path), "--only", "speed,flight"])
    assert "unknown stage 'flight'" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--steps", "33"], ["--model", "sdxl"], ["--batch-sizes", "4"]])
def test_results_of_other_settings_are_not_taken_for_these(tmp_path: Path, option: list[str]) -> None:
    work = ["full-size", "--work", str(tmp_path / "w"), "--only", "speed"]
    done = tmp_path / "w/results/speed/report.json"
    done.parent.mkdir(parents=True)
    write_json(done, {"speed": {}})
    assert CliRunner().invoke(app, work).exit_code == 0
    result = CliRunner().invoke(app, [*work, *option])
    assert isinstance(result.exception, InputError)
    assert "holds results of --model sd21-base --steps 20" in str(result.exception)


@pytest.mark.parametrize("before", ["NVIDIA H100", None])
def test_results_of_another_device_are_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    work, begun = ["full-size", "--work", str(tmp_path / "w"), "--only", "speed"], tmp_path / "w/full-size.json"
    done = tmp_path / "w/results/speed/report.json"
    done.parent.mkdir(parents=True)
    write_json(done, {"speed": {}})
    monkeypatch.setattr(
        full_size, "hardware", lambda device: {"cpu": "AMD EPYC", **({"gpu": before} if before else {})}
    )
    assert CliRunner().invoke(app, work).exit_code == 0
    assert (tmp_path / "w/results/summary.md").read_text().startswith(f"# sd21-base on {before or 'AMD EPYC'}\n")
    monkeypatch.setattr(full_size, "hardware", lambda device: {"cpu": "AMD EPYC", "gpu": "NVIDIA H200"})
    result = CliRunner().invoke(app, work)
    assert isinstance(result.exception, InputError)
    assert f"--batch-sizes 1,2,4,8,16 on {before or 'AMD EPYC'}: pass these again" in str(result.exception)
    # Nobody knows what earlier versions measured on.
    for path in (begun, tmp_path / "w/results/full-size.json"):
        write_json(path, {name: value for name, value in read_json(path).items() if name != "device"})
    result = CliRunner().invoke(app, work)
    assert "on a device that is not named" in str(result.exception)
