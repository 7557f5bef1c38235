"""Wrong input of the studies ends in one line and exit code 2, before any work, and nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest
from boostdiff.benchmarks.studies import held_out, layouts, profile, seeds
from boostdiff.benchmarks.studies.__main__ import app
from boostdiff.benchmarks.studies.full_size import STAGES, stages
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine.model import locate
from boostdiff.engine.terminal import run
from tiny import few_step_copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prompt_file: Path) -> Path:
    """A student of the embedded model, few-step ones, a file, an empty folder and a loop of links."""
    made = tmp_path_factory.mktemp("inputs")
    config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2)
    distill(locate("emoji64"), config, output=made / "s", device="cpu", observers=Observers(preview=False))
    few_step_copy(made / "s", made / "f", 2)
    few_step_copy(made / "s", made / "t/lora-0", 2)
    (made / "file").write_text("x")
    (made / "dir").mkdir()
    (made / "others").mkdir()
    (made / "others/summary.md").write_text("mine")
    (made / "loop").symlink_to("loop")
    return made


WRONG = [
    ("profile emoji64 --batch-sizes 0", "--batch-sizes must be at least 1"),
    ("profile emoji64 --batch-sizes 8,", "--batch-sizes '8,' is no comma-separated list"),
    ("profile emoji64 --steps 5000", "--steps 5000 can't be used with dpm++"),
    ("layouts emoji64 --rows 0", "--rows must be at least 1"),
    ("layouts emoji64 --rows -2", "--rows must be at least 1"),
    ("layouts emoji64 --rows x", "--rows 'x' is no comma-separated list"),
    ("layouts emoji64 --output dir", "the output dir is a folder"),
    ("layouts emoji64 --output file/x.md", "file is a file"),
    ("layouts emoji64 --output /proc/boostdiff/x.md", "can't write to"),
    ("layouts emoji64 --output=", "--output is empty"),
    ("seeds --work w --samples 100000", "--samples 100000 needs as many prompts"),
    ("seeds --work w --steps 5000", "--steps 5000 can't be used"),
    ("seeds --work w --samplers ddim,foo", "unknown sampler 'foo'"),
    ("seeds --work w --methods lora,foo", "'foo' is not one of 'lora'"),
    ("seeds --work w --methods=", "--methods is empty"),
    ("seeds --work w --guidance 0", "--guidance 0 can't be used"),
    ("seeds --work w -- --nosuch 1", "No such option: --nosuch"),
    ("seeds --work w -- --rank 0", "--rank"),
    ("seeds --work w -- --prompts missing", "can't read the prompt file missing"),
    ("seeds --work w -- --images=", "--images is empty"),
    ("seeds --work w -- --few-steps 8:4", "makes students of 4 steps of ddim alone: pass --samplers ddim --steps 4"),
    ("seeds --work w --steps 4 -- --few-steps=8:4", "--few-steps 8:4 makes students of 4 steps"),
    ("seeds --work w --samplers ddim -- --few-steps 8:2", "pass --samplers ddim --steps 2, too"),
    ("seeds --work t --steps 4", "this few-step student was distilled for 2 steps of ddim"),
    ("effective-guidance f --work w --steps 4", "this few-step student was distilled for 2 steps of ddim"),
    ("seeds --work file", "is a file: choose another --work"),
    ("seeds --work file/below", "choose another --work"),
    ("effective-guidance s --work file", "is a file: choose another --work"),
    ("effective-guidance s --work loop", "can't write to loop"),
    (f"effective-guidance s --work {300 * 'n'}", "File name too long"),
    ("effective-guidance s --work w --scales x", "--scales 'x' is no comma-separated list"),
    ("effective-guidance s --work w --scales 3,nan", "--scales must be at least 1"),
    ("effective-guidance s --work w --steps 5000", "--steps 5000 can't be used"),
    ("effective-guidance s --work w --samples 100000", "--samples 100000 needs as many prompts"),
    ("effective-guidance s dir --work w", "there is no student in dir: run `boostdiff distill` first, or pass another"),
    ("guidance-r2 s --prompts 100000", "--prompts 100000 needs as many prompts"),
    ("guidance-r2 s --scales 0.5", "--scales must be at least 1"),
    ("guidance-r2 s missing", "there is no student in missing"),
    ("int8 s --engine dir --work file", "is a file: choose another --work"),
    ("few-steps --student s --work file", "is a file: choose another --work"),
    ("random-folder emoji64 --output rf --seed -1", "--seed"),
    (f"random-folder emoji64 --output rf --seed {2**70}", "--seed"),
    ("random-folder emoji64 --output file", "file"),
    ("full-size --work file", "is a file: choose another --work"),
    ("full-size --work w --output others", "the output others holds a summary.md of something else: choose another"),
    ("training-memory sdxl", "for Stable Diffusion 1.x and 2.x, and sdxl is stable-diffusion-xl"),
    ("training-memory sana-1600m", "for Stable Diffusion 1.x and 2.x, and sana-1600m is sana"),
    ("full-size --work w --output file", "is a file: choose another --output"),
    ("full-size --work w --model nosuch", "there is no model 'nosuch'"),
    ("full-size --work w --only foo", "unknown stage 'foo'"),
    ("full-size --work w --batch-sizes 0", "--batch-sizes must be at least 1"),
]


@pytest.mark.parametrize(("words", "says"), WRONG)
def test_wrong_input_is_refused_before_any_work(
    folder: Path,
    words: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("worked")

    for module, name in (
        (held_out.Session, "open"),
        (held_out.subprocess, "run"),
        (profile, "random_model"),
        (layouts, "random_model"),
        (seeds, "trained"),
    ):
        monkeypatch.setattr(module, name, work)
    monkeypatch.chdir(folder)
    before = sorted(path for path in folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["studies", *words.split()])
    with pytest.raises(SystemExit) as ended:
        run(app)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("boostdiff: error: ")
    assert shown.err.count("\n") == 1
    assert says in shown.err
    assert ended.value.code == 2
    assert sorted(path for path in folder.rglob("*")) == before


@pytest.mark.slow
def test_an_error_is_the_one_line_that_is_shown() -> None:
    """Libraries say what they miss where they are imported."""
    command = [sys.executable, "-m", "boostdiff.benchmarks.studies", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "boostdiff: error: No such command 'nosuch'.\n"


def test_the_help_names_the_stages() -> None:
    arguments = {"model": "sd15", "device": "cpu", "batch_sizes": "1", "steps": 1, "runs": 3, "updates": 2}
    assert tuple(stages(work=Path("w"), output=Path("o"), **arguments)) == STAGES  # type: ignore[arg-type]
