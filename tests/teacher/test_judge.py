from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.distill.image_files import open_images
from boostdiff.engine import embedded
from boostdiff.engine.errors import InputError
from boostdiff.engine.model import load, locate
from boostdiff.engine.prompts import read_prompts
from boostdiff.engine.runners import TorchRunner
from boostdiff.teacher import measure
from boostdiff.teacher.architecture import make_vae
from boostdiff.teacher.dataset import HELD_OUT, STYLES, Artworks, draw_prompts
from boostdiff.teacher.judge import curve, draw, evaluate, figures, markdown_table, unseen_combinations
from boostdiff.teacher.measure import held_out_psnr, real_images, reconstructed, write_images
from boostdiff.teacher.style import named_style, style_accuracy, style_network, style_of, train_style
from PIL import Image
from tiny import CPU


@pytest.fixture(scope="module")
def artworks() -> Artworks:
    """Discs in three textures, one a style: plain, striped across and striped down; each second one held out."""
    y, x = np.mgrid[:64, :64]
    disc = (x - 32) ** 2 + (y - 32) ** 2 < 24**2
    textures = (np.ones((64, 64)), y // 2 % 2, x // 2 % 2)
    random = np.random.default_rng(0)
    rgba = np.zeros((90, 64, 64, 4), dtype=np.uint8)
    for i in range(90):
        rgba[i, ..., :3] = random.integers(80, 256, 3) * textures[i % 3][..., None]
        rgba[i, ..., 3] = 255 * disc
    return Artworks(
        rgba=rgba,
        styles=tuple(STYLES[i % 3] for i in range(90)),
        names=tuple(f"thing {i // 3}" for i in range(90)),
        held_out=np.arange(90) % 2 == 1,
    )


def test_the_judge_of_style_learns_and_is_kept(artworks: Artworks, tmp_path: Path) -> None:
    network = train_style(artworks, steps=30, batch=24)
    pairs = draw_prompts(artworks, held_out=True, count=60, seed=0)
    prompts, images = [artworks.caption(*pair) for pair in pairs], real_images(artworks, pairs)
    assert style_accuracy(network, prompts, images) > 0.9
    wrong = [prompt.replace("noto ", "fluent ") for prompt in prompts]
    noto = sum(named_style(prompt) == "noto" for prompt in prompts) / len(prompts)
    assert style_accuracy(network, wrong, images) < 1.1 - noto
    assert named_style("a cat") is None
    first = style_network(tmp_path, artworks, steps=2)
    again = style_network(tmp_path, artworks, steps=9)
    assert style_of(first, images) == style_of(again, images)


def test_unseen_combinations_are_known_emoji_in_an_unknown_style(artworks: Artworks) -> None:
    chosen = unseen_combinations(artworks, count=20, seed=0)
    assert len(chosen) == len({artworks.names[i] for i in chosen}) == 20
    training = np.flatnonzero(~artworks.held_out)
    for i in chosen:
        others = {artworks.styles[j] for j in training if artworks.names[j] == artworks.names[i]}
        assert others
        assert artworks.styles[i] not in others


def test_the_autoencoders_error_is_measured(artworks: Artworks) -> None:
    torch.manual_seed(0)
    vae = make_vae().eval()
    images = real_images(artworks, draw_prompts(artworks, held_out=True, count=3, seed=0))
    recovered = reconstructed(vae, images)
    assert recovered.shape == images.shape
    assert recovered.dtype == torch.uint8
    assert 0 < held_out_psnr(vae, artworks) < 20


def test_the_shipped_models_images_are_judged_better_than_noise(artworks: Artworks) -> None:
    prompts = read_prompts(embedded.HELD_OUT_PROMPTS)[:12]
    judges = {
        "network": EfficientNetLite0Features(),
        "reference": Reference.load(embedded.REFERENCE),
        "styles": train_style(artworks, steps=2),
    }
    noise = torch.randint(256, (12, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise_row = figures(noise, prompts, **judges)
    model = load(locate(embedded.MODEL_NAME), device=CPU)
    images = draw(model, TorchRunner(model.unet), prompts, scale=3.0, steps=8, seed=0, batch_size=12)
    drawn = figures(images, prompts, **judges)
    assert drawn["kid"] < noise_row["kid"]
    assert noise_row["background"] < drawn["background"]
    assert drawn["distance_low"] < drawn["distance"] < drawn["distance_high"]
    table = markdown_table({"real images": noise_row, "w=1": drawn}).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["real images", "w=1"]
    assert [line.split("|")[3].strip() for line in table[2:]] == ["0%", "100%"]
    assert "±" not in table[2] + table[3]
    many = {"real images": noise_row, "w=1": drawn | {"kid": 0.1, "kid_spread": 0.02}}
    assert "| 100.0 ± 20.0 |" in markdown_table(many)


def test_evaluate_refuses_what_it_cannot_judge(tmp_path: Path) -> None:
    rgba = np.zeros((HELD_OUT + 20, 64, 64, 4), dtype=np.uint8)
    np.savez(tmp_path / "artworks.npz", rgba=rgba, styles=["noto"] * len(rgba), names=["a"] * len(rgba))
    with pytest.raises(InputError, match="1 must be among them"):
        evaluate(tmp_path, scales="2,3")
    with pytest.raises(InputError, match="only 7800 held-out prompts"):
        evaluate(tmp_path, images=HELD_OUT * 13 + 1)


def test_the_loss_curve_is_drawn_from_the_logs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training log"):
        curve(tmp_path)
    lines = [f'{{"step": {step}, "loss": {1 / step}, "lr": 0.1}}\n' for step in range(1, 101)]
    (tmp_path / "vae.log.jsonl").write_text("".join(lines))
    curve(tmp_path)
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 300
        assert len(image.convert("L").getcolors()) > 2


def test_training_images_are_what_distill_reads(
    artworks: Artworks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load_artworks", lambda work: artworks)
    write_images(tmp_path, tmp_path / "images", count=7)
    rows = list(open_images(str(tmp_path / "images"))(0, 0, 0))
    pairs = draw_prompts(artworks, held_out=False, count=7, seed=0)
    assert sorted(row.caption for row in rows) == sorted(artworks.caption(*pair) for pair in pairs)
    with pytest.raises(InputError, match="something at"):
        write_images(tmp_path, tmp_path / "images", count=7)
