"""Promises of the repository: what the wheel holds, and that its documentation tells the truth."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from boostdiff.cli import app
from boostdiff.engine.manifest import Manifest
from boostdiff.engine.model import Model
from boostdiff.engine.student import StudentInfo
from typer.main import get_command

ROOT = Path(__file__).parents[1]
PARTS = ("benchmarks/speed", "benchmarks/quality", "benchmarks/report", "benchmarks/studies")
FOLDERS = ("engine", "engine/embedded", "distill", "export", "serve", "benchmarks", *PARTS, "teacher")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked files so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            out,
            source,
        ],
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_the_embedded_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"boostdiff/{name}" for name in ("__init__.py", "__main__.py", "cli.py", "py.typed")}
    for folder in FOLDERS:
        modules |= {f"boostdiff/{path.relative_to(ROOT)}" for path in (ROOT / folder).glob("*.py")}
        assert f"boostdiff/{folder}/__init__.py" in names
    data = {
        f"boostdiff/{path.relative_to(ROOT)}"
        for folder in (
            "engine/embedded/emoji64",
            "engine/embedded/emoji64-clip",
            "engine/embedded/prompts",
            "engine/embedded/reference",
            "benchmarks/configs",
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert "boostdiff/engine/embedded/emoji64/unet/diffusion_pytorch_model.safetensors" in data
    assert "boostdiff/engine/embedded/emoji64-clip/model.safetensors" in data
    assert modules | data <= names
    extra = {name for name in names - modules - data if ".dist-info/" not in name}
    assert extra == {"boostdiff/teacher/README.md", "boostdiff/serve/page.html"}


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process finds that has the wheel alone, and imports what training on prompts needs."""
    folder = tmp_path_factory.mktemp("outside")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", folder / "site", wheel], check=True
    )
    script = (
        "import boostdiff, json, sys; from boostdiff.engine.model import locate, load; import torch;"
        "import boostdiff.distill.distill;"
        "model = load(locate('emoji64'), device=torch.device('cpu'));"
        "print(json.dumps({'file': boostdiff.__file__, 'latents': model.latent_shape, 'modules': list(sys.modules)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    return {"site": folder / "site", **json.loads(done.stdout.splitlines()[-1])}


def test_the_wheel_works_from_outside_the_checkout(outside: dict[str, Any]) -> None:
    assert Path(outside["file"]).is_relative_to(outside["site"])
    assert outside["latents"] == [4, 16, 16]


def test_training_on_prompts_needs_no_library_of_images(outside: dict[str, Any]) -> None:
    assert "torch" in outside["modules"]
    assert "datasets" not in outside["modules"]


PAGES = [ROOT / "teacher/README.md", *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_modules_that_a_page_runs_exist(page: Path) -> None:
    for module in re.findall(r"python -m boostdiff\.(\w[\w.]*\w)", page.read_text(encoding="utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize(
    ("page", "begins", "written"),
    [("export", "`manifest.json`: ", Manifest), ("distillation", "| `student.json` | ", StudentInfo)],
)
def test_the_keys_that_a_page_names_are_written(page: str, begins: str, written: type) -> None:
    (text,) = (part for part in (ROOT / f"docs/{page}.md").read_text().split("\n\n") if begins in part)
    line = text.partition(begins)[2].partition(" |\n")[0]
    # What is in brackets is inside of a key.
    while (shorter := re.sub(r"\([^()]*\)", "", line)) != line:
        line = shorter
    names = set(re.findall(r"`(\w+)`", line))
    assert len(names) > 8
    assert names <= {item.name for item in fields(written)}


def test_the_parts_of_an_engine_that_a_page_uses_exist() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    used = set(re.findall(r"Engine\.load\([^)]*\)\.model\.(\w+)", pages))
    assert used
    assert all(hasattr(Model, name) for name in used)


def test_no_two_modules_share_a_name() -> None:
    names = [path.name for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    shared = {name for name in names if names.count(name) > 1}
    assert shared <= {"__init__.py", "__main__.py", "command.py", "config.py"}


def test_the_readmes_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"^\s*boostdiff (\w+)", text, flags=re.MULTILINE))
    assert {"distill", "export", "bench", "generate", "doctor"} <= commands
    found = get_command(app).commands
    assert commands <= found.keys()
    known = {name for command in found.values() for option in command.params for name in option.opts}
    options = set(re.findall(r"(?<=\s)--[a-z][a-z-]+", "\n".join(re.findall(r"^\s*boostdiff .*", text, re.MULTILINE))))
    assert options - {"--debug", "--version"} <= known
    targets = set(re.findall(r"make (\w+)", text))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_no_pickles_and_no_remote_code() -> None:
    for folder in (*FOLDERS, "."):
        for path in (ROOT / folder).glob("*.py"):
            code = path.read_text(encoding="utf-8")
            assert "trust_remote_code" not in code, path
            assert not re.search(r"\bimport pickle|shell=True", code), path
            assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", code)), path


def test_help_waits_for_no_library() -> None:
    libraries = "{'torch', 'diffusers', 'peft', 'ray', 'fastapi'}"
    code = f"import sys, boostdiff.cli; sys.exit(bool({libraries} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
