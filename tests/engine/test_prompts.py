import json
from pathlib import Path

import pytest
from boostdiff.engine.errors import InputError
from boostdiff.engine.prompts import read_prompts


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(" one \n\ntwo\n", encoding="utf-8")
    assert read_prompts(path) == ["one", "two"]


def test_coco_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2017.json"
    annotations = [{"id": 1, "image_id": 7, "caption": c} for c in ("A cat.\n", " ", "Deux\nchats, été")]
    path.write_text(json.dumps({"images": [], "annotations": annotations}, ensure_ascii=False), encoding="utf-8")
    assert read_prompts(path) == ["A cat.", "Deux chats, été"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "lacks the list annotations"),
        (b'{"annotations": {}}', "lacks the list annotations"),
        (b'{"annotations": [{"caption": "a"}, {"caption": 3}]}', "in annotation 2"),
        (b'{"annotations": ["a"]}', "in annotation 1"),
        (b'{"annotations": []}', "has no captions"),
    ],
)
def test_malformed_captions(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't read"):
        read_prompts(tmp_path / "captions.json")
