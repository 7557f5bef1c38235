"""Made-up artworks for tests of the recipe."""

from collections.abc import Sequence

import numpy as np
from boostdiff.teacher.dataset import STYLES, Artworks, Thing

GROUPS = ("animals nature", "food drink", "objects")


def make_artworks(count: int, *, names: Sequence[str] = (), styles: Sequence[str] = ()) -> Artworks:
    """Discs in one texture a style (plain, striped across, striped down) and one colour range a group.

    Every second one is held out.
    """
    y, x = np.mgrid[:64, :64]
    disc = (x - 32) ** 2 + (y - 32) ** 2 < 24**2
    textures = (np.ones((64, 64)), y // 2 % 2, x // 2 % 2)
    random = np.random.default_rng(0)
    rgba = np.zeros((count, 64, 64, 4), dtype=np.uint8)
    for i in range(count):
        rgba[i, ..., :3] = random.integers(80, 256, 3) * textures[i % 3][..., None]
        rgba[i, ..., 3] = 255 * disc
    return Artworks(
        rgba=rgba,
        styles=tuple(styles) or tuple(STYLES[i % 3] for i in range(count)),
        things=tuple(
            Thing(
                name=names[i] if names else f"thing {i // 3}",
                words=("tag", "other word"),
                subgroup="kind",
                group=GROUPS[i // 3 % 3],
            )
            for i in range(count)
        ),
        held_out=np.arange(count) % 2 == 1 if not names else np.zeros(count, dtype=bool),
    )
