from pathlib import Path

import pytest
from boostdiff.engine.errors import InputError
from boostdiff.engine.files import json_lines, prepare_output, read_json, sha256_of, staged_folder, write_json


def test_a_staged_folder_replaces_the_old_one_only_when_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with staged_folder(final) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError), staged_folder(final) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (final / "a").read_text() == "first"
    with staged_folder(final) as folder:
        (folder / "b").write_text("second")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        prepare_output(tmp_path / "out")


def test_an_output_that_can_not_be_written() -> None:
    with pytest.raises(InputError, match="can't write to"):
        prepare_output(Path("/proc/boostdiff/out"))


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
