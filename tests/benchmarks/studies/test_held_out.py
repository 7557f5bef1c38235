from pathlib import Path
from subprocess import CompletedProcess

import pytest
from boostdiff.benchmarks.studies import held_out
from boostdiff.benchmarks.studies.__main__ import app
from boostdiff.benchmarks.studies.held_out import trained
from boostdiff.engine.errors import BoostDiffError, InputError
from typer.testing import CliRunner


def test_a_student_is_trained_once_and_only_with_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> CompletedProcess[str]:
        commands.append(command)
        (tmp_path / "lora-0").mkdir()
        return CompletedProcess(command, 0)

    monkeypatch.setattr(held_out.subprocess, "run", run)
    options = ["--method", "lora", "--images", "a folder"]
    for _ in range(2):
        assert trained(tmp_path / "lora-0", options) == tmp_path / "lora-0"
    assert [command[-len(options) :] for command in commands] == [options]
    with pytest.raises(InputError, match="was trained with --method lora --images 'a folder'"):
        trained(tmp_path / "lora-0", ["--method", "lora"])
    (tmp_path / "by-hand").mkdir()
    assert trained(tmp_path / "by-hand", options) == tmp_path / "by-hand"


def test_the_engine_is_measured_on_the_servers_device_alone() -> None:
    """The server is started without a device, so the study has no option for the engine beside it."""
    result = CliRunner().invoke(app, ["serve", "--device", "cpu"])
    assert result.exit_code == 2
    assert "No such option" in result.output


@pytest.mark.parametrize("code", [1, 2, -9])
def test_a_training_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(held_out.subprocess, "run", lambda command, check: CompletedProcess(command, code))
    says = f"^`boostdiff distill --output .* --rank 4` failed with exit code {code}$"
    with pytest.raises(BoostDiffError, match=says):
        trained(tmp_path / "lora-0", ["--rank", "4"])
    assert not list(tmp_path.iterdir())
