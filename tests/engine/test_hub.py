"""A hub's weights are fetched when they are read, and not before all else has been checked."""

import shutil
from pathlib import Path

import pytest
from boostdiff.cli import app
from boostdiff.engine.errors import InputError
from boostdiff.engine.student import INFO_FILE
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

HUB_ID = "organisation/tiny"


@pytest.fixture(autouse=True)
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has the tiny model's configuration, and refuses its weights; the present folder is empty."""
    folder = shutil.copytree(tiny_folder, tmp_path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))

    def download(*arguments: object, **options: object) -> str:
        raise OSError("its weights are asked for")

    monkeypatch.setattr("boostdiff.engine.hub.snapshot_download", lambda *arguments, **options: folder)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def said(command: str, *options: str, students: dict[str, Path], prompt_file: Path) -> str:
    Path("outputs/student").parent.mkdir(exist_ok=True)
    named = {"STUDENT": str(students["lora"]), "PROMPTS": str(prompt_file)}
    words = [named.get(word, word) for word in options]
    result = CliRunner().invoke(app, [command, *words, "--model", HUB_ID])
    assert isinstance(result.exception, InputError), result.exception
    return str(result.exception)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["distill"], "there is nothing to train on"),
        (["distill", "--prompts", "missing.txt"], "can't read the prompt file missing.txt"),
        (["distill", "--prompts", "PROMPTS", "--device", "teapot"], "can't use the device"),
        (["distill", "--prompts", "PROMPTS", "--format", "kohya", "--method", "bitfit"], "--format is not used"),
        (["export"], "there is no student in outputs/student"),
        (["export", "--student", "STUDENT", "--device", "teapot"], "can't use the device"),
        (["export", "--student", "STUDENT", "--size", "18"], "can't draw 18x18 pixels"),
        (["export", "--student", "STUDENT", "--quantize", "int8"], "--calibration-prompts"),
        (["export", "--student", "STUDENT", "--output", "."], "the folder that you are in"),
        (["generate", "a cat"], "there is no student in outputs/student"),
        (["generate", "--prompts", "missing.txt", "--teacher"], "can't read the prompt file missing.txt"),
        (["generate", "a cat", "--teacher", "--device", "teapot"], "can't use the device"),
        (["generate", "a cat", "--teacher", "--shard-size", "2", "--device", "teapot"], "can't use the device"),
        (["generate", "a cat", "--teacher", "--height", "18"], "can't draw 18x16 pixels"),
        (["generate", "a cat", "--student", "STUDENT", "--guidance", "7"], "can't give 7"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_fetched(
    command: list[str], message: str, students: dict[str, Path], prompt_file: Path
) -> None:
    assert message in said(*command, students=students, prompt_file=prompt_file)


@pytest.mark.parametrize(
    "command",
    [
        ["distill", "--prompts", "PROMPTS"],
        ["export", "--student", "STUDENT"],
        ["generate", "a cat", "--student", "STUDENT"],
        ["generate", "a cat", "--teacher", "--shard-size", "2"],
    ],
)
def test_where_nothing_is_wrong_weights_are_fetched(
    command: list[str], students: dict[str, Path], prompt_file: Path
) -> None:
    expected = f"can't fetch the weights of {HUB_ID}: the hub says: its weights are asked for"
    assert said(*command, "--device", "cpu", students=students, prompt_file=prompt_file) == expected
    assert not list(Path().rglob(INFO_FILE))


def test_a_dry_run_needs_none(students: dict[str, Path], prompt_file: Path) -> None:
    result = CliRunner().invoke(app, ["distill", "--dry-run", "--model", HUB_ID, "--device", "cpu"])
    assert result.exit_code == 0, result.exception
