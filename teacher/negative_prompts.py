"""Negative prompts evaluated: whether what they name stays away, by the teacher and by students in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from ..benchmarks.quality.features import EfficientNetLite0Features, features_of
from ..benchmarks.report.tables import Table
from ..benchmarks.speed.fastest import SAMPLING_BATCH, FastestRunners
from ..engine.embedded import MODEL_NAME
from ..engine.errors import InputError
from ..engine.guidance import Denoiser, GuidedDenoiser
from ..engine.merge import merged_copy
from ..engine.model import load, locate, resolve_device
from ..engine.sampling import generate, to_uint8
from ..engine.student import read_student
from .captions import FULL, Grammar, draw_captions
from .dataset import Artworks, load_artworks
from .evaluate import Images, Sampling, Together
from .measure import Seed, Work
from .palette import background_of
from .style import style_network, style_of
from .things import groups_of, things_classifier

NEGATIVES = {"background": "{} background", "style": "{} emoji", "thing": "emoji of {}"}
"""The negative prompt for each kind of unwanted thing."""


def prompts_without(what: str, artworks: Artworks, *, count: int, seed: int) -> list[str]:
    """Held-out captions that do not say what a negative prompt will name, a key of `NEGATIVES`."""
    grammar = {"background": Grammar(background=0), "style": Grammar(style=0)}.get(what, FULL)
    captions = draw_captions(artworks, held_out=True, count=count, seed=seed, grammar=grammar)
    if what == "thing":
        return [f"{caption.style} emoji on a {caption.background} background" for caption in captions]
    return [caption.text for caption in captions]


def negatives(
    students: Annotated[list[Path], typer.Argument(help="Students of the embedded model, of one guidance scale.")],
    work: Work = Path("teacher-work"),
    images: Images = 500,
    steps: Sampling = 20,
    batch_size: Together = SAMPLING_BATCH,
    seed: Seed = 0,
) -> None:
    """How often what a negative prompt names appears nevertheless, in images of held-out captions (DDIM).

    The captions do not say the background (or the style, or the thing); the negative prompt names the one that the
    teacher draws unasked from the same noise, as the classifiers see it: of things their group. Rows: the teacher
    without and with the negative prompt, and each student; one of live negative prompts in one pass with it. Prints
    Markdown tables; ± is the standard error.

    Raises:
        InputError: a student can't be used, or the students are of several scales.
    """
    files = locate(MODEL_NAME)
    infos = {folder: read_student(folder, files) for folder in students}
    for folder, info in infos.items():
        # All is drawn beside one teacher, with plain guidance and the model's own timesteps.
        if info.steps is not None or info.guider != "cfg" or info.negative_prompt:
            raise InputError(
                f"the student in {folder} can't be compared here: no few-step one can, nor one of a guider but cfg or "
                "of a fixed negative prompt"
            )
    scales = {info.guidance for info in infos.values()}
    if len(scales) > 1:
        raise InputError("the students were distilled at different guidance: compare them one at a time")
    artworks = load_artworks(work)
    model = load(files, device=resolve_device("auto"))
    styles, network = style_network(work, artworks, seed=seed), EfficientNetLite0Features()
    things = things_classifier(work, artworks, network, model.pipeline.vae, seed=seed)
    unets = {folder: merged_copy(model, folder, info) for folder, info in infos.items()}
    passes = len(NEGATIVES) * steps * images * (4 + len(students))
    see: dict[str, Callable[[torch.Tensor], list[str]]] = {
        "background": lambda drawn: background_of(drawn.permute(0, 2, 3, 1).numpy()),
        "style": partial(style_of, styles),
        "thing": lambda drawn: [artworks.groups[i] for i in groups_of(things, features_of(network, drawn)).tolist()],
    }
    with FastestRunners(model, passes=passes, batch_size=batch_size) as runners:
        teacher = GuidedDenoiser(runners(model.denoiser), scales.pop())

        def draw(denoiser: Denoiser, prompts: list[str], negative: str | list[str]) -> torch.Tensor:
            drawn = generate(
                model,
                denoiser,
                text=model.family.encode(model.pipeline, prompts, negative_prompt=negative),
                make_scheduler=partial(model.make_scheduler, "ddim"),
                steps=steps,
                seed=seed,
                batch_size=batch_size,
            )
            return to_uint8(drawn)

        for what in NEGATIVES:
            prompts = prompts_without(what, artworks, count=images, seed=seed)
            unwanted = see[what](draw(teacher, prompts, ""))
            named = [NEGATIVES[what].format(each) for each in unwanted]

            def share(
                denoiser: Denoiser,
                negative: str | list[str],
                *,
                what: str = what,
                prompts: list[str] = prompts,
                unwanted: list[str] = unwanted,
            ) -> float:
                seen = see[what](draw(denoiser, prompts, negative))
                return float(np.mean([one == other for one, other in zip(seen, unwanted, strict=True)]))

            shares = {"teacher, no negative prompt": 1.0, "teacher, two passes": share(teacher, named)}
            for folder, info in infos.items():
                given = named if info.live_negative_prompt else ""
                name = f"{folder.name}, one pass{'' if given else ', no negative prompt'}"
                shares[name] = share(info.denoiser(runners(unets[folder])), given)
            removed = 1 - shares["teacher, two passes"]
            cells = [
                [
                    name,
                    f"{value:.1%} ± {(value * (1 - value) / images) ** 0.5:.1%}",
                    f"{(1 - value) / removed:.0%}" if removed else "–",
                ]
                for name, value in shares.items()
            ]
            print(f"N = {images} captions that name no {what}; the negative prompt names the teacher's\n")
            headings = [what, "the unwanted appears", "removed, as a share of what the teacher removes"]
            print(Table(headings=headings, cells=cells).markdown(), end="\n\n", flush=True)
