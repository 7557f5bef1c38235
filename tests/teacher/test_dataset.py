import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artworks import make_artworks
from boostdiff.engine import embedded
from boostdiff.teacher import dataset
from boostdiff.teacher.captions import FULL, Grammar, caption, draw_captions
from boostdiff.teacher.dataset import RASTER, STYLES, clean_name
from boostdiff.teacher.palette import BACKGROUNDS, background_of
from boostdiff.teacher.placement import draw_pictures, mirrors, to_model_range

CENTERED: dict[str, Any] = {"smallest": 1, "degrees": 0, "mirror": 0}


def test_names_are_plain_words() -> None:
    assert clean_name("Woman: medium-light skin tone, “O’Hara”") == "woman medium light skin tone ohara"


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_backgrounds_are_found_again_under_noise(name: str) -> None:
    image = np.full((1, 64, 64, 3), BACKGROUNDS[name], dtype=np.int64)
    image += np.random.default_rng(0).integers(-12, 13, image.shape)
    image[:, 16:48, 16:48] = 77
    assert background_of(image.clip(0, 255).astype(np.uint8)) == [name]


def test_a_centered_picture_blends_by_alpha() -> None:
    artworks = make_artworks(1)
    artworks.rgba[0] = (200, 100, 0, 255)
    artworks.rgba[0, :, 32:, 3] = 0
    artworks.rgba[0, 32:, 32:, 3] = 128
    random = np.random.default_rng(0)
    picture = draw_pictures(artworks, np.array([0]), np.array([[0, 0, 255]]), random, **CENTERED)
    assert picture.shape == (1, 3, 64, 64)
    assert picture.dtype == torch.uint8
    assert picture[0, :, 40, 10].tolist() == [200, 100, 0]
    assert picture[0, :, 10, 50].tolist() == [0, 0, 255]
    assert picture[0, :, 50, 50].tolist() == [100, 50, 127]
    assert to_model_range(picture).aminmax() == (-1.0, 1.0)


def test_placed_artworks_stay_inside_and_keep_their_colors() -> None:
    artworks = make_artworks(1)
    artworks.rgba[0] = (10, 200, 30, 255)
    random = np.random.default_rng(1)
    red = np.tile([255, 0, 0], (40, 1))
    pictures = draw_pictures(artworks, np.zeros(40, int), red, random, smallest=0.5, degrees=0, mirror=0)
    covered = pictures[:, 1] > 100
    sides = covered.flatten(1).sum(dim=1).sqrt()
    assert 31 < sides.min() < 40
    assert 56 < sides.max() < 65
    box = covered.any(dim=1).sum(dim=1) * covered.any(dim=2).sum(dim=1)
    assert (covered.flatten(1).sum(dim=1) > 0.95 * box).all()
    centers = (covered.any(dim=1) * torch.arange(64)).sum(dim=1) / covered.any(dim=1).sum(dim=1)
    assert centers.max() - centers.min() > 5
    # Bicubic edges overshoot a little.
    assert (pictures[:, 2] < 45).all()


def test_turns_and_mirrors_move_the_picture_as_they_say() -> None:
    artworks = make_artworks(1)
    artworks.rgba[0] = 0
    artworks.rgba[0, 10:20, 28:36] = (255, 255, 255, 255)
    black, random = np.zeros((1, 3)), np.random.default_rng(0)
    upright = draw_pictures(artworks, np.array([0]), black, random, **CENTERED)[0, 0].float()
    assert torch.equal(upright > 127, torch.from_numpy(artworks.rgba[0, ..., 3]) > 127)
    artworks.rgba[0, 10:20, 36:44] = (255, 255, 255, 255)
    mirrored = draw_pictures(artworks, np.array([0]), black, random, smallest=1, degrees=0, mirror=1)[0, 0]
    assert torch.equal(mirrored.flip(1) > 127, torch.from_numpy(artworks.rgba[0, ..., 3]) > 127)


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        ("octopus", "animals nature", True),
        ("backhand index pointing left", "people body", False),
        ("woman running facing right", "people body", False),
        ("p button", "symbols", False),
        ("alarm clock", "travel places", False),
    ],
)
def test_things_with_a_handedness_are_not_mirrored(name: str, group: str, expected: bool) -> None:
    thing = dataset.Thing(name=name, words=(), subgroup="any", group=group)
    assert mirrors(thing) is expected


def test_full_captions_name_everything_and_others_less() -> None:
    artworks = make_artworks(12)
    full = draw_captions(artworks, held_out=False, count=50, seed=0, grammar=FULL)
    for each in full:
        thing = artworks.things[each.artwork]
        assert each.text == f"{each.style} emoji of {thing.name} on a {each.background} background"
        assert each.background == each.pictured
    mixed = draw_captions(artworks, held_out=False, count=600, seed=0)
    for share, wanted in (
        (np.mean([each.style is None for each in mixed]), 0.3),
        (np.mean([each.background is None for each in mixed]), 0.3),
        (np.mean([artworks.things[each.artwork].name not in each.text for each in mixed]), 0.4),
    ):
        assert abs(share - wanted) < 0.06
    for each in mixed:
        assert (each.style is None) == (artworks.styles[each.artwork] not in each.text)
        assert (each.background is None) == (f"{each.pictured} background" not in each.text)


def test_a_grammar_without_names_falls_back_on_words_and_groups() -> None:
    artworks = make_artworks(3)
    random = np.random.default_rng(0)
    texts = {caption(artworks, 0, "red", random, Grammar(style=0, background=0, name=0)).text for _ in range(60)}
    thing = artworks.things[0]
    known = {*thing.words, thing.subgroup, thing.group}
    assert {text.removeprefix("emoji of ") for text in texts} == known


def test_captions_of_the_two_splits_share_no_artwork() -> None:
    artworks = make_artworks(20)
    for held_out in (False, True):
        drawn = draw_captions(artworks, held_out=held_out, count=100, seed=0)
        assert {bool(artworks.held_out[each.artwork]) for each in drawn} == {held_out}
    again = draw_captions(artworks, held_out=True, count=100, seed=0)
    assert [each.text for each in again] == [each.text for each in drawn]


def test_skin_tones_share_their_weight() -> None:
    artworks = make_artworks(3, names=("cat", "clown", "clown dark skin tone"), styles=("noto",) * 3)
    assert artworks.things[2].base == "clown"
    assert artworks.weights.tolist() == pytest.approx([1, 0.5**0.5, 0.5**0.5])


def test_the_split_is_the_same_for_the_first_styles_whatever_follows_them() -> None:
    styles = [style for style in RASTER for _ in range(400)]
    first = dataset._split(styles)
    both = dataset._split(styles + ["blob"] * 100)
    assert first.sum() == dataset.RASTER_HELD_OUT
    assert (both[:1200] == first).all()
    assert both[1200:].sum() == 6


def package(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return path


def test_vector_sets_are_found_by_their_characters_or_by_name(tmp_path: Path) -> None:
    thing = dataset.Thing(name="red heart", words=("love",), subgroup="hearts", group="smileys emotion")
    icon = {"body": '<rect width="16" height="16" fill="#f00"/>'}
    known = {"icons": json.dumps({"icons": {"any": icon, "redheart": icon, "other": icon}})}
    for characters, found in (({"2764-fe0f": "any"}, ["2764"]), ({}, ["2764"])):
        files = {"icons.json": known["icons"].encode(), "chars.json": json.dumps(characters).encode()}
        tarball = package(tmp_path / f"{len(characters)}.tgz", files)
        rendered = dict(dataset._rendered(tarball, {"2764": thing}))
        assert list(rendered) == found
        pixels = dataset._decode(rendered["2764"])
        assert pixels.shape == (64, 64, 4)
        assert (pixels == (255, 0, 0, 255)).all()


def test_the_shipped_prompt_lists() -> None:
    train, held_out = (
        path.read_text(encoding="utf-8").splitlines() for path in (embedded.TRAIN_PROMPTS, embedded.HELD_OUT_PROMPTS)
    )
    assert len(train) == len(held_out) == 4000
    assert 0.65 < sum(any(style in line.split() for style in STYLES) for line in held_out) / 4000 < 0.78
    assert 0.65 < sum(any(f"{name} background" in line for name in BACKGROUNDS) for line in held_out) / 4000 < 0.75
