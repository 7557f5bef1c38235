"""Distances against computations of other hands, CLIP scores, and Inception weights."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from boostdiff.benchmarks.quality import clip_score
from boostdiff.benchmarks.quality.clip_score import ClipScorer
from boostdiff.benchmarks.quality.distances import frechet_distance, kernel_distance
from boostdiff.benchmarks.quality.features import read_weights
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.benchmarks.quality.samples import color_statistics
from boostdiff.engine import embedded
from boostdiff.engine.errors import InputError
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from tiny import CPU, PROMPTS
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of real images, in 64 directions, that went through the disk; one half pulled out of shape."""
    features = Reference.load(embedded.REFERENCE).features[:, :64]
    path = tmp_path_factory.mktemp("features") / "f.safetensors"
    save_file({"real": features[:500].contiguous(), "fake": features[500:] * 1.2 + 0.1}, path)
    loaded = load_file(path)
    return loaded["real"], loaded["fake"]


def test_the_frechet_distance_of_saved_features_is_scipys(saved: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = (part.double().numpy() for part in saved)
    c_real, c_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(c_real + c_fake - 2 * sqrtm(c_real @ c_fake).real)
    found = frechet_distance(Reference.of(*saved), saved[1])
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(Reference.of(*saved), saved[0]) == pytest.approx(0, abs=1e-3)


def test_the_kernel_distance_is_the_unbiased_estimate(saved: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Bińkowski et al. 2018, eq. 4 with k(x, y) = (xᵀy / D + 1)³; up to 200 images there is but one subset."""
    real, fake = (part[:150].double().numpy() for part in saved)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(real, real), kernel(fake, fake))]
    expected = sum(within) - 2 * kernel(real, fake).mean()
    reference = Reference.of(saved[0], torch.from_numpy(real))
    mean, spread = kernel_distance(reference, torch.from_numpy(fake).float())
    assert mean == pytest.approx(expected, rel=1e-3)
    assert spread is None


def test_clip_scores_are_the_models_logits(clip_folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=generator)
    scorer = ClipScorer(str(clip_folder), device=CPU)
    scores = scorer.scores(images, PROMPTS)
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(list(images), return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(list(PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels, **tokens).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(scores, 100 * logits.diagonal().clamp_min(0), atol=1e-3, rtol=1e-4)
    assert scores.shape == (4,)
    assert 0 <= scores.min() < scores.max() <= 100
    assert not torch.allclose(scorer.scores(images, PROMPTS[::-1]), scores)
    # Longer than the model can read: cut, not refused.
    assert scorer.scores(images[:1], ["a red cat " * 50]).isfinite().all()


def test_a_score_bears_the_name_of_its_model(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ClipScorer(str(clip_folder), device=CPU).label == f"CLIP score ({clip_folder.name})"
    monkeypatch.setattr(embedded, "CAPTION_MODEL", clip_folder)
    assert ClipScorer(str(clip_folder), device=CPU).label == f"caption score ({clip_folder.name})"


def test_color_statistics_of_known_images() -> None:
    red, checkered = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    red[0] = 255
    checkered[:, ::2, ::2] = checkered[:, 1::2, 1::2] = 255
    expected = torch.tensor([[21.26, 100, 0], [50, 0, 50]])
    torch.testing.assert_close(color_statistics(torch.stack([red, checkered])), expected, atol=1e-3, rtol=0)


def test_what_is_no_clip_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, said in (
        (tmp_path / "missing", "there is no CLIP model"),
        ("missing", "there is no CLIP model"),
        (tmp_path / "empty", "can't load the CLIP model"),
    ):
        with pytest.raises(InputError, match=said):
            ClipScorer(str(name), device=CPU)


def test_a_clip_model_that_lacks_a_tensor_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    tensors = load_file(copied / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"clip lacks tensors \(1, such as visual_projection"):
        ClipScorer(str(copied), device=torch.device("cpu"))


def test_clip_is_imported_where_it_is_asked_for() -> None:
    # An older transformers, without the processor of PIL, must not keep `bench` from starting.
    assert not [name for name in vars(clip_score) if name.startswith(("CLIP", "Auto"))]


class Surprise:
    def __reduce__(self) -> tuple[type, tuple[str]]:
        return Path, ("x",)


def test_inception_weights_are_tensors_alone(tmp_path: Path) -> None:
    weights = {"fc.weight": torch.ones(2, 3)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert torch.equal(read_weights(tmp_path / name)["fc.weight"], weights["fc.weight"])
    torch.save({"fc.weight": Surprise()}, tmp_path / "object.pth")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Surprise()))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("x")
    torch.save([1], tmp_path / "list.pth")
    for name in ("object.pth", "pickle.pt", "empty.pt", "text.safetensors", "missing.pt", "list.pth"):
        with pytest.raises(InputError, match="the Inception weights"):
            read_weights(tmp_path / name)


def test_inception_features_are_torchmetrics(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from boostdiff.benchmarks.quality.features import InceptionFeatures
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            """Keeps the random weights: the trained ones are a download."""

    torch.save({}, tmp_path / "none.pth")
    untrained = Untrained("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    save_file(untrained.state_dict(), tmp_path / "w.safetensors")
    torch.save(untrained.state_dict(), tmp_path / "w.pth")
    network = InceptionFeatures(tmp_path / "w.safetensors")
    images = torch.randint(0, 256, (2, 6, 3, 40, 40), dtype=torch.uint8)
    features = [network(batch) for batch in images]
    assert features[0].shape == (6, 2048)
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(tmp_path / "w.pth"))
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    found = frechet_distance(Reference.of(features[0], features[0]), features[1])
    assert found == pytest.approx(metric.compute().item(), rel=1e-2, abs=1e-3)
    with pytest.raises(InputError, match="holds no Inception weights"):
        save_file({"fc.weight": torch.ones(2, 3)}, tmp_path / "other.safetensors")
        InceptionFeatures(tmp_path / "other.safetensors")
