import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from boostdiff import __version__
from boostdiff.cli import app, main
from boostdiff.engine.compiled import missing_compiler
from boostdiff.engine.terminal import progress_bar
from rich.console import Console
from tiny import CPU, save_images
from typer.main import get_command

SD21 = Path(__file__).parents[1] / "benchmarks" / "configs" / "sd21-base"


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def boostdiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`boostdiff(*words)`: the command in this process, which has imported all that it needs, on a machine of CPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["boostdiff", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capfd.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), shown.out, shown.err)

    return run


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of so many bytes at most: what would be longer gives the error of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_help_names_every_command_and_option(boostdiff: Command) -> None:
    shown = boostdiff("--help").stdout
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
        "serve": ("--engine", "--config", "--teacher", "--host"),
        "doctor": ("--json",),
    }.items():
        assert command in shown
        text = boostdiff(command, "--help").stdout
        assert all(option in text for option in options), command


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "boostdiff", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"boostdiff {__version__}\n"


def test_a_narrow_terminal_shows_a_bar_its_times_and_its_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr("boostdiff.engine.terminal.console", terminal)
    with progress_bar("distilling lora", 1040) as advance:
        advance(1000, note="loss 0.0413, R² 0.21, 91.2 images/s, 1.2 GB")
    assert isinstance(terminal.file, io.StringIO)
    bar, note = terminal.file.getvalue().split("\n")[-3:-1]
    assert re.search(r"distilling lora ━+.* 1000/1040 0:00:0\d left ", bar)
    assert "R² 0.21, 91.2 images/s, 1.2 GB" in note


def test_help_tells_what_is_taken_by_default(boostdiff: Command) -> None:
    """Where it is no plain value, too: rich drops a bracket in a help text."""
    shown = boostdiff("distill", "--help").stdout
    assert "[default: (the rank)]" in shown
    assert "[default: 8]" in shown
    options = [option for command in get_command(app).commands.values() for option in command.params]
    assert len(options) > 50
    assert not [option.name for option in options if "[default" in (option.help or "")]


def test_dry_run_reads_configurations_alone(boostdiff: Command, tmp_path: Path) -> None:
    done = boostdiff("distill", "--dry-run", "--model", SD21, "--preset", "paper")
    plan = json.loads(done.stdout)
    assert done.returncode == 0
    assert (plan["trainable_parameters"], plan["total_parameters"]) == (1_659_904, 865_910_724)
    assert (plan["updates"], plan["batch_size"], plan["guidance"]) == (1600, 512, 3.0)
    assert not list(tmp_path.iterdir())


def test_doctor_as_json(boostdiff: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: None)
    findings = {row["name"]: row for row in json.loads(boostdiff("doctor", "--json").stdout)}
    assert findings["torch"]["ready"]
    assert findings["boostdiff distill"]["ready"]
    assert findings["torch.compile"]["ready"] == (missing_compiler(CPU) is None)
    assert not findings["GPU"]["ready"]


def test_the_whole_job_on_a_tiny_model(
    boostdiff: Command,
    tmp_path: Path,
    tiny_folder: Path,
    prompt_file: Path,
    engines: dict[str, Path],
    reuse_graphs: Callable[..., None],
) -> None:
    """distill, export, bench and generate find what the one before wrote, and `--json` prints JSON alone."""
    reuse_graphs(engines["lora"], fresh=("unet",))
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
        done = boostdiff(*arguments)
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
    (folder / "a-loop").symlink_to("a-loop")
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
        (f"distill --prompts {300 * 'n'}", "File name too long"),
        (f"distill --prompts {5000 * 'n'}", "File name too long"),
        (f"distill --model {300 * 'n'}", "there is no model"),
        (f"distill --model {5000 * 'n'}", "there is no model"),
        (f"distill --images {300 * 'n'}", "there is no image folder"),
        (f"distill --images {5000 * 'n'}", "there is no image folder"),
        (f"distill --output {300 * 'n'}", "File name too long"),
        (f"export --student {300 * 'n'}", "File name too long"),
        ("distill --output a-loop", "can't write to a-loop"),
        ("distill --output a-loop/below", "can't write to a-loop/below"),
        ("distill --prompts {prompts} --cache-text a-file", "a-file is a file: choose another --cache-text"),
        ("distill --prompts {prompts} --cache-text a-file/below", "is a file; choose another --cache-text"),
        ("distill --format magic", "'magic' is not"),
        ("distill --format kohya --method bitfit", "--format is not used with --method bitfit"),
        ("distill --log-with paper", "'paper' is not one of"),
        ("distill --targets to_nowhere", "no layer's name in the denoiser ends in 'to_nowhere'"),
        ("distill --model {tiny} --images nowhere/at/all", "nowhere/at/all"),
        ("distill --model {tiny} --images empty-images", "empty-images"),
        ("distill --model {tiny} --images no-captions", "no-captions"),
        ("distill --model {tiny} --images corrupt-images", "--max-bad-samples"),
        ("distill --model {tiny} --images cut.tar", "cut.tar"),
        ("distill --model {tiny} --prompts {prompts} --resume --output other-settings", "under other settings"),
        ("generate --model {tiny} --negative-prompt blurry x", "no negative prompt"),
        ("generate --model {tiny} --lora-scale 2.1 x", "--lora-scale must lie between 0 and 2"),
        ("generate --model {tiny} --lora-scale nan x", "--lora-scale must lie between 0 and 2"),
        ("generate --teacher --lora-scale 1 x", "--lora-scale is not used with --teacher"),
        ("generate --teacher --runner onnx x", "--teacher runs in torch only"),
        ("generate --batch-size 0 x", "--batch-size"),
        ("generate", "pass prompts, or a file of them with --prompts"),
        ("generate --prompts {prompts} x", "pass prompts or --prompts FILE, not both"),
        ("generate --teacher --prompts nowhere.txt", "can't read the prompt file nowhere.txt"),
        ("generate --teacher --workers 2 x", "--workers is for --ray"),
        ("generate --teacher --shard-size 0 x", "--shard-size"),
        ("generate --teacher --shard-size 2 --output /proc/boostdiff/x x", "can't write to"),
        ("distill --resume --output elsewhere", "nothing to resume"),
        ("distill --model {tiny}", "pass --prompts FILE or --images DIR"),
        ("export --student nowhere", "run `boostdiff distill` first"),
        ("export", "belongs to another model"),
        ("export --model {tiny} --output /proc/boostdiff/x", "can't write to"),
        ("bench --model {tiny} --prompts {prompts}", "run `boostdiff export` first"),
        ("bench --steps 0", "Invalid value for '--steps'"),
        ("bench --samples 1", "pass at least 2, or --speed-only\n"),
        ("bench table1 --samples 1", "pass at least 2\n"),
        (
            "bench table1 --model {tiny} --prompts {prompts} --samples 4 --guidance 5 --reference no-captions",
            "distill another, or draw with `boostdiff generate --teacher`",
        ),
        ("distill --few-steps 32:4 --start-from no-captions", "or pass --start-from DIR"),
        ("bench --student no-captions", "or pass --student DIR"),
        ("bench --sampler magic", "'magic' is not one of"),
        ("generate --sampler magic x", "'magic' is not one of"),
        ("generate --steps 0 x", "Invalid value for '--steps'"),
        ("generate --model {tiny} --guidance 5 x", "distilled at guidance 3"),
        ("generate --teacher --guidance 0.5 x", "must be at least 1"),
        ("generate --runner onnx x", "run `boostdiff export` first"),
        ("generate --model {tiny} --runner onnx x", "--model is not used with --runner onnx"),
        ("generate --model= --teacher x", "--model is empty"),
        ("generate --teacher --output= x", "--output is empty"),
        ("distill --images= --output new", "--images is empty"),
        ("bench --steps 4 --clip=", "--clip is empty"),
        ("bench table1 --reference=", "--reference is empty"),
        ("generate --teacher --device meta x", "can't use the device 'meta'"),
        ("generate --teacher --height 16392 x", "less than or equal to 16384"),
        ("generate --teacher --width 99999999999999999999999 x", "less than or equal to 16384"),
        ("generate --teacher --count 9223372036854775807 x", "less than or equal to 1000000"),
        ("generate --teacher --batch-size 99999999999999999999999 x", "--batch-size is too large"),
        ("distill --dry-run --method soft-prompt --tokens 4097", "less than or equal to 4096"),
        ("distill --dry-run --rank 9223372036854775808", "less than or equal to 4096"),
        ("distill --dry-run --output a-file", "is a file"),
        ("distill --dry-run --output /proc/boostdiff/x", "can't write to"),
        ("distill --dry-run --output a-file/below", "is a file"),
        ("distill --dry-run --output no-captions", "holds something else"),
        ("export --trt --batch 1:2:16385", "at most 16384"),
        ("export --size 99999999999999999999992", "at most 16384"),
        ("bench --batch-sizes 1,99999999999999999999999", "--batch-sizes is too large"),
        ("generate --engine elsewhere x", "--engine is not used with --runner torch"),
        ("generate --teacher --student elsewhere x", "--student is not used with --teacher"),
        ("generate --precision fp16 x", "--precision is not used with --runner torch"),
        ("generate --max-autotune x", "--max-autotune is not used with --runner torch: it is for --runner compiled"),
        ("bench --max-autotune --no-compile", "--max-autotune is not used with --no-compile"),
        ("distill --method bitfit --rank 4", "--rank is not used with --method bitfit"),
        ("distill --tokens 4", "--tokens is not used with --method lora"),
        ("distill --max-bad-samples 4", "--max-bad-samples is not used without --images"),
        ("export --batch 1", "--batch is not used without --trt"),
        ("export --trt --batch 4:1", "Invalid value for '--batch'"),
        ("generate --model {tiny} --output /proc/boostdiff/x x", "can't write to"),
        ("generate --model {tiny} --student nowhere --output new/below x", "run `boostdiff distill` first"),
        ("generate --runner onnx --engine nowhere --output new/below x", "run `boostdiff export` first"),
        (
            "bench --model {tiny} --prompts {prompts} --engine nowhere --output new/below",
            "run `boostdiff export` first",
        ),
        ("bench --model {tiny} --prompts {prompts} --output a-file/below", "is a file"),
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


def test_a_full_disk(
    boostdiff: Command, tmp_path: Path, tiny_folder: Path, prompt_file: Path, students: dict[str, Path]
) -> None:
    """At the checkpoint; the earlier student stays."""
    shutil.copytree(students["lora"], tmp_path / "outputs/student")
    before = {path: path.read_bytes() for path in (tmp_path / "outputs/student").iterdir()}
    with file_size_limit(8000):
        done = boostdiff(
            *("distill", "--model", tiny_folder, "--prompts", prompt_file, "--updates", 4, "--batch-size", 2),
            *("--checkpoint-every", 1, "--device", "cpu"),
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("boostdiff: error: the disk is full")
    assert {path: path.read_bytes() for path in (tmp_path / "outputs/student").iterdir()} == before


def test_a_full_disk_while_exporting(
    boostdiff: Command, tmp_path: Path, tiny_folder: Path, students: dict[str, Path], engines: dict[str, Path]
) -> None:
    """The graphs of the new engine don't fit; the standing one stays as it is."""
    engine = shutil.copytree(engines["lora"], tmp_path / "engine")
    before = {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()}
    limit = 60_000
    assert (engine / "unet/model.onnx.data").stat().st_size > limit
    with file_size_limit(limit):
        done = boostdiff(
            *("export", "--model", tiny_folder, "--device", "cpu", "--student", students["bitfit"], "--output", engine)
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("boostdiff: error: the disk is full")
    assert {path: path.read_bytes() for path in engine.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


@pytest.mark.parametrize("command", [("distill", "--model", "missing"), ("generate", "x", "--steps", "0")])
def test_a_traceback_under_debug_and_the_same_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    ends = []
    for words in (command, ("--debug", *command)):
        monkeypatch.setattr(sys, "argv", ["boostdiff", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr().err
        ends.append((ended.value.code, printed.splitlines()[-1]))
        assert ("Traceback" in printed) == ("--debug" in words)
    assert ends[0] == ends[1]
    assert ends[0][0] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(("distill", "--dry-run", "--json"), marks=pytest.mark.slow),
        ("--version",),
        ("distill", "--help"),
    ],
)
def test_results_that_nobody_gets_are_no_success(command: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "boostdiff", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == ("boostdiff: error: not all could be written to standard output: No space left on device\n")


@pytest.mark.parametrize(
    "name",
    ["[lora]", pytest.param("x[/lora]", marks=pytest.mark.slow), pytest.param("[bold]x", marks=pytest.mark.slow)],
)
def test_a_path_is_shown_as_it_is(
    boostdiff: Command,
    tiny_folder: Path,
    prompt_file: Path,
    students: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """And not read as rich's markup."""

    def exported(*args: object, output: Path, report: Callable[[str], None], **options: object) -> Any:
        report(f"nothing has changed since the export in {output}")
        return SimpleNamespace(artefacts={})

    monkeypatch.setattr("boostdiff.export.export.export", exported)
    model, student = ("--model", tiny_folder, "--device", "cpu"), ("--student", students["lora"])
    draw = ("generate", "a red cat", *model, *student, "--steps", 1, "--output")
    for words, says in (
        (
            ("distill", *model, "--prompts", prompt_file, "--updates", 1, "--batch-size", 2, "--output", f"{name}/s"),
            (f" in {name}/s (", f"; preview: {name}/s/grid.png"),
        ),
        ((*draw, f"{name}/o"), (f"1 image in {name}/o: ",)),
        ((*draw, f"{name}/shards", "--shard-size", 2), (f" shards in {name}/shards, 1 of them",)),
        (
            ("export", *model, *student, "--output", f"{name}/e"),
            (f"nothing has changed since the export in {name}/e", f"Engine in {name}/e: "),
        ),
    ):
        done = boostdiff(*words)
        assert done.returncode == 0, done.stderr
        shown = " ".join(done.stderr.split())
        for each in says:
            assert each in shown
