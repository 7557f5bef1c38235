from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artworks import GROUPS, make_artworks
from boostdiff.benchmarks.quality.clip_score import ClipScorer
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features, features_of
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.benchmarks.speed.fastest import FastestRunners
from boostdiff.distill.config import DistillConfig
from boostdiff.distill.distill import distill
from boostdiff.distill.loop import Observers
from boostdiff.engine import embedded
from boostdiff.engine.errors import InputError
from boostdiff.engine.model import load, locate
from boostdiff.engine.student import StudentInfo
from boostdiff.teacher import negative_prompts
from boostdiff.teacher.architecture import make_vae
from boostdiff.teacher.captions import FULL, draw_captions
from boostdiff.teacher.dataset import Artworks
from boostdiff.teacher.evaluate import Evaluator, evaluate, results_table, teacher_images
from boostdiff.teacher.measure import held_out_captions, held_out_psnr, real_images, reconstructed
from boostdiff.teacher.style import style_network, style_of, train_style
from boostdiff.teacher.things import fit_groups, group_labels, groups_of, things_classifier
from tiny import CPU


@pytest.fixture(scope="module")
def artworks() -> Artworks:
    """Discs in three textures, one a style; each second one held out."""
    return make_artworks(90)


def test_the_classifier_of_style_learns_and_is_kept(artworks: Artworks, tmp_path: Path) -> None:
    network = train_style(artworks, steps=40, batch=24)
    captions = draw_captions(artworks, held_out=True, count=60, seed=0, grammar=FULL)
    found = style_of(network, real_images(artworks, captions))
    assert np.mean([seen == each.style for seen, each in zip(found, captions, strict=True)]) > 0.9
    first = style_network(tmp_path, artworks, steps=2)
    again = style_network(tmp_path, artworks, steps=9)
    images = real_images(artworks, captions[:20])
    assert style_of(first, images) == style_of(again, images)


def test_the_classifier_of_things_learns_from_features_and_is_kept(artworks: Artworks, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 8, generator=random) * 0.3
    features[torch.arange(300), labels] += 2
    classifier = fit_groups(features, labels, 3)
    assert (groups_of(classifier, features) == labels).float().mean() > 0.97
    assert (groups_of(classifier, features.roll(1, dims=1)) == labels).float().mean() < 0.3
    network = EfficientNetLite0Features()
    kept = things_classifier(tmp_path, artworks, network, make_vae(), images=12)
    again = things_classifier(tmp_path, artworks, network, make_vae(), images=30, seed=9)
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert group_labels(artworks, np.array([0, 3, 6, 9])).tolist() == [0, 1, 2, 0]
    assert artworks.groups == GROUPS


def test_the_autoencoders_error_is_measured(artworks: Artworks) -> None:
    torch.manual_seed(0)
    vae = make_vae().eval()
    images = real_images(artworks, draw_captions(artworks, held_out=True, count=3, seed=0))
    recovered = reconstructed(vae, images)
    assert recovered.shape == images.shape
    assert recovered.dtype == torch.uint8
    assert 0 < held_out_psnr(vae, artworks) < 20
    assert [each.artwork for each in held_out_captions(artworks)] == np.flatnonzero(artworks.held_out).tolist()


def evaluator_of(artworks: Artworks) -> Evaluator:
    network = EfficientNetLite0Features()
    captions = draw_captions(artworks, held_out=False, count=24, seed=3)
    features = features_of(network, real_images(artworks, captions))
    labels = group_labels(artworks, np.array([each.artwork for each in captions]))
    return Evaluator(
        artworks=artworks,
        features=network,
        reference=Reference.load(embedded.REFERENCE),
        styles=train_style(artworks, steps=2),
        things=fit_groups(features, labels, len(artworks.groups)),
        captions=ClipScorer(str(embedded.CAPTION_MODEL), device=CPU),
    )


def test_the_shipped_models_images_score_better_than_noise(artworks: Artworks, tmp_path: Path) -> None:
    evaluator = evaluator_of(artworks)
    captions = draw_captions(artworks, held_out=True, count=12, seed=0, grammar=FULL)
    noise = torch.randint(256, (12, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    noise_row = evaluator.figures(noise, captions)
    model = load(locate(embedded.MODEL_NAME), device=CPU)
    prompts = [each.text for each in captions]
    with FastestRunners(model, passes=1) as runners:
        options = {"runners": runners, "network": evaluator.features, "folder": tmp_path, "steps": 8}
        images = teacher_images(prompts, 3.0, **options)
        assert images.shape == noise.shape
        assert torch.equal(teacher_images(prompts, 3.0, **options), images)
    assert len(list(tmp_path.iterdir())) == 1
    drawn = evaluator.figures(images, captions)
    assert drawn["caption_scores"].mean() > noise_row["caption_scores"].mean() + 5
    assert noise_row["background"] < drawn["background"]
    table = results_table({"real images": noise_row, "w=1": drawn})
    assert [row[0] for row in table.cells] == ["real images", "w=1"]
    assert [row[2] for row in table.cells] == ["0%", "100%"]
    scored = drawn | {"caption_scores": torch.tensor([31.0, 33.0]), "style": None}
    assert results_table({"real images": noise_row, "w=1": scored}).cells[1][3:6:2] == ["32.0 ± 1.0", "–"]


def test_only_what_a_caption_names_is_asked_for(artworks: Artworks) -> None:
    evaluator = evaluator_of(artworks)
    captions = draw_captions(artworks, held_out=True, count=30, seed=5)
    real = evaluator.figures(real_images(artworks, captions), captions)
    assert real["background"] > 0.9
    nameless = [each for each in captions if each.background is None]
    assert evaluator.figures(real_images(artworks, nameless), nameless)["background"] is None


def test_evaluate_needs_the_unguided_teacher(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 must be among them"):
        evaluate(tmp_path, scales="2,3")
    for scales, message in (("1,x", "no comma-separated list"), ("1,inf", "must be at least 1")):
        with pytest.raises(InputError, match=message):
            evaluate(tmp_path, scales=scales)


@pytest.mark.slow
def test_what_a_negative_prompt_names_is_looked_for(
    artworks: Artworks,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(negative_prompts, "load_artworks", lambda work: artworks)
    monkeypatch.setattr(negative_prompts, "style_network", lambda work, artworks, seed: train_style(artworks, steps=2))
    features = torch.randn(16, 1280, generator=torch.Generator().manual_seed(0))
    fitted = fit_groups(features, torch.arange(16) % len(artworks.groups), len(artworks.groups))
    monkeypatch.setattr(negative_prompts, "things_classifier", lambda *arguments, seed: fitted)
    config = DistillConfig(prompts=prompt_file, updates=1, batch_size=2, negative_prompt="live")
    distill(locate("emoji64"), config, output=tmp_path / "live", device="cpu", observers=Observers(preview=False))
    negative_prompts.negatives([tmp_path / "live"], images=4, steps=1, batch_size=4)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [row[0] for row in rows]
    variants = ["teacher, no negative prompt", "teacher, two passes", "live, one pass"]
    assert names == [each for what in ("background", "style", "thing") for each in (what, "---", *variants)]
    # From one noise, without a negative prompt, is the picture that named it.
    assert rows[2][1] == "100.0% ± 0.0%"
    assert all(0 <= float(row[1].split("%")[0]) <= 100 for row in rows if row[0] in variants)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "ddim", "steps": 4, "timestep_spacing": "trailing"},
        {"guider": "apg", "guider_settings": {}},
        {"negative_prompt": "blurry"},
    ],
)
def test_students_of_another_teacher_or_setting_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    plain = StudentInfo(
        method="lora",
        guidance=3.0,
        model="emoji64",
        denoiser_sha256="",
        adapter_files={},
        trainable_parameters=1,
        settings={},
        versions={},
    )
    infos = {tmp_path / "plain": plain, tmp_path / "other": replace(plain, **changes)}
    monkeypatch.setattr(negative_prompts, "read_student", lambda folder, files: infos[folder])
    with pytest.raises(InputError, match=f"the student in {tmp_path / 'other'} can't be compared here") as refused:
        negative_prompts.negatives(list(infos), tmp_path / "work")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
