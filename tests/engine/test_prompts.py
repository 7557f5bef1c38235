import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.engine.conditions import PromptEmbeds
from boostdiff.engine.errors import InputError
from boostdiff.engine.family import Family
from boostdiff.engine.model import Model
from boostdiff.engine.prompts import is_truncated, read_prompts, token_limit, truncation_note
from tiny import PROMPTS, make_sd3_pipeline
from tiny_chroma import make_chroma_pipeline


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(" one \n\ntwo\n", encoding="utf-8")
    assert read_prompts(path) == ["one", "two"]


def test_tags_are_prompts_and_no_table(tmp_path: Path) -> None:
    path = tmp_path / "tags.txt"
    for content in ("1girl,text,solo\ncat,red,mat", "a cat, caption, text\na red dog on a hill"):
        path.write_text(content)
        assert read_prompts(path) == content.splitlines()


@pytest.mark.parametrize("content", ["text\na red cat, on a mat\n", "id,prompt\n1,a dog, a hill\n"])
def test_commas_that_are_not_quoted_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=r"line 2 has more fields than the heading: put quotes"):
        read_prompts(path)


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a cat", "seed": 1}\n\n{"prompt": "two\\nbirds, grey"}\n'),
        ("p.txt", '\ufeff{"text": "a cat"}\r\n{"text": "two birds, grey"}\r\n'),
        ("p.csv", 'id,caption\n1,a cat\n2,"two birds, grey"\n'),
        ("p.txt", "caption\tid\na cat\t1\ntwo birds, grey\t2\n"),
        ("p.txt", 'seed;"prompt"\n1;a cat\n2;two birds, grey\n'),
        ("p.txt", '{"annotations": [{"caption": "a cat"}, {"caption": "two birds, grey"}]}'),
        ("p", "a cat\rtwo birds, grey\r"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_formats_are_known_by_name_or_content(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    (tmp_path / name).write_bytes((content if encoding == "utf-8" else content.lstrip("\ufeff")).encode(encoding))
    assert read_prompts(tmp_path / name) == ["a cat", "two birds, grey"]


def test_only_ends_of_lines_end_a_prompt(tmp_path: Path) -> None:
    for mark in "\u2028\u2029\u0085\x0b\x0c\x1e":
        (tmp_path / "p.txt").write_bytes(f"a{mark}cat\r\na {{b|c}} dog, prompt".encode())
        assert read_prompts(tmp_path / "p.txt") == [f"a{mark}cat", "a {b|c} dog, prompt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "a cat\n", "line 1 is not a JSON object"),
        ("p.jsonl", '{"text": "a"}\n{"prompt": "b"}\n', "line 2 lacks the text text"),
        ("p.csv", "a cat\na dog\n", "lacks the text text, prompt or caption"),
        ("p.yaml", "- a cat\n", "another format"),
        ("p.txt", "<!DOCTYPE html><p>a cat", "another format"),
        ("p.txt", '["a cat"]', "lacks the list annotations"),
        ("p.parquet", "PAR1\0", "not UTF-8"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_texts_beyond_the_text_encoder_are_counted(tiny: Model) -> None:
    limit = tiny.pipeline.tokenizer.model_max_length
    fits, long = " ".join(["cat"] * (limit - 2)), " ".join(["cat"] * (limit - 1))
    assert not is_truncated(tiny.pipeline, fits)
    assert truncation_note(tiny.pipeline, [fits, ""]) is None
    assert (
        truncation_note(tiny.pipeline, [fits, long, long, f"{long} dog"]) == f"2 of 3 prompts are cut to {limit} tokens"
    )


@pytest.mark.parametrize(
    ("t5", "note"),
    [(True, "2 of 3 prompts are cut to 16 tokens in CLIP, not in T5"), (False, "2 of 3 prompts are cut to 16 tokens")],
)
def test_what_clip_cuts_and_t5_reads_is_said(t5: bool, note: str) -> None:
    pipeline = make_sd3_pipeline(t5=t5)
    texts = ["a cat", " ".join(["cat"] * 20), " ".join(["cat"] * 200)]
    assert truncation_note(pipeline, texts) == note
    assert [is_truncated(pipeline, text) for text in texts] == [False, not t5, not t5]
    assert token_limit(pipeline) == (256 if t5 else 16)


@pytest.mark.parametrize("words", [256, 400])
def test_what_t5_cuts_is_said(words: int) -> None:
    """256 tokens with its end, as the stock pipeline takes them, whatever its tokenizer takes."""
    pipeline, long = make_sd3_pipeline(), " ".join(["cat"] * words)
    assert is_truncated(pipeline, long)
    assert truncation_note(pipeline, [long]) == "1 of 1 prompts are cut to 256 tokens"
    assert truncation_note(pipeline, [long, "cat " * 255]).endswith(
        "256 tokens; 1 of 2 prompts are cut to 16 tokens in CLIP, not in T5"
    )


@pytest.mark.parametrize("length", [64, 10**30])
def test_chroma_takes_512_tokens_whatever_its_tokenizer_says(length: int) -> None:
    pipeline = make_chroma_pipeline()
    pipeline.tokenizer.model_max_length = length
    assert truncation_note(pipeline, [" ".join(["cat"] * 511)]) is None
    assert truncation_note(pipeline, [" ".join(["cat"] * 512)]) == "1 of 1 prompts are cut to 512 tokens"


@pytest.mark.parametrize("texts", [["a fish"] * 4, ["a fish", "", "a fish", ""], ["a fish"]])
def test_equal_negative_prompts_are_encoded_once(
    tiny: Model, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, encoded = type(tiny.family).embed_negative, list[str]()

    def counted(family: Family, pipeline: Any, prompt: str) -> PromptEmbeds:
        encoded.append(prompt)
        return embed(family, pipeline, prompt)

    monkeypatch.setattr(type(tiny.family), "embed_negative", counted)
    text = tiny.family.encode(tiny.pipeline, PROMPTS[: len(texts)], negative_prompt=texts)
    assert encoded == list(dict.fromkeys(texts))
    assert len(text.unconditional) == len(texts)
    for row, prompt in zip(text.unconditional.encoder_hidden_states, texts, strict=True):
        assert torch.equal(row, embed(tiny.family, tiny.pipeline, prompt).encoder_hidden_states[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_numbers_stay_as_they_are_beside_half_precision(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[2049, 70001]])
    given = PromptEmbeds(encoder_hidden_states=torch.ones(1, 2, 3), encoder_attention_mask=numbers)
    moved = given.to(dtype)
    assert moved.dtype == dtype
    assert torch.equal(moved.tensors()["encoder_attention_mask"], numbers)
    assert {tensor.device.type for tensor in given.to("meta", dtype).tensors().values()} == {"meta"}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "named")
    reading, writing = os.pipe()
    os.write(writing, b"a red cat\n")
    os.close(writing)
    for path in (tmp_path / "named", Path(f"/dev/fd/{reading}"), Path(os.devnull)):
        with pytest.raises(InputError, match="is a pipe or a device"):
            read_prompts(path)
    os.close(reading)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"text": "a red cat"}\n{"text": "a \\ud800 cat"}\n'),
        ("p.json", '{"annotations": [{"caption": "\\udfff"}]}'),
    ],
)
def test_half_a_character_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"half a character, which is no text: .*\\ud"):
        read_prompts(tmp_path / name)
