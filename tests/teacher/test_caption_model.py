from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artworks import make_artworks
from boostdiff.benchmarks.quality.clip_score import ClipScorer
from boostdiff.engine import embedded
from boostdiff.teacher import caption_model
from boostdiff.teacher.dataset import Artworks
from boostdiff.teacher.optimize import optimize


@pytest.fixture(scope="module")
def artworks() -> Artworks:
    return make_artworks(12)


@pytest.mark.slow
def test_it_learns_and_is_a_stock_folder(artworks: Artworks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_model, "load_artworks", lambda work: artworks)
    monkeypatch.setattr(caption_model, "RETRIEVAL", 8)
    work, output = tmp_path / "work", tmp_path / "clip"
    work.mkdir()
    losses = []

    def recorded(*, loss_of: Any, **options: Any) -> None:
        def loss_noted(step: int) -> torch.Tensor:
            losses.append(loss_of(step))
            return losses[-1]

        optimize(loss_of=loss_noted, **options)

    monkeypatch.setattr(caption_model, "optimize", recorded)
    caption_model.caption_model(work, output, steps=12, batch=16, learning_rate=2e-3)
    losses = [loss.item() for loss in losses]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    scorer = ClipScorer(str(output), device=torch.device("cpu"))
    pictures, texts = caption_model.training_batch(artworks, np.random.default_rng(0), 6)
    scores = scorer.scores(((pictures + 1) * 127.5).to(torch.uint8), texts)
    assert scores.shape == (6,)
    assert (scores > 0).any()
    assert sum(path.stat().st_size for path in output.rglob("*")) < 6e6


def test_retrieval_counts_how_many_score_higher(artworks: Artworks) -> None:
    class Perfect:
        def embeddings(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            texts = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
            codes = torch.eye(len(texts))[[texts[prompt] for prompt in prompts]]
            return codes, codes

    class Blind(Perfect):
        def embeddings(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            codes, _ = super().embeddings(images, prompts)
            return codes.roll(1, dims=0), codes

    assert caption_model.retrieval(Perfect(), artworks, count=20) == (1.0, 1.0)
    assert caption_model.retrieval(Blind(), artworks, count=20)[0] < 0.3


def test_the_shipped_caption_model_tells_prompts_apart() -> None:
    scorer = ClipScorer(str(embedded.CAPTION_MODEL), device=torch.device("cpu"))
    white, black = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), torch.full((1, 3, 64, 64), 18, dtype=torch.uint8)
    images = torch.cat([white, black])
    prompts = ["emoji of sheet on a white background", "emoji of sheet on a black background"]
    of_images, of_prompts = scorer.embeddings(images, prompts)
    scores = of_images @ of_prompts.T
    assert scores[0, 0] > scores[0, 1]
    assert scores[1, 1] > scores[1, 0]
