import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from boostdiff import __version__
from boostdiff.cli import app, main
from boostdiff.engine.compiled import missing_compiler
from boostdiff.engine.terminal import progress_bar
from rich.console import Console
from tiny import CPU, save_images
from typer.main import get_command

SD21 = Path(__file__).parents[1] / "benchmarks" / "configs" / "sd21-base"


def boostdiff(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "boostdiff", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_help_names_every_command_and_option(tmp_path: Path) -> None:
    shown = boostdiff("--help", cwd=tmp_path).stdout
    for command, options in {
        "distill": (
            "--model",
            "--method",
            "--rank",
            "--guidance",
            "--images",
            "--resume",
            "--preset",
            "--dry-run",
        ),
        "export": ("--model", "--student", "--output", "--trt", "--json"),
        "bench": ("--steps", "--engine", "--samples", "--batch-sizes", "--reference", "table1", "compare", "--json"),
        "generate": ("--teacher", "--runner", "--sampler", "--seed", "--batch-size"),
        "doctor": ("--json",),
    }.items():
        assert command in shown
        text = boostdiff(command, "--help", cwd=tmp_path).stdout
        assert all(option in text for option in options), command
    assert boostdiff("--version", cwd=tmp_path).stdout == f"boostdiff {__version__}\n"


def test_a_narrow_terminal_shows_a_bar_its_times_and_its_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr("boostdiff.engine.terminal.console", terminal)
    with progress_bar("distilling lora", 1040) as advance:
        advance(1000, note="loss 0.0413, R² 0.21, 91.2 images/s, 1.2 GB")
    assert isinstance(terminal.file, io.StringIO)
    bar, note = terminal.file.getvalue().split("\n")[-3:-1]
    assert re.search(r"distilling lora ━+.* 1000/1040 0:00:0\d left ", bar)
    assert "R² 0.21, 91.2 images/s, 1.2 GB" in note


def test_help_tells_what_is_taken_by_default(tmp_path: Path) -> None:
    """Where it is no plain value, too: rich drops a bracket in a help text."""
    shown = boostdiff("distill", "--help", cwd=tmp_path).stdout
    assert "[default: (the rank)]" in shown
    assert "[default: 8]" in shown
    options = [option for command in get_command(app).commands.values() for option in command.params]
    assert len(options) > 50
    assert not [option.name for option in options if "[default" in (option.help or "")]


def test_dry_run_reads_configurations_alone(tmp_path: Path) -> None:
    done = boostdiff("distill", "--dry-run", "--model", SD21, "--preset", "paper", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert done.returncode == 0
    assert (plan["trainable_parameters"], plan["total_parameters"]) == (1_659_904, 865_910_724)
    assert (plan["updates"], plan["batch_size"], plan["guidance"]) == (1600, 512, 3.0)
    assert not list(tmp_path.iterdir())


def test_doctor_as_json(tmp_path: Path) -> None:
    findings = {row["name"]: row for row in json.loads(boostdiff("doctor", "--json", cwd=tmp_path).stdout)}
    assert findings["torch"]["ready"]
    assert findings["boostdiff distill"]["ready"]
    assert findings["torch.compile"]["ready"] == (missing_compiler(CPU) is None)
    assert not findings["GPU"]["ready"]


def test_the_whole_job_on_a_tiny_model(tmp_path: Path, tiny_folder: Path, prompt_file: Path) -> None:
    """distill, export, bench and generate find what the one before wrote, and `--json` prints JSON alone."""
    model = ("--model", tiny_folder)
    short = ("--samples", 4, "--steps", 2, "--runs", 3, "--no-compile")
    steps = (
        ("distill", *model, "--prompts", prompt_file, "--updates", 4, "--batch-size", 2, "--json"),
        ("export", *model, "--json"),
        ("bench", *model, "--prompts", prompt_file, *short, "--json"),
        ("generate", "a red cat", "two green birds", "--steps", 2, "--runner", "onnx", "--json"),
        ("generate", *model, "a red cat", "--teacher", "--steps", 2, "--json"),
    )
    for arguments in steps:
        done = boostdiff(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
    outputs = tmp_path / "outputs"
    for name in (
        "student/pytorch_lora_weights.safetensors",
        "student/grid.png",
        "engine/unet/model.onnx",
        "engine/manifest.json",
        "bench/report.json",
        "bench/report.html",
        "bench/grid.png",
        "images/a-red-cat-student-0.png",
        "images/two-green-birds-student-1.png",
        "images/a-red-cat-teacher-0.png",
    ):
        assert (outputs / name).stat().st_size > 0, name


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, students: dict[str, Path]) -> Path:
    """A folder of things that are wrong, and of outputs from before."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(tiny_folder, folder / "no-unet")
    shutil.rmtree(folder / "no-unet/unet")
    shutil.copytree(tiny_folder, folder / "truncated")
    weights = folder / "truncated/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "empty.txt").write_text("\n")
    (folder / "a-file").write_text("x")
    (folder / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "empty-images").mkdir()
    save_images(folder / "no-captions")
    for path in (folder / "no-captions").glob("*.txt"):
        path.unlink()
    save_images(folder / "corrupt-images")
    (folder / "corrupt-images/3.png").write_bytes(b"no image")
    with tarfile.open(folder / "cut.tar", "w") as archive:
        archive.add(folder / "no-captions/0.png", "0.png")
    whole = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 20])
    (folder / "other-settings.unfinished").mkdir()
    (folder / "other-settings.unfinished/config.json").write_text('{"updates": 1}')
    shutil.copytree(students["lora"], folder / "outputs/student")
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("distill --model missing", "there is no model 'missing'"),
        ("distill --model no-unet", "has no unet: unet/config.json is missing"),
        ("distill --model truncated --prompts {prompts}", "can't load the model"),
        ("distill --prompts empty.txt", "is empty"),
        ("distill --guidance 0.5", "--guidance 0.5"),
        ("distill --method magic", "'magic' is not one of 'lora'"),
        ("distill --output /proc/boostdiff/x", "can't write to"),
        ("distill --output a-file", "is a file"),
        ("distill --device teapot", "can't use the device"),
        ("distill --updates many", "--updates"),
        ("distill --rank 0", "Invalid value for '--rank'"),
        ("distill --guidance 7.5:1.5", "is no range"),
        ("distill --guidance high", "neither a number nor a range"),
        ("distill --prompts latin1.txt", "not UTF-8"),
        ("distill --format magic", "'magic' is not"),
        ("distill --format kohya --method bitfit", "--format is not used with --method bitfit"),
        ("distill --log-with paper", "'paper' is not one of"),
        ("distill --targets to_nowhere", "lora can't be put on this UNet"),
        ("distill --model {tiny} --images nowhere/at/all", "nowhere/at/all"),
        ("distill --model {tiny} --images empty-images", "empty-images"),
        ("distill --model {tiny} --images no-captions", "no-captions"),
        ("distill --model {tiny} --images corrupt-images", "--max-bad-samples"),
        ("distill --model {tiny} --images cut.tar", "cut.tar"),
        ("distill --model {tiny} --prompts {prompts} --resume --output other-settings", "under other settings"),
        ("generate --model {tiny} --negative-prompt blurry x", "no negative prompt"),
        ("generate --model {tiny} --lora-scale 2 x", "--lora-scale must lie between 0 and 1"),
        ("generate --teacher --lora-scale 1 x", "--lora-scale is not used with --teacher"),
        ("generate --teacher --runner onnx x", "--teacher runs in torch only"),
        ("generate --batch-size 0 x", "--batch-size"),
        ("distill --resume --output elsewhere", "nothing to resume"),
        ("distill --model {tiny}", "pass --prompts FILE or --images DIR"),
        ("export --student nowhere", "run `boostdiff distill` first"),
        ("export", "belongs to another model"),
        ("export --model {tiny} --output /proc/boostdiff/x", "can't write to"),
        ("bench --model {tiny} --prompts {prompts}", "run `boostdiff export` first"),
        ("bench --steps 0", "Invalid value for '--steps'"),
        ("bench --sampler magic", "'magic' is not one of"),
        ("generate --sampler magic x", "'magic' is not one of"),
        ("generate --steps 0 x", "Invalid value for '--steps'"),
        ("generate --model {tiny} --guidance 5 x", "distilled at guidance 3"),
        ("generate --teacher --guidance 0.5 x", "must be at least 1"),
        ("generate --runner onnx x", "run `boostdiff export` first"),
        ("generate --model {tiny} --runner onnx x", "--model is not used with --runner onnx"),
        ("generate --engine elsewhere x", "--engine is not used with --runner torch"),
        ("generate --teacher --student elsewhere x", "--student is not used with --teacher"),
        ("generate --precision fp16 x", "--precision is not used with --runner torch"),
        ("distill --method bitfit --rank 4", "--rank is not used with --method bitfit"),
        ("distill --tokens 4", "--tokens is not used with --method lora"),
        ("distill --max-bad-samples 4", "--max-bad-samples is not used without --images"),
        ("export --batch 1", "--batch is not used without --trt"),
        ("export --trt --batch 4:1", "Invalid value for '--batch'"),
        ("generate --model {tiny} --output /proc/boostdiff/x x", "can't write to"),
        ("distill --guider magic", "'magic' is not one of 'cfg'"),
        ("distill --guidance-rescale 0.7", "--guidance-rescale is not used without --guider rescale"),
        ("distill --dry-run --guider interval --guidance-interval 0.8:0.2", "STOP 0.01 or more above"),
        ("generate --teacher --guider apg --guidance 1 x", "--guider is not used with --guidance 1"),
        ("generate --model {tiny} --guider apg x", "distilled with the guider cfg, and one pass can't"),
        ("destil", "No such command 'destil'"),
    ],
)
def test_wrong_input_ends_in_one_line_and_code_2(
    broken: Path,
    tiny_folder: Path,
    prompt_file: Path,
    arguments: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.is_file() and path.stat().st_mtime_ns for path in broken.rglob("*")}
    words = [word.format(tiny=tiny_folder, prompts=prompt_file) for word in arguments.split()]
    monkeypatch.chdir(broken)
    monkeypatch.setattr(sys, "argv", ["boostdiff", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capfd.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("boostdiff: error: ")
    assert shown.err.count("\n") == 1
    assert says in shown.err
    assert {path: path.is_file() and path.stat().st_mtime_ns for path in broken.rglob("*")} == before


def test_a_full_disk(tmp_path: Path, tiny_folder: Path, prompt_file: Path, students: dict[str, Path]) -> None:
    """A limit on file sizes gives the error of a full disk, at the checkpoint; the earlier student stays."""
    shutil.copytree(students["lora"], tmp_path / "outputs/student")
    before = {path: path.read_bytes() for path in (tmp_path / "outputs/student").iterdir()}
    command = [sys.executable, "-m", "boostdiff", "distill", "--model", str(tiny_folder), "--prompts", str(prompt_file)]
    command += ["--updates", "4", "--batch-size", "2", "--checkpoint-every", "1", "--device", "cpu"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("boostdiff: error: the disk is full")
    assert {path: path.read_bytes() for path in (tmp_path / "outputs/student").iterdir()} == before


def test_a_full_disk_while_exporting(
    tmp_path: Path, tiny_folder: Path, students: dict[str, Path], engines: dict[str, Path]
) -> None:
    """The graphs of the new engine don't fit; the standing one stays as it is."""
    engine = shutil.copytree(engines["lora"], tmp_path / "engine")
    before = {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()}
    limit = 60_000
    assert (engine / "unet/model.onnx.data").stat().st_size > limit
    command = [sys.executable, "-m", "boostdiff", "export", "--model", str(tiny_folder), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--student", str(students["bitfit"]), "--output", str(engine)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("boostdiff: error: the disk is full")
    assert {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_traceback_only_under_debug(tmp_path: Path) -> None:
    assert "Traceback" in boostdiff("--debug", "distill", "--model", "missing", cwd=tmp_path).stderr
