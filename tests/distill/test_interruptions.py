"""What goes wrong around a run: files in its way, signals between stages, damaged checkpoints, odd captions."""

import json
import os
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.distill.config import DistillConfig, RunConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.image_files import open_images
from boostdiff.distill.images import ImageStream, Row, _BadSampleError, _caption
from boostdiff.distill.loop import CHECKPOINT_FILE, Observers, UpdateReport
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.files import csv_rows
from boostdiff.engine.model import ModelFiles, locate
from boostdiff.engine.student import StudentInfo, read_student
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import save_images

SILENT = Observers(preview=False)


def _trained(report: UpdateReport) -> None:
    raise AssertionError("what was trained is trained again")


UNTRAINED = Observers(preview=False, on_update=_trained)


@pytest.mark.parametrize(
    "theirs", ["notes.txt", "engine/manifest.json", "stages/8/README.md", "stages/notes/today.md", "previews/best.txt"]
)
def test_what_a_user_has_put_into_a_students_folder_is_not_removed(
    tiny_files: ModelFiles, prompt_file: Path, students: dict[str, Path], tmp_path: Path, theirs: str
) -> None:
    output, config = shutil.copytree(students["lora"], tmp_path / "s"), DistillConfig(prompts=prompt_file, updates=1)
    shutil.copytree(students["lora"], output / "stages/8")
    for own in ("previews/000001.png", "stages/8/boostdiff/events.1", ".DS_Store"):
        (output / own).parent.mkdir(exist_ok=True)
        (output / own).touch()
    (output / theirs).parent.mkdir(exist_ok=True)
    (output / theirs).write_text("mine")
    with pytest.raises(InputError, match=f"{theirs} was not written by `boostdiff distill`, which would remove it"):
        distill(tiny_files, config, output=output, device="cpu", observers=SILENT)
    assert (output / theirs).read_text() == "mine"
    (output / theirs).unlink()
    distill(tiny_files, config, output=output, device="cpu", observers=SILENT)
    assert not (output / "stages").exists()


@pytest.mark.parametrize("stages", [None, "4:2"])
def test_what_is_put_there_during_a_run_is_not_removed_and_the_student_is_kept(
    tiny_files: ModelFiles, prompt_file: Path, students: dict[str, Path], tmp_path: Path, stages: str | None
) -> None:
    output = shutil.copytree(students["lora"], tmp_path / "s")
    before = read_student(output)
    config = DistillConfig(
        prompts=prompt_file, updates=1, batch_size=2, few_steps=stages, stage_updates=1 if stages else None
    )

    def put(report: object) -> None:
        (output / "notes.txt").write_text("mine")

    observers = Observers(preview=False, on_update=put)
    with pytest.raises(InputError, match=r"notes.txt was not written .*: the new student stays in .*s\.unfinished"):
        distill(tiny_files, config, output=output, device="cpu", observers=observers)
    assert (output / "notes.txt").read_text() == "mine"
    assert read_student(output) == before
    kept = read_student(tmp_path / "s.unfinished")
    assert kept.steps == (2 if stages else None)
    for again in (RunConfig(), RunConfig(resume=True)):
        with pytest.raises(InputError, match=r"notes\.txt was not written"):
            distill(tiny_files, config, again, output=output, device="cpu", observers=SILENT)
        assert read_student(tmp_path / "s.unfinished") == kept
    (output / "notes.txt").unlink()
    info = distill(tiny_files, config, RunConfig(resume=True), output=output, device="cpu", observers=UNTRAINED)
    assert info == kept == read_student(output, tiny_files)
    assert not (tmp_path / "s.unfinished").exists()


@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("stages", [None, pytest.param("4:2", marks=pytest.mark.slow)])
def test_a_run_killed_before_its_student_has_its_name_is_not_trained_again(
    tiny_files: ModelFiles,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scale: float | None,
    stages: str | None,
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    few = {"few_steps": stages, "stage_updates": 1} if stages else {}
    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2, adapter_scale=scale if stages else None, **few)
    monkeypatch.setattr("boostdiff.distill.run_folder.publish", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(
            tiny_files, config, RunConfig(checkpoint_every=1), output=tmp_path / "s", device="cpu", observers=SILENT
        )
    monkeypatch.undo()
    trained: list[tuple[int | None, int]] = []
    observers = Observers(preview=False, on_update=lambda report: trained.append((report.steps, report.update)))
    asked = replace(config, adapter_scale=scale)
    info = distill(tiny_files, asked, RunConfig(resume=True), output=tmp_path / "s", device="cpu", observers=observers)
    assert trained == ([(2, 1)] if stages else [])
    assert read_student(tmp_path / "s", tiny_files) == info
    assert not list(tmp_path.rglob(CHECKPOINT_FILE))
    if not stages:
        assert info.settings["adapter_scale"] == (scale or 1.0)


def test_starting_over_sets_a_student_without_its_name_aside(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    config, notes = DistillConfig(prompts=prompt_file, updates=1, batch_size=2), list[str]()
    monkeypatch.setattr("boostdiff.distill.run_folder.publish", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    monkeypatch.undo()
    kept = read_student(tmp_path / "s.unfinished")
    observers = Observers(preview=False, on_note=notes.append)
    distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=observers)
    assert read_student(tmp_path / "s.abandoned", tiny_files) == kept
    assert "s.abandoned" in notes[0]


def test_weights_that_can_not_be_read_leave_an_unfinished_run_where_it_is(
    tiny_files: ModelFiles, prompt_file: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise InputError("no weights")

    before = unfinished.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no weights"):
        patch.setattr("boostdiff.distill.job.load", fail)
        config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2)
        distill(tiny_files, config, output=unfinished.parent.with_name("s"), device="cpu", observers=SILENT)
    assert unfinished.read_bytes() == before
    assert [path.name for path in unfinished.parent.parent.iterdir()] == [unfinished.parent.name]


@pytest.mark.parametrize("skipped", [False, True])
def test_an_image_that_can_not_be_read_costs_no_updates(tiny_files: ModelFiles, tmp_path: Path, skipped: bool) -> None:
    save_images(tmp_path / "images", count=6)
    config = DistillConfig(images=str(tmp_path / "images"), updates=5, batch_size=2, reuse=1, learning_rate=0.01)
    execution = RunConfig(max_bad_samples=1 if skipped else 0)
    stream = ImageStream(open_images(str(tmp_path / "images")), height=16, width=16, batch_size=2, seed=0)
    captions = [caption for _ in range(3) for caption in stream.next_batch(range(2))[0]]
    image = tmp_path / "images" / f"{captions[-1].split()[1]}.png"
    good = image.read_bytes()
    bad = bytes(len(good))

    def run(name: str, execution: RunConfig) -> StudentInfo:
        return distill(tiny_files, config, execution, output=tmp_path / name, device="cpu", observers=SILENT)

    image.write_bytes(bad if skipped else good)
    whole = run("whole", execution)
    image.write_bytes(bad)
    with pytest.raises(InputError, match=r"bad image sample .*; saved after update 2, from where --resume goes on"):
        run("cut", RunConfig())
    image.write_bytes(bad if skipped else good)
    info = run("cut", replace(execution, resume=True))
    assert info.result["resumed_at"] == 2
    assert info.result["notes"] == whole.result["notes"]
    assert len(info.result["notes"]) == skipped
    for name in (LORA_FILE, "log.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_embeddings_that_can_not_be_read_cost_no_updates(tiny_files: ModelFiles, tmp_path: Path) -> None:
    # Trajectories of up to 16 steps: by then others begin, with prompts that are read only now.
    config = DistillConfig(prompts=tmp_path / "prompts.txt", updates=20, batch_size=3, learning_rate=0.01)
    config.prompts.write_text("".join(f"a red cat {number}\n" for number in range(60)))
    texts = tmp_path / "texts"

    def run(name: str, *, resume: bool = False, lose: bool = False) -> StudentInfo:
        def on_update(report: UpdateReport) -> None:
            if lose and report.update == 2:
                shutil.rmtree(texts)

        execution, observers = RunConfig(cache_text=texts, resume=resume), Observers(preview=False, on_update=on_update)
        return distill(tiny_files, config, execution, output=tmp_path / name, device="cpu", observers=observers)

    run("whole")
    with pytest.raises(InputError, match=r"can't read the text embeddings .*; saved after update \d+, from where"):
        run("cut", lose=True)
    assert run("cut", resume=True).result["resumed_at"] >= 2
    assert (tmp_path / "cut" / LORA_FILE).read_bytes() == (tmp_path / "whole" / LORA_FILE).read_bytes()


@pytest.mark.parametrize("name", ["thesis.txt", "raw/a.png"])
def test_a_work_folder_of_something_else_is_not_removed(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def needless(*args: object, **options: object) -> None:
        raise AssertionError("weights are read before the folder is looked into")

    monkeypatch.setattr("boostdiff.distill.job.load", needless)
    path = tmp_path / "s.unfinished" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=r"s\.unfinished, where the run would work, holds something else"):
        distill(
            tiny_files,
            DistillConfig(prompts=prompt_file, updates=1),
            output=tmp_path / "s",
            device="cpu",
            observers=SILENT,
        )
    assert path.read_text() == "mine"


@pytest.mark.parametrize("inside", ["s", "s/texts", "s.unfinished/texts"])
def test_cached_texts_inside_the_output_are_refused(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, inside: str
) -> None:
    with pytest.raises(InputError, match=r"--cache-text .* would be lost with .*: pass another --output"):
        distill(
            tiny_files,
            DistillConfig(prompts=prompt_file, updates=1),
            RunConfig(cache_text=tmp_path / inside),
            output=tmp_path / "s",
            device="cpu",
            observers=SILENT,
        )


@pytest.mark.parametrize("stops_at", [(None, 2), (4, 3)])
def test_a_signal_in_the_last_update_of_a_stage_stops_before_the_next(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, stops_at: tuple[int | None, int]
) -> None:
    config = DistillConfig(prompts=prompt_file, updates=2, batch_size=2, few_steps="8:2", stage_updates=3)

    def stop(report: UpdateReport) -> None:
        if (report.steps, report.update) == stops_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(BoostDiffError, match=r"stopped by SIGTERM after update \d, saved: the same command with"):
        distill(
            tiny_files, config, output=tmp_path / "s", device="cpu", observers=Observers(preview=False, on_update=stop)
        )
    seen: list[tuple[int | None, int]] = []
    observers = Observers(preview=False, on_update=lambda report: seen.append((report.steps, report.update)))
    info = distill(tiny_files, config, RunConfig(resume=True), output=tmp_path / "s", device="cpu", observers=observers)
    assert info.steps == 2
    assert stops_at not in seen
    assert seen[0][1] == 1


@pytest.fixture
def unfinished(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> Path:
    def stop(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(
            tiny_files,
            DistillConfig(prompts=prompt_file, updates=4, batch_size=2),
            RunConfig(checkpoint_every=1),
            output=tmp_path / "s",
            device="cpu",
            observers=Observers(preview=False, on_update=lambda report: report.update == 2 and stop(report)),
        )
    return tmp_path / "s.unfinished" / CHECKPOINT_FILE


@pytest.mark.parametrize(
    ("header", "lacks", "message"),
    [
        ({"step": "x"}, "", "is damaged: .*invalid literal"),
        ({"step": None}, "", "is damaged: .*step"),
        ({"header": "{"}, "", "is damaged"),
        ({"header": "[]"}, "", "is damaged: .*its header is no object"),
        ({"param_groups": "[]"}, "", "can't resume: "),
        ({"step": "99"}, "", "can't resume: the checkpoint is of update 99"),
        ({}, "data/z_t", "can't resume: .*z_t"),
    ],
)
def test_a_damaged_checkpoint_is_said_in_a_line(
    tiny_files: ModelFiles, prompt_file: Path, unfinished: Path, header: dict[str, Any], lacks: str, message: str
) -> None:
    with safe_open(unfinished, framework="pt") as file:
        metadata = file.metadata() | header
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != lacks}  # noqa: SIM118
    save_file(tensors, unfinished, {name: value for name, value in metadata.items() if value is not None})
    with pytest.raises(InputError, match=message) as raised:
        distill(
            tiny_files,
            DistillConfig(prompts=prompt_file, updates=4, batch_size=2),
            RunConfig(resume=True),
            output=unfinished.parent.with_name("s"),
            device="cpu",
            observers=SILENT,
        )
    assert "\n" not in str(raised.value)
    assert unfinished.exists()


@pytest.mark.parametrize("error", [BoostDiffError("the VAE's images are not finite"), MemoryError()])
def test_a_picture_that_can_not_be_drawn_costs_no_student(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **options: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr("boostdiff.distill.preview.generate", fail)
    notes: list[str] = []
    info = distill(
        tiny_files,
        DistillConfig(prompts=prompt_file, updates=2, batch_size=2),
        RunConfig(preview_every=1),
        output=tmp_path / "s",
        device="cpu",
        observers=Observers(on_note=notes.append),
    )
    assert read_student(tmp_path / "s") == info
    assert [note for note in notes if note.startswith("there is no grid.png: ")]
    assert [note for note in notes if note.startswith("there is no 000001.png: ")]


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_link_to_nothing_is_named_in_every_part(
    tiny_folder: Path, prompt_file: Path, tmp_path: Path, name: str
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "m")
    (model / name).unlink()
    (model / name).symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=f"{name} is a link to nothing"):
        distill(
            locate(str(model)),
            DistillConfig(prompts=prompt_file, updates=1),
            output=tmp_path / "s",
            device="cpu",
            observers=SILENT,
        )


def test_rescaling_keeps_links_as_they_are_and_the_settings_true(
    tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path
) -> None:
    config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2)
    distill(tiny_files, config, output=tmp_path / "s", device="cpu", observers=SILENT)
    (tmp_path / "s" / "dead").symlink_to(tmp_path / "gone")
    (tmp_path / "s" / "texts").symlink_to(prompt_file.parent)
    rescaled = DistillConfig(prompts=prompt_file, updates=1, batch_size=2, adapter_scale=1.5)
    distill(tiny_files, rescaled, RunConfig(resume=True), output=tmp_path / "s", device="cpu", observers=SILENT)
    assert (tmp_path / "s" / "dead").is_symlink()
    assert (tmp_path / "s" / "texts").is_symlink()
    assert json.loads((tmp_path / "s" / "config.json").read_text())["adapter_scale"] == 1.5


def test_cached_texts_have_the_modes_of_the_umask(tiny_files: ModelFiles, prompt_file: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        distill(
            tiny_files,
            DistillConfig(prompts=prompt_file, updates=1, batch_size=2),
            RunConfig(cache_text=tmp_path / "texts"),
            output=tmp_path / "s",
            device="cpu",
            observers=SILENT,
        )
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "texts").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


@pytest.mark.parametrize(
    ("name", "text"),
    [("m.csv", 'file_name,text\na.png,"tall tree\nb.png,a dog\n'), ("p.tsv", 'id\ttext\n1\t"a cat\n2\ta dog\n')],
)
def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"can't read .*{name} line"):
        list(csv_rows(tmp_path / name))


def test_a_tsv_of_one_column_is_divided_by_tabs_alone(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text("prompt\na red, round apple\n")
    assert list(csv_rows(tmp_path / "p.tsv")) == [(2, {"prompt": "a red, round apple"})]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,description\na.png,a cat\n"),
        ("metadata.jsonl", '{"file_name": "a.png", "title": "a cat"}\n'),
    ],
)
def test_a_table_without_captions_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=f"{name} holds no captions: name their field text"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("caption", ["a\0b", "a red cat".encode("utf-16-le").decode("utf-8")])
def test_a_caption_with_zero_bytes_is_no_text(tmp_path: Path, caption: str) -> None:
    (tmp_path / "a.txt").write_bytes(caption.encode())
    for given in (caption, tmp_path / "a.txt"):
        with pytest.raises(_BadSampleError, match="its caption is not UTF-8 text"):
            _caption(Row(name="a", image=None, caption=given))
