import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from boostdiff.engine import terminal
from boostdiff.engine.terminal import next_command

SCRIPT = """
import sys
import typer
from boostdiff.engine.terminal import console, print_json, progress_bar, run
from rich.console import Console
from rich.table import Table

app = typer.Typer(pretty_exceptions_enable=False)

class Odd(Exception):
    def __str__(self):
        raise ValueError

@app.command()
def draw(words: str, path: str) -> None:
    with progress_bar("drawing 猫", 2) as advance:
        advance(2)
    open(path, "w", encoding="utf-8").write(words)
    table = Table("✓ 猫")
    table.add_row(words)
    Console().print(table)
    console.print(words)
    print_json({"words": words})

@app.command()
def fail(kind: str) -> None:
    raise {
        "silent": AssertionError(),
        "odd": Odd(),
        "lines": RuntimeError("\\n\\n one\\n two"),
        "python": MemoryError(),
        "torch": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
        "gpu": type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."),
    }[kind]

run(app)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def call(script: Path, *words: str, outputs: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-c", f'"$@" {outputs}', "bash", sys.executable, str(script), *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_signs_that_can_not_be_shown_are_replaced(script: Path, tmp_path: Path, encoding: str) -> None:
    done = call(script, "draw", "café 猫", str(tmp_path / "f"), PYTHONIOENCODING=encoding)
    assert (done.returncode, (tmp_path / "f").read_text(encoding="utf-8")) == (0, "café 猫")
    shown = done.stdout.decode(encoding)
    assert ("café 猫" if encoding == "utf-8" else "caf? ?" if encoding == "ascii" else "café ?") in shown


@pytest.mark.parametrize(
    ("outputs", "code"),
    [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 1), ("2>/dev/full", 0), ("| true", 0)],
)
def test_outputs_that_take_nothing(script: Path, tmp_path: Path, outputs: str, code: int) -> None:
    done = call(script, "draw", "words", str(tmp_path / "f"), outputs=f"{outputs}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == code
    # What is printed never lands in a file that happens to get the closed stream's number.
    assert (tmp_path / "f").read_text() == "words"
    assert b"Error" not in done.stderr


@pytest.mark.parametrize("columns", ["0", "", "40"])
def test_terminals_that_do_not_know_their_width(script: Path, tmp_path: Path, columns: str) -> None:
    done = call(script, "draw", "words", str(tmp_path / "f"), COLUMNS=columns)
    assert done.returncode == 0
    assert done.stdout.count(b"words") == 3
    assert b"words" in done.stderr


def test_words_and_paths_in_a_plain_locale(script: Path, tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = tmp_path / "模型"
    done = call(script, "draw", "café 猫", str(path), **plain)
    assert done.returncode == 0, done.stderr
    assert path.read_text(encoding="utf-8") == "café 猫"


@pytest.mark.parametrize(
    ("kind", "message"), [("silent", b"AssertionError"), ("odd", b"Odd"), ("lines", b"RuntimeError: one")]
)
def test_exceptions_without_text(script: Path, kind: str, message: bytes) -> None:
    done = call(script, "fail", kind)
    assert done.returncode == 1
    assert done.stderr == b"boostdiff: error: " + message + b" (--debug shows where)\n"


@pytest.mark.parametrize("kind", ["python", "torch", "gpu"])
def test_memory_that_ends_is_said_in_our_words(script: Path, kind: str) -> None:
    done = call(script, "fail", kind)
    assert done.returncode == 1
    assert done.stderr.startswith(b"boostdiff: error: out of memory: pass smaller sizes or batches")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("own", "taken"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_openmp_is_told_to_spin_less_before_it_is_loaded(own: dict[str, str], taken: str) -> None:
    code = "import os, sys, boostdiff.cli; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | own
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.decode().split() == [taken, "False"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": ("emoji64", "emoji64"), "student": (Path("outputs/student"), "outputs/student")}, ""),
        (
            {"model": ("my model", "emoji64"), "student": (Path("s"), "outputs/student")},
            " --model 'my model' --student s",
        ),
    ],
)
def test_the_next_command_names_what_was_written(options: dict[str, tuple[object, object]], expected: str) -> None:
    assert next_command("export --trt", **options) == f"boostdiff export --trt{expected}"


def test_an_interruption_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def works() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["boostdiff"])
    monkeypatch.setattr(terminal, "_prepare_streams", lambda: None)
    with pytest.raises(SystemExit) as ended:
        terminal.run(app)
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "boostdiff: error: interrupted"
