from pathlib import Path
from typing import Any

import pytest
from boostdiff import cli
from boostdiff.benchmarks.studies import full_size
from boostdiff.benchmarks.studies.__main__ import app
from boostdiff.benchmarks.studies.full_size import Stage, ratios, run, stages, summary, training
from boostdiff.engine.files import read_json, write_json
from tiny import CPU
from typer.testing import CliRunner

SIZES = {"batch_sizes": "1,2", "few_batch_sizes": "2"}
OPTIONS = {"device": "cpu", **SIZES, "steps": 2, "runs": 3, "updates": 2, "parts": 4}


def planned(tmp_path: Path) -> dict[str, Stage]:
    return stages(model="sd21-base", work=tmp_path / "work", output=tmp_path / "results", **OPTIONS)


def row(runner: str, mode: str, rate: float, share: float | None) -> dict[str, Any]:
    return {
        "runner": runner,
        "mode": mode,
        "batch_size": 2,
        "images_per_second": {"value": rate, "low": rate, "high": rate, "coverage": 0.98},
        "peak_share": share,
    }


def ratio(slower: str, faster: str, value: float, *, part: str = "images", batch_size: int = 2) -> dict[str, Any]:
    estimate = {"value": value, "low": value - 0.1, "high": value + 0.1, "coverage": 0.98}
    # "captured student" is its runner and its mode.
    sides = {
        side: dict(zip(("runner", "mode"), name.rsplit(" ", 1), strict=True))
        for side, name in (("slower", slower), ("faster", faster))
    }
    return sides | {"part": part, "batch_size": batch_size, "estimate": estimate}


@pytest.fixture
def report() -> dict[str, Any]:
    """As `report.json` has it, of what is looked at."""
    return {
        "speed": {
            "rows": [
                row("torch", "student", 3.0, 0.2),
                row("captured", "student", 5.0, 0.5),
                row("x", "teacher", 9, 1),
            ],
            "ratios": [
                ratio("torch teacher", "torch student", 1.6),
                ratio("captured teacher", "captured student", 1.9, part="unet"),
                ratio("captured teacher", "captured student", 1.7, batch_size=1),
                ratio("captured teacher", "captured student", 1.8),
                ratio("stock diffusers teacher", "captured student", 3.1),
            ],
            "flops": {"unet": 10**9},
            "peaks": {"float16": 2.0, "bfloat16": 1.0},
        },
        "provenance": {"config": {"steps": 20}},
    }


def test_ratios_are_those_of_the_fastest_student(report: dict[str, Any]) -> None:
    assert ratios(report, 2) == {
        "the student's best runner": "captured",
        "teacher with batched guidance, the same runner": "1.80 [1.70, 1.90]",
        "stock diffusers, eager, with guidance": "3.10 [3.00, 3.20]",
        "teacher through torch.compile, with guidance": "–",
        "the student's UNet, share of the GEMM peak": "50%",
    }


def test_the_papers_run_by_the_pace_of_a_few_updates(report: dict[str, Any]) -> None:
    info = {"result": {"images_per_second": 256.0, "peak_memory": 2**30}}
    pace = training(info, report)
    assert pace["seconds_per_update"] == 2.0
    assert pace["hours_of_preset"] == pytest.approx(1600 * 2 / 3600)
    assert pace["peak_share"] == pytest.approx(512 * 4 * 1e9 / 2.0 / 2e12)


def test_the_summary_has_what_there_is(tmp_path: Path, report: dict[str, Any]) -> None:
    plan = planned(tmp_path)
    plan["speed"].proof.parent.mkdir(parents=True)
    write_json(plan["speed"].proof, report)
    text = summary(plan, {"engine": "exit code 1"}, model="tiny", device=CPU)
    assert "| batch | 2 |" in text
    assert "engine failed: exit code 1" in text
    assert "## training" not in text
    for name, pace in (("training", 256.0), ("compiled-training", 512.0)):
        plan[name].proof.parent.mkdir(parents=True)
        write_json(plan[name].proof, {"result": {"images_per_second": pace, "peak_memory": 3 * 2**30}})
    text = summary(plan, {}, model="tiny", device=CPU)
    assert "| training | 2.0 | 0.9 |" in text
    assert "| compiled-training | 1.0 | 0.4 |" in text


def test_a_finished_stage_is_not_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stage = Stage(command=["boostdiff", "no-such-command"], proof=tmp_path / "proof")
    assert "exit code 2 of `python -m boostdiff no-such-command`" in (run("engine", stage) or "")
    stage.proof.touch()
    assert run("engine", stage) is None
    assert "finished before" in capfd.readouterr().out


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    stage = Stage(command=["http.server", "--bind", "127.0.0.1", "0"], proof=tmp_path / "proof")
    assert (run("slow", stage, limit=1) or "").endswith("was ended after 1 s")


def test_a_bench_without_a_runner_for_its_engine_is_not_begun(tmp_path: Path) -> None:
    stage = Stage(command=["boostdiff", "no-such-command"], proof=tmp_path / "proof", hindrance=lambda: "no runner")
    assert run("engine", stage) == "no runner"


def test_what_runs_an_engine(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "boostdiff export" in (full_size.no_exported_runner(tmp_path, CPU) or "")
    assert full_size.no_exported_runner(engine, CPU) is None
    reasons = {"onnx": "it is not installed", "tensorrt": "no GPU"}
    monkeypatch.setattr(full_size, "available_runners", lambda *_: reasons)
    assert full_size.no_exported_runner(engine, CPU) == (
        "no runner of exported graphs: onnx: it is not installed; tensorrt: no GPU"
    )


def test_every_stage_is_a_command_with_options_that_exist(tmp_path: Path) -> None:
    for stage in planned(tmp_path).values():
        module, *arguments = stage.command
        command = {"boostdiff": cli.app, "boostdiff.benchmarks.studies": app}[module]
        # The parser names the first option that it doesn't know, and runs nothing.
        result = CliRunner().invoke(command, [*arguments, "--no-such-option"])
        assert "--no-such-option" in result.output
        assert result.exit_code == 2


def test_a_stage_runs_on_a_model_of_its_own(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "results"), "--model", str(tiny_folder)]
    options += ["--batch-sizes", "1", "--few-batch-sizes", "1", "--steps", "1", "--runs", "3", "--device", "cpu"]
    result = CliRunner().invoke(app, ["full-size", *options, "--only", "profile"])
    assert result.exit_code == 0, capfd.readouterr()
    assert read_json(tmp_path / "results/profile.json")["rows"][0]["runner"] == "torch"
    assert (tmp_path / "results/summary.md").is_file()


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["full-size", "--work", str(tmp_path), "--only", "speed,flight"])
    assert "unknown stage 'flight'" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_results_are_named_by_machine_and_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "hardware", lambda device: {"gpu": "NVIDIA H100 80GB HBM3", "cpu": "any"})
    assert full_size.results_folder(CPU).name.startswith("nvidia-h100-80gb-hbm3-20")
