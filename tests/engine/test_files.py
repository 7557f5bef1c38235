import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from boostdiff.distill.checkpoint import save_training_state
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import (
    check_output,
    csv_rows,
    json_lines,
    lines_of,
    prepare_output,
    read_json,
    read_text,
    sha256_of,
    staged_folder,
    without_bom,
    write_json,
)
from safetensors.torch import save_file


def test_a_staged_folder_replaces_the_old_one_only_when_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with staged_folder(final, replaces="a") as folder:
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError), staged_folder(final, replaces="a") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (final / "a").read_text() == "first"
    with staged_folder(final, replaces="a") as folder:
        (folder / "b").write_text("second")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        prepare_output(tmp_path / "out")


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "out"
    final.mkdir()
    with staged_folder(final, replaces="mark") as folder:
        (folder / "other").write_text("kept")
    with pytest.raises(InputError, match="holds something else"), staged_folder(final, replaces="mark"):
        pass
    (final / "mark").write_text("")
    monkeypatch.chdir(final)
    for output in (Path(), final, tmp_path):
        with pytest.raises(InputError, match="the folder that you are in"), staged_folder(output, replaces="mark"):
            pass
    with pytest.raises(InputError, match="is a mount point"):
        prepare_output(Path("/proc"), replaces="mark")
    assert (final / "other").read_text() == "kept"


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to("disk")
    with staged_folder(link, replaces="mark") as folder:
        (folder / "mark").write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "disk/mark").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_an_output_that_can_not_be_written() -> None:
    with pytest.raises(InputError, match="can't write to"):
        prepare_output(Path("/proc/boostdiff/out"))


def test_what_is_checked_beforehand_writes_nothing(tmp_path: Path) -> None:
    """As `distill --dry-run` does."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder/inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder")
    check_output(tmp_path / "new/below", replaces="mark")
    check_output(tmp_path / "folder")
    with pytest.raises(InputError, match="can't write to"):
        check_output(Path("/proc/boostdiff/out"))
    for output, message in (
        ("file", "is a file"),
        ("file/below/it", "file is a file"),
        ("folder", "holds something else"),
        ("link", "holds something else"),
    ):
        for check in (check_output, prepare_output):
            with pytest.raises(InputError, match=message if check is check_output else None):
                check(tmp_path / output, replaces="mark")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "inside", "link"]


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    path.write_text("{")
    with pytest.raises(InputError, match="can't read"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="not a JSON object"):
        read_json(path)
    path.write_text('{"a": 1}\nx\n')
    with pytest.raises(InputError, match="line 2"):
        list(json_lines(path))


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


KILLED = """
import os, signal, sys
from pathlib import Path
from boostdiff.engine import files
final = Path(sys.argv[1])
with files.staged_folder(final, replaces="a") as staged:
    (staged / "half").write_text("written")
    if sys.argv[2] == "between":
        final.replace(final.with_name(f".{final.name}.replaced-killed"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("stage", ["before", "between"])
def test_what_a_killed_process_left_is_cleared(tmp_path: Path, stage: str) -> None:
    """Killed while it wrote, or just after it moved the standing folder away."""
    final = tmp_path / "out"
    with staged_folder(final, replaces="a") as folder:
        (folder / "a").write_text("standing")
    subprocess.run([sys.executable, "-c", KILLED, str(final), stage], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    assert final.exists() == (stage == "before")
    with pytest.raises(RuntimeError), staged_folder(final, replaces="a"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (final / "a").read_text() == "standing"


WRITER = """
import sys
from pathlib import Path
from boostdiff.engine.files import staged_folder
for turn in range(150):
    with staged_folder(Path(sys.argv[1]), replaces="a") as folder:
        for name in "ab":
            (folder / name).write_text(f"{sys.argv[2]} {turn}")
"""


def test_two_processes_that_write_one_folder(tmp_path: Path) -> None:
    """Each publishes whole folders, and neither takes the other's unfinished one for abandoned."""
    final = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(final)]
    writers = [subprocess.Popen([*command, name]) for name in ("one", "two")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (final / "a").read_text() == (final / "b").read_text()
    assert (final / "a").read_text().endswith(" 149")


def test_one_rule_for_text(tmp_path: Path) -> None:
    text = 'a\u2028b\x0c "é"\r\nc\rd\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "t").write_bytes(text.encode(encoding))
        assert lines_of(read_text(tmp_path / "t")) == ['a\u2028b\x0c "é"', "c", "d", ""]
    for content in (b"\xff", b"a\0b", b"\xff\xfea"):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(InputError, match="not UTF-8 text"):
            read_text(tmp_path / "t")


def test_json_lines_and_tables(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\r\n{"a": 2}\n\n')
    assert list(json_lines(tmp_path / "r.jsonl")) == [(1, {"a": "\u2028"}), (3, {"a": 2})]
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n[2]\n')
    with pytest.raises(InputError, match="line 2 is not a JSON object"):
        list(json_lines(tmp_path / "r.jsonl"))
    for mark in ",;\t":
        (tmp_path / "t.csv").write_text(f'\ufeffa{mark}b\n"1\n{mark}2"{mark}3\n\n')
        assert [row for _, row in csv_rows(tmp_path / "t.csv")] == [{"a": f"1\n{mark}2", "b": "3"}]


def test_a_model_folder_without_byte_order_marks(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(b"w")
    (folder / "unet" / "config.json").write_text("{}")
    with without_bom(folder) as same:
        assert same == folder
    (folder / "unet" / "config.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    with without_bom(folder) as clean:
        assert json.loads((clean / "unet" / "config.json").read_text(encoding="utf-8")) == {"a": 1}
        assert (clean / "unet" / "weights").read_bytes() == b"w"


@pytest.mark.parametrize(("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775)])
def test_modes_are_those_of_the_mask(tmp_path: Path, mask: int, file: int, directory: int) -> None:
    """safetensors and temporary folders are for one user alone by themselves."""
    before = os.umask(mask)
    try:
        with staged_folder(tmp_path / "result", replaces="a.safetensors") as staged:
            save_file({"a": torch.zeros(1)}, staged / "a.safetensors")
            (staged / "deep").mkdir(mode=0o700)
            (staged / "deep" / "b.txt").touch(mode=0o600)
        save_training_state(
            tmp_path / "checkpoint", step=0, weights={}, optimizer=torch.optim.SGD([torch.zeros(1)]), header={}
        )
    finally:
        os.umask(before)
    paths = [*(tmp_path / "result").rglob("*"), tmp_path / "result", tmp_path / "checkpoint"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {file}
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {directory}


@pytest.mark.parametrize(("name", "other"), [("out[1]", "out1"), ("a*", "ab")])
def test_what_is_abandoned_is_known_by_the_whole_name(tmp_path: Path, name: str, other: str) -> None:
    """Names hold characters that a pattern gives a meaning."""
    for folder in (f".{name}.partial-x", f".{other}.partial-x", f".{other}.replaced-x"):
        (tmp_path / folder).mkdir()
    (tmp_path / f".{other}.replaced-x" / "mark").touch()
    with staged_folder(tmp_path / name, replaces="mark") as staged:
        (staged / "mark").touch()
    assert {path.name for path in tmp_path.iterdir()} == {name, f".{other}.partial-x", f".{other}.replaced-x"}


@pytest.mark.parametrize("missing", ["a.json", "b.json"])
def test_every_mark_must_be_there(tmp_path: Path, missing: str) -> None:
    for name in {"a.json", "b.json", "other"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"there is no {missing} in it"):
        check_output(tmp_path, replaces=("a.json", "b.json"))
    (tmp_path / missing).touch()
    check_output(tmp_path, replaces=("a.json", "b.json"))


@pytest.mark.parametrize("theirs", ["notes.txt", "deeper/notes.txt"])
def test_what_is_put_there_meanwhile_stays_and_the_finished_folder_too(tmp_path: Path, theirs: str) -> None:
    """As long as `before_publishing` says so; and what has taken the folder's place, in any case."""
    final = tmp_path / "final"

    def refuse() -> None:
        if (final / theirs).exists():
            raise InputError(f"{theirs} would be lost")

    for number in (2, 3):
        with (
            pytest.raises(InputError, match=rf"{theirs} would be lost; the finished one is in .*final-{number}$"),
            staged_folder(final, replaces="mark", before_publishing=refuse) as staged,
        ):
            (staged / "mark").write_text(str(number))
            (final / theirs).parent.mkdir(parents=True, exist_ok=True)
            for path in (final / "mark", final / theirs):
                path.write_text("theirs")
        assert (tmp_path / f"final-{number}" / "mark").read_text() == str(number)
        assert (final / theirs).read_text() == "theirs"
    with pytest.raises(InputError, match=r"something else .*final-4$"), staged_folder(final, replaces="mark") as staged:
        (staged / "mark").write_text("4")
        (final / "mark").unlink()
    assert (final / theirs).read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "final-2", "final-3", "final-4"]
