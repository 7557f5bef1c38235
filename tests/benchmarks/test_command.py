"""`boostdiff bench` without a student: configurations alone, and comparisons."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from boostdiff.benchmarks.config import Metrics
from boostdiff.benchmarks.report.output_folder import check_replaceable, written_results
from boostdiff.cli import main
from boostdiff.engine import embedded
from PIL import Image
from tiny import PROMPTS


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
    short = ["--steps", 2, "--runs", 3, "--device", "cpu", "--no-compile"]
    measured = ["--model", "tiny", "--random-weights", *short]
    assert run([*measured, "--batch-sizes", "1,2", "--json"], monkeypatch) == 0
    report = json.loads(capfd.readouterr().out)
    assert {row["batch_size"] for row in report["speed"]["rows"]} == {1, 2}
    assert report["quality"] is None
    assert {path.name for path in (tmp_path / "outputs/bench").iterdir()} == {
        "report.json",
        "report.html",
    }
    path = "outputs/bench/report.json"
    assert run(["compare", path, path, "--json"], monkeypatch) == 0
    differences = json.loads(capfd.readouterr().out)
    assert all(row["change"] == 0 for row in differences["differences"])
    assert run(["compare", path, path], monkeypatch) == 0
    shown = capfd.readouterr().err
    assert "A against B" in shown
    assert "torch student over" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--random-weights", "--model", "missing"], "also chroma1-hd, "),
        (["--random-weights", "--engine", "x"], "--engine has no use with --random-weights"),
        (["--random-weights", "--inception-weights", "x"], "--inception-weights has no use with"),
        (["--speed-only", "--samples", "9"], "--samples has no use with --speed-only"),
        (["--speed-only", "--sampling-batch-size", "9"], "--sampling-batch-size has no use"),
        (["--batch-sizes", "1;2"], "no comma-separated list such as 1,2,4"),
        (["compare", "a.json", "b.json"], "can't read a.json"),
        (["--reference", "missing"], "there is no reference folder missing"),
        (["--reference", ".", "--reference-size", "0"], "--reference-size must be at least 8"),
        (["--reference-size", "64"], "pass their folder with --reference"),
        (["--prompts", "missing.json"], "can't read the prompt file missing.json"),
        (["--inception-weights", "missing.pt"], "no file of Inception weights missing.pt"),
        (["--seed", 5, "--speed-only"], "--seed has no use with --speed-only"),
        (["--alternatives", "--speed-only"], "--alternatives has no use with --speed-only"),
        (["--steps", 5, "table1"], "--steps is an option of `bench` alone: put it after `table1`"),
        (["table1", "--engine", "x"], "No such option: --engine"),
        (["table1", "--samplers", "ddim,magic"], "unknown sampler 'magic'"),
        (["table1", "--steps", "20,x"], "no comma-separated list such as 20,50"),
        (["table1", "--model", "sd15"], "there is no model"),
        (["sweep", "--guidance", "1;2"], "no comma-separated list such as 1,2,3,5"),
        (["sweep", "--guidance", "0"], "must be at least 1"),
        (["sweep", "--runs", 5], "No such option: --runs"),
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


def test_the_embedded_model_brings_its_reference_and_its_caption_model() -> None:
    expected = Metrics(reference=embedded.REFERENCE, clip=str(embedded.CAPTION_MODEL))
    assert Metrics().for_model("emoji64") == expected
    assert Metrics(clip="other").for_model("emoji64").clip == "other"
    assert Metrics().for_model("another") == Metrics()


@pytest.fixture(scope="module")
def workplace(tiny_folder: Path, students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the tiny model, four captions, and folders of real images, one of them of mixed sizes."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(students["lora"], folder / "outputs/student")
    captions = {"annotations": [{"image_id": i, "caption": prompt} for i, prompt in enumerate(PROMPTS)]}
    (folder / "captions.json").write_text(json.dumps(captions))
    random = np.random.default_rng(0)
    for name, sizes in (("real", [(20, 30)]), ("mixed", [(20, 30), (30, 20)]), ("few", [(20, 30)])):
        (folder / name).mkdir()
        for i in range(19 if name == "few" else 24):
            pixels = random.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def tables(workplace: Path, tiny_folder: Path, *arguments: object) -> list[object]:
    base = ["sweep", "--model", tiny_folder, "--prompts", "captions.json", "--samples", 4, "--device", "cpu"]
    return [*base, "--guidance", "1,3", "--steps", 2, *arguments]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reference", "mixed"], "mixes image sizes (30x20, and 01.png has 20x30): pass --reference-size"),
        (["--reference", "few"], "holds 19 images: at least 20 are needed"),
        (["--reference", "captions.json", "--reference-size", 24], "--reference-size cuts real images"),
        (["--reference", "captions.json"], "can't read the reference captions.json"),
        (["--reference", "real", "--samples", 5], "needs as many prompts: there are 4"),
        (["--reference", "real", "--clip", "missing"], "there is no CLIP model 'missing'"),
        (["--reference", "real", "--inception-weights", "captions.json"], "can't read the Inception weights"),
        ([], "pass --reference DIR"),
        (["--reference", "real", "--student", "outputs/student", "--student", "outputs/student"], "given twice"),
        (["--reference", "real", "--samples", 0], "--samples must be at least 2"),
    ],
)
def test_wrong_data_ends_in_one_line(
    workplace: Path,
    tiny_folder: Path,
    arguments: list[object],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    assert run(tables(workplace, tiny_folder, *arguments), monkeypatch) == 2
    shown = capfd.readouterr().err
    assert shown.startswith("boostdiff: error: ")
    assert shown.count("\n") == 1
    assert says in shown


def test_a_sweep_of_captions_against_a_folder(
    workplace: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    wanted = tables(workplace, tiny_folder, "--reference", "mixed", "--reference-size", 24, "--json")
    assert run(wanted, monkeypatch) == 0
    first = json.loads(capfd.readouterr().out)
    assert first["reference_images"] == 22
    assert [(cell["quality"]["name"], cell["guidance"]) for cell in first["cells"]] == [
        ("teacher", 1.0),
        ("teacher", 3.0),
        ("student lora", 3.0),
    ]
    output = workplace / "outputs/bench"
    assert {path.name for path in output.iterdir()} == {"cache", "sweep.md", "sweep.json", "sweep.html"}
    shards = {path: path.stat().st_mtime_ns for path in (output / "cache").iterdir()}
    assert len(shards) == 3
    assert run(wanted, monkeypatch) == 0
    again = json.loads(capfd.readouterr().out)
    assert again["cells"] == first["cells"]
    assert {path: path.stat().st_mtime_ns for path in (output / "cache").iterdir()} == shards


BENCH = ("report.json", "report.html", "grid.png")


@pytest.mark.parametrize(
    ("words", "held", "says"),
    [
        (["--random-weights"], {"report.html": "mine"}, "holds a report.html that `boostdiff bench` did not write"),
        (["--random-weights"], {"report.json": "[1]"}, "holds a report.json that"),
        (["--random-weights"], {"grid.png": "mine", "report.json": '{"a": 1}'}, "holds a report.json that"),
        ([], {"grid.png": "mine"}, "holds a grid.png that"),
        ([], {"student.json": "{}", "grid.png": "of the student"}, "a student, an engine or a model (it holds student"),
        (["--random-weights"], {"manifest.json": "{}"}, "a student, an engine or a model (it holds manifest.json)"),
        (["table1"], {"table1.md": "mine"}, "holds a table1.md that"),
        (["sweep"], {"sweep.json": "{}"}, "holds a sweep.json that"),
        (["sweep"], {"model_index.json": "{}"}, "it holds model_index.json"),
        (["compose"], {"compose.html": "mine", "report.json": '{"schema_version": 6}'}, "holds a compose.html that"),
        (["compose"], {"student.json": "{}"}, "it holds student.json"),
    ],
)
def test_files_of_others_are_not_replaced(
    workplace: Path,
    tiny_folder: Path,
    words: list[str],
    held: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in held.items():
        (tmp_path / name).write_text(content)
    prompts = [] if "--random-weights" in words else ["--prompts", workplace / "captions.json"]
    monkeypatch.setattr("boostdiff.benchmarks.session.load", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr("boostdiff.benchmarks.bench.random_model", lambda *_, **__: pytest.fail("a model is made"))
    assert run([*words, "--model", tiny_folder, *prompts, "--output", tmp_path], monkeypatch) == 2
    shown = capfd.readouterr().err
    assert shown.startswith(f"boostdiff: error: the output {tmp_path} ")
    assert shown.count("\n") == 1
    assert says in shown
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == held


def test_what_bench_wrote_is_replaced(tmp_path: Path) -> None:
    figures = {"schema_version": 1}
    for drawn in (BENCH[1:], BENCH[1:2], ()):
        check_replaceable(tmp_path, BENCH)
        with written_results(tmp_path, BENCH, figures | {"drawn": drawn}) as folder:
            for name in drawn:
                (folder / name).touch()
        assert {path.name for path in tmp_path.iterdir()} == {BENCH[0], *drawn}
    check_replaceable(tmp_path / "missing", BENCH)


@pytest.mark.parametrize("name", ["[lora]", pytest.param("x[/lora]", marks=pytest.mark.slow)])
def test_a_path_is_shown_as_it_is(
    workplace: Path,
    tiny_folder: Path,
    students: dict[str, Path],
    clip_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """And not read as rich's markup: of the output, of students in a heading, and of the CLIP model in another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for copied in ("1", "2"):
        shutil.copytree(students["lora"], tmp_path / name / copied)
    clip = shutil.copytree(clip_folder, tmp_path / "clip" / name.replace("/", ""))
    options = ["--prompts", workplace / "captions.json", "--reference", workplace / "real", "--clip", clip]
    for copied in ("1", "2"):
        options += ["--student", f"{name}/{copied}"]
    sweep = ["sweep", "--guidance", "3", "--samples", 2, *options]
    for words, says in (
        (sweep, [f"Table: {name}/o/sweep.html", f"({name}/1)", f"({clip.name})"]),
        (["--random-weights", "--runs", 3, "--no-compile"], [f"Report: {name}/o/report.html"]),
    ):
        measured = [*words, "--model", tiny_folder, "--device", "cpu", "--steps", 1, "--output", f"{name}/o"]
        assert run(measured, monkeypatch) == 0
        shown = capfd.readouterr().err
        for each in says:
            assert each in shown
