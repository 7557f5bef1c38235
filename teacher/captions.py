"""What pictures are called: a grammar whose captions say less than the picture shows, as on the web.

A full caption names style, thing and background: "noto emoji of octopus on a light blue background". Others leave parts
out, put a tag or the group of the thing in place of its name, or order the words in another way. What a caption names
is kept beside it, so that pictures can be compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dataset import Artworks, Thing
from .palette import BACKGROUNDS


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """How often captions say less; probabilities of independent choices.

    Attributes:
        style: the style is named.
        background: the background is named.
        name: the thing is called by its name; else by one of its tags or other names, its subgroup or its group.
        plain_order: style, thing and background stand in the order of a full caption.
    """

    style: float = 0.7
    background: float = 0.7
    name: float = 0.6
    plain_order: float = 0.7


FULL = Grammar(style=1, background=1, name=1, plain_order=1)


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption, and what it names.

    Attributes:
        text: the caption.
        artwork: index of the artwork that it was made for.
        pictured: name of the background that the picture has.
        style: the style, if it is named.
        background: the background, if it is named.
    """

    text: str
    artwork: int
    pictured: str
    style: str | None
    background: str | None


def _thing_words(thing: Thing, random: np.random.Generator) -> str:
    """A tag or another name (six in ten), the subgroup or the group in place of a thing's name."""
    drawn = random.random()
    if drawn < 0.6 and thing.words:
        return thing.words[random.integers(len(thing.words))]
    return thing.subgroup if drawn < 0.85 else thing.group


def caption(
    artworks: Artworks, artwork: int, background: str, random: np.random.Generator, grammar: Grammar = Grammar()
) -> Caption:
    """One caption for an artwork over a named background."""
    style, thing = artworks.styles[artwork], artworks.things[artwork]
    says_style, says_background, says_name, plain = (
        bool(share > chance)
        for share, chance in zip(
            (grammar.style, grammar.background, grammar.name, grammar.plain_order), random.random(4), strict=True
        )
    )
    words = thing.name if says_name else _thing_words(thing, random)
    if plain:
        text = f"{style} emoji of {words}" if says_style else f"emoji of {words}"
        text += f" on a {background} background" if says_background else ""
    else:
        parts = [words, *([style] if says_style else []), *([f"{background} background"] if says_background else [])]
        text = " ".join(parts[i] for i in random.permutation(len(parts)))
    return Caption(
        text=text,
        artwork=artwork,
        pictured=background,
        style=style if says_style else None,
        background=background if says_background else None,
    )


def draw_captions(
    artworks: Artworks, *, held_out: bool, count: int, seed: int, grammar: Grammar = Grammar()
) -> list[Caption]:
    """Captions of one split: artworks by their weights, backgrounds alike."""
    random = np.random.default_rng([seed, held_out])
    names = list(BACKGROUNDS)
    return [
        caption(artworks, int(artwork), names[random.integers(len(names))], random, grammar)
        for artwork in artworks.draw(random, count, held_out=held_out)
    ]
