import re

import numpy as np
import pytest
from boostdiff.engine import embedded
from boostdiff.teacher.dataset import Artworks, caption, clean_name, compose, draw_prompts, to_model_range
from boostdiff.teacher.palette import BACKGROUNDS, background_of, named_background


def test_names_are_plain_words() -> None:
    assert clean_name("Woman: medium-light skin tone, “O’Hara”") == "woman medium light skin tone ohara"


def test_compose_blends_by_alpha() -> None:
    rgba = np.zeros((1, 2, 2, 4), dtype=np.uint8)
    rgba[0, 0, 0] = (200, 100, 0, 255)
    rgba[0, 0, 1] = (200, 100, 0, 128)
    composed = compose(rgba, (0, 0, 255))
    assert composed[0, 0, 0].tolist() == [200, 100, 0]
    assert composed[0, 1, 1].tolist() == [0, 0, 255]
    assert composed[0, 0, 1].tolist() == [100, 50, 127]
    assert to_model_range(composed).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_backgrounds_are_found_again_under_noise(name: str) -> None:
    image = np.full((1, 64, 64, 3), BACKGROUNDS[name], dtype=np.int64)
    image += np.random.default_rng(0).integers(-12, 13, image.shape)
    image[:, 16:48, 16:48] = 77
    assert background_of(image.clip(0, 255).astype(np.uint8)) == [name]
    assert named_background(caption(style="noto", name="cat", background=name)) == name


def test_other_prompts_name_no_background() -> None:
    assert named_background("a cat") is None
    assert named_background("noto emoji of cat on a plaid background") is None


def test_prompts_of_the_two_splits_share_no_artwork() -> None:
    held_out = np.array([False, True, False])
    artworks = Artworks(
        rgba=np.zeros((3, 64, 64, 4), np.uint8),
        styles=("noto",) * 3,
        names=("a", "b", "c"),
        held_out=held_out,
    )
    train = draw_prompts(artworks, held_out=False, count=100, seed=0)
    assert {index for index, _ in train} == {0, 2}
    assert len(train) == len(set(train)) == 26
    assert {index for index, _ in draw_prompts(artworks, held_out=True, count=100, seed=0)} == {1}


def test_the_shipped_prompt_lists() -> None:
    train, held_out = (
        path.read_text(encoding="utf-8").splitlines() for path in (embedded.TRAIN_PROMPTS, embedded.HELD_OUT_PROMPTS)
    )
    assert len(train) == len(held_out) == 4000
    assert not set(train) & set(held_out)
    assert all(re.match(r"(noto|twemoji|fluent) emoji of .+ on a .+ background$", line) for line in train + held_out)
    assert all(named_background(line) for line in train + held_out)
